"""Figures of forgetting and of remedies, and the command that trains their runs."""

import json
import math
from pathlib import Path

import pytest

from t2i_lm import remedies
from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.evaluation.forgetting import write_completions
from t2i_lm.figures import main as figures
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.plots.tradeoff import Point, pareto_front
from t2i_lm.storage.run_folder import read_run
from t2i_lm.training.remedies import remedy_experiments
from tests.plots.synthetic_runs import read_lines, write_run

ROOT = Path(__file__).parents[2]
REMEDIES = sorted((ROOT / "experiments" / "remedies").glob("*.yaml"))
BASE = ROOT / "experiments" / "t2i_pretrained.yaml"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    write_run(root, "t2i_pretrained", "20260301-100000", forgotten=1.5)
    write_run(root, "t2i_pretrained", "20260301-120000")  # newer, without a forgetting measurement
    write_run(root, "t2i_scratch", "20260301-110000")
    write_run(root, "remedy_replay", "20260301-130000", forgotten=0.25)
    write_run(root, "remedy_l2_sp", "20260301-140000", forgotten=2.0)
    return root


def test_points_are_the_logged_numbers(runs: Path) -> None:
    drawing = FIGURES["remedies"](Request(runs))
    (axes,) = drawing.figure.axes
    lines = {str(line.get_gid()): line for line in axes.get_lines()}
    containers = {str(part.get_label()): part for part in axes.containers}
    assert set(containers) == {"pre-trained, untouched", "l2 sp", "replay"}
    for label, name, change in (("replay", "remedy_replay", 0.25), ("l2 sp", "remedy_l2_sp", 2.0)):
        image = read_lines(next((runs / name).iterdir()), "val")[-1]["val"]["image"]["nll"]
        line = containers[label][0]
        assert (float(line.get_xdata()[0]), float(line.get_ydata()[0])) == (change, image)
    scratch = read_lines(next((runs / "t2i_scratch").iterdir()), "val")[-1]["val"]["image"]["nll"]
    assert set(lines["tradeoff/scratch"].get_ydata()) == {scratch}
    assert "random initialization" in drawing.table
    assert "image validation" in drawing.table


def test_no_point_beats_one_of_the_pareto_front() -> None:
    points = [Point(name, x, 0.0, y, 1) for name, x, y in (("a", 2, 1), ("b", 1, 2), ("c", 2, 2), ("d", 0.5, 3))]
    assert [point.arm for point in pareto_front(points)] == ["d", "b", "a"]


def test_a_run_without_a_measurement_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained")
    write_run(tmp_path, "remedy_replay", forgotten=1.0)
    with pytest.raises(ValueError, match=r"t2i_lm\.remedies --text"):
        FIGURES["remedies"](Request(tmp_path))


def test_the_curves_of_forgetting_equal_the_metrics_file(runs: Path) -> None:
    drawing = FIGURES["forgetting"](Request(runs))
    lines = {str(line.get_gid()): line for axes in drawing.figure.axes for line in axes.get_lines()}
    measured = read_lines(runs / "t2i_pretrained" / "20260301-100000-demo", "forgetting")
    values = [line["forgetting"]["text"]["all_rows"]["ppl"] for line in measured]
    assert [float(y) for y in lines["All rows (novels)/pretrained/val"].get_ydata()] == values
    best = [math.exp(line["forgetting"]["second_text"]["text_rows"]["best_temperature"]["nll"]) for line in measured]
    assert [float(y) for y in lines["Text rows (nonfiction)/pretrained/raw"].get_ydata()] == best
    assert "copa text_rows accuracy" in drawing.table
    assert "second_text text_rows nll" in drawing.table


def test_floors_are_drawn_and_tabled(runs: Path) -> None:
    drawing = FIGURES["forgetting"](Request(runs))
    lines = {str(line.get_gid()): line for axes in drawing.figure.axes for line in axes.get_lines()}
    for title in ("Text rows (novels)", "Text rows (nonfiction)"):
        for label, nll in (("uniform guess", 8.318), ("unigram", 6.5), ("random weights", 8.8)):
            assert list(lines[f"{title}/{label}"].get_ydata()) == pytest.approx([math.exp(nll)] * 2)
    assert not [gid for gid in lines if gid.startswith("All rows") and "unigram" in gid]
    rows = {line.split("  ")[0]: line.split("  ")[1:] for line in drawing.table.splitlines()}
    assert [cell.strip() for cell in rows["unigram"] if cell.strip()] == ["6.500", "6.500"]
    found = [cell.strip() for cell in rows["pretrained, after, best temperature"] if cell.strip()]
    assert found == ["4.750 at 2.50", "5.250 at 2.50"]
    assert [cell.strip() for cell in rows["pretrained, before, top-1 accuracy"] if cell.strip()] == [
        "25.0 % +- 1.0"
    ] * 2


def test_runs_of_an_earlier_version_are_drawn_without_floors(runs: Path) -> None:
    file = runs / "t2i_pretrained" / "20260301-100000-demo" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if "forgetting" in line:
            del line["forgetting"]["second_text"]
            text = line["forgetting"]["text"]
            for key in ("floors", "name", "targets"):
                del text[key]
            for rows in ("text_rows", "all_rows"):
                for key in ("top1", "top1_se", "best_temperature"):
                    del text[rows][key]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    drawing = FIGURES["forgetting"](Request(runs))
    gids = {str(line.get_gid()) for axes in drawing.figure.axes for line in axes.get_lines()}
    assert "Softmax over the text rows/pretrained/val" in gids
    assert "pretrained, after" in drawing.table
    assert "unigram" not in drawing.table


def test_table_1_of_a_pair_is_written_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "runs", tmp_path / "out"
    write_run(root, "t2i_pretrained", "20260301-100000", forgotten=1.5)
    command = ["--runs", str(root), "--out", str(out), "--table"]
    write_run(root, "t2i_scratch", "20260301-110000")
    assert figures([*command]) == 2
    assert "t2i_scratch/20260301-110000-demo has no completions before and after training" in capsys.readouterr().err
    write_run(root, "t2i_scratch", "20260301-120000", forgotten=0.5)
    assert figures(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["table1.md", "table1.tex"]
    markdown, latex = (out / "table1.md").read_text(), (out / "table1.tex").read_text()
    header, _, *rows = markdown.splitlines()
    assert header == "| prompt | rows | pre-trained, before | pre-trained, after | random, before | random, after |"
    assert rows[0] == "| Simply put | text rows | it \\| 0.0 | it \\| 1.5 | it \\| 0.0 | it \\| 0.5 |"
    assert "&lt;image 3>&lt;image 3> ... (9 image tokens)" in rows[1]
    assert "seed 0" in markdown
    assert r"Simply put & text rows & it \textbar{} 0.0 & it \textbar{} 1.5" in latex
    assert r"\textless{}image 3\textgreater{}" in latex
    assert figures([*command, "--figure", "4"]) == 2
    assert "--table: writes Table 1 alone" in capsys.readouterr().err


def test_table_1_has_both_ways_of_decoding(runs: Path) -> None:
    run = read_run(runs / "remedy_replay" / "20260301-130000-demo")
    csv, markdown = (path.read_text() for path in write_completions(run))
    assert csv.splitlines()[0].startswith('prompt,rows,original,"after ')
    assert len(csv.splitlines()) == 3
    assert "it \\| 0.25" in markdown
    assert "&lt;image 3>" in markdown
    assert write_completions(read_run(runs / "t2i_scratch" / "20260301-110000-demo")) == []


@pytest.mark.parametrize("path", REMEDIES, ids=lambda path: path.stem)
def test_a_remedy_is_the_untouched_arm_with_one_thing_changed(path: Path) -> None:
    for scale, needs in (("demo", []), ("flickr8k", ["data.path=x"]), ("paper", ["data.path=x"])):
        mine, base = (flatten(load_experiment(file, scale, needs)) for file in (path, BASE))
        assert mine["name"] == f"remedy_{path.stem}"
        changed = {key for key in mine if mine[key] != base[key]} - {"name"}
        assert 1 <= len(changed) <= 2


@pytest.mark.slow
def test_one_command_trains_missing_runs_and_draws(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.evaluation.tiny_tasks import TEXT

    monkeypatch.chdir(ROOT)
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(TEXT))
    keys = [*tiny, f"run.dir={tmp_path}/runs", "samples.prompts=0", "samples.preference_scenes=0"]
    keys += [
        "forgetting.interval=4",
        "forgetting.second_text=null",
        "forgetting.length=32",
        "forgetting.rows=4",
        "forgetting.completion_tokens=2",
        "trainer.max_steps=4",
    ]
    arguments = ["--text", str(book), "--only", "caption_mask", "--only", "replay", "--out", f"{tmp_path}/out", *keys]
    assert remedies.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "left out: remedy_replay" in printed
    assert "caption mask" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"figure_remedies.png", "figure_forgetting.png"}
    before = sorted((tmp_path / "runs").glob("*/*"))
    assert remedies.main([*arguments, "trainer.threads=1"]) == 0
    assert capsys.readouterr().out.count("(finished: ") == 2
    assert sorted((tmp_path / "runs").glob("*/*")) == before
    assert remedies.main(["--text", str(book), "--only", "none"]) == 2
    assert "caption_mask, distil" in capsys.readouterr().err
    assert remedies.main(["--text", str(book), "--replay", str(book)]) == 2
    assert "the text that --text measures on" in capsys.readouterr().err


def test_no_images_are_generated_unless_requested() -> None:
    plain, requested = (
        remedy_experiments("x", None, None, [], "demo", more, BASE) for more in ([], ["samples.prompts=64"])
    )
    assert {config.samples.prompts for config in plain} == {0}
    assert {config.samples.interval for config in plain} == {None}
    assert {config.samples.prompts for config in requested} == {64}
