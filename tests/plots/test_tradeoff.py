"""Figures of forgetting and of remedies, and the command that trains their runs."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from t2i_lm import remedies
from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.config.values import key_types
from t2i_lm.evaluation.forgetting import write_completions
from t2i_lm.figures import main as figures
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.plots.tradeoff import Point, pareto_front
from t2i_lm.reporting.findings import forgetting_sentences, remedy_sentences
from t2i_lm.storage.run_folder import read_run
from t2i_lm.training.remedies import read_strengths, remedy_jobs
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
    axes, second = drawing.figure.axes
    lines = {str(line.get_gid()): line for line in axes.get_lines()}
    containers = {str(part.get_label()): part for part in axes.containers}
    assert set(containers) == {"pre-trained, untouched", "l2 sp", "replay"}
    for label, name, change in (("replay", "remedy_replay", 0.25), ("l2 sp", "remedy_l2_sp", 2.0)):
        image = read_lines(next((runs / name).iterdir()), "val")[-1]["val"]["image"]["nll"]
        line = containers[label][0]
        assert (float(line.get_xdata()[0]), float(line.get_ydata()[0])) == (change, image)
        other = next(part for part in second.containers if part.get_label() == label)[0]
        assert (float(other.get_xdata()[0]), float(other.get_ydata()[0])) == (change, image)
    scratch = read_lines(next((runs / "t2i_scratch").iterdir()), "val")[-1]["val"]["image"]["nll"]
    assert set(lines["tradeoff/scratch"].get_ydata()) == {scratch}
    assert "random initialization" in drawing.table
    assert "image validation" in drawing.table
    assert drawing.table.splitlines()[0].split()[2:7] == ["novels", "increase", "+-", "nonfiction", "increase"]


def test_strengths_of_a_remedy_are_joined_in_their_order(runs: Path) -> None:
    """The newest run of each; an unfinished one, and one of another rate, are not drawn."""
    untouched = next((runs / "remedy_l2_sp").iterdir())
    shutil.rmtree(untouched)
    for hour, (strength, forgotten) in enumerate(((10.0, 0.5), (1.0, 1.2), (3.0, 9.0), (3.0, 0.8))):
        config = {"optim.l2_sp": strength}
        write_run(runs, "remedy_l2_sp", f"20260302-{hour:02}0000", forgotten=forgotten, config=config)
    for stamp, more in (("20260301-010000", {"optim.lr": 0.1}), ("20260301-020000", {})):
        config = {"optim.l2_sp": 30.0, **more}
        write_run(runs, "remedy_l2_sp", stamp, forgotten=7.0, config=config, finished=bool(more))
    ratio = {"data.replay_ratio": 0.5, "loss.replay_weight": 0.0}
    write_run(runs, "remedy_replay", "20260301-120000", forgotten=0.1, config=ratio)
    drawing = FIGURES["remedies"](Request(runs))
    curves = {str(part.get_label()): part[0] for part in drawing.figure.axes[0].containers}
    assert list(curves["l2 sp"].get_xdata()) == [1.2, 0.8, 0.5]
    assert list(curves["replay"].get_xdata()) == [0.25, 0.1]
    assert curves["l2 sp"].get_linestyle() == "-"
    assert curves["pre-trained, untouched"].get_linestyle() == "None"
    written = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert [text for text in written if text] == ["1", "10", "0", "0.5"]
    rows = {line.split("  ")[0]: line.split() for line in drawing.table.splitlines()}
    assert rows["l2 sp 3"][3] == "0.8000"
    assert rows["replay 0.5"][-2:] == ["4,800", "300"]  # half of 300 batches of 32
    assert rows["replay 0"][-2:] == ["9,600", "300"]


@pytest.mark.parametrize("name", ["t2i_pretrained", "remedy_l2_sp"])
def test_a_run_that_has_just_started_is_named_and_the_finished_one_before_it_drawn(
    name: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = FIGURES["remedies"](Request(runs))
    folder = write_run(runs, name, "20260301-150000", steps=5, finished=False, forgotten=0.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for text in ("text", "second_text"):
            if "forgetting" in line:
                del line["forgetting"][text]["text_rows"]["change"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = FIGURES["remedies"](Request(runs))
    assert (after.table, after.caption) == (before.table, before.caption)
    noted = capsys.readouterr().err
    assert noted.startswith(f"note: {name}/20260301-150000-demo is left out: it has no change of held-out text loss")
    assert noted.count("\n") == 1


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


@pytest.mark.parametrize(("name", "arm"), [("forgetting", "t2i_scratch"), ("remedies", "remedy_replay")])
def test_other_held_out_texts_are_refused_in_one_figure(name: str, arm: str, tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained", forgotten=7.5)
    replayed = {"data.replay_ratio": 0.5} if arm == "remedy_replay" else {}
    folder = write_run(tmp_path, arm, config=replayed, forgotten=0.4)
    FIGURES[name](Request(tmp_path, strict=True))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "forgetting" in line:
            line["forgetting"]["text"] |= {"name": "mine", "targets": 99, "floors": {"unigram": {"nll": 3.0}}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(IncomparableError, match=r"not measured alike: targets 512 \(1 runs\), 99 \(1 runs\)"):
        FIGURES[name](Request(tmp_path))


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


def test_an_unknown_standard_error_is_left_out(runs: Path) -> None:
    """As of a single row of text or a single question."""

    def unknown(tree: dict[str, Any]) -> dict[str, Any]:
        values = {key: unknown(value) if isinstance(value, dict) else value for key, value in tree.items()}
        return {key: None if key.endswith("se") else value for key, value in values.items()}

    for file in runs.glob("*/*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [line | {"forgetting": unknown(line["forgetting"])} if "forgetting" in line else line for line in lines]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tables = [FIGURES[name](Request(runs)).table for name in ("forgetting", "remedies")]
    assert "pretrained, before, top-1 accuracy" in tables[0]
    assert not re.search(r"\+- +\d|nan\b|None", "\n".join(tables))
    folders = {"pretrained": "t2i_pretrained/20260301-100000-demo", "replay": "remedy_replay/20260301-130000-demo"}
    arms = {arm: read_run(runs / folder) for arm, folder in folders.items()}
    said = " ".join([*remedy_sentences(arms), *forgetting_sentences({arm: [run] for arm, run in arms.items()})])
    assert "text loss +0.2500, image loss" in said
    assert "change +0.2500;" in said


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
        beside = path.with_name("lora.yaml") if path.stem == "lora_image" else BASE
        mine, base = (flatten(load_experiment(file, scale, needs)) for file in (path, beside))
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
    plain, requested = (remedy_jobs("x", None, None, [], "demo", more, BASE) for more in ([], ["samples.prompts=64"]))
    assert {job.config.samples.prompts for job in plain} == {0}
    assert {job.config.samples.interval for job in plain} == {None}
    assert {job.config.samples.prompts for job in requested} == {64}


def test_a_plan_trains_a_remedy_at_every_strength() -> None:
    strengths = read_strengths(ROOT / "experiments" / "plans" / "remedies.yaml")
    keys = {setting.partition("=")[0] for runs in strengths.values() for settings in runs for setting in settings}
    assert keys <= key_types().keys()
    runs = [len(strengths.get(path.stem, [[]])) for path in REMEDIES]
    assert 1 + sum(runs) == 37  # as the plan says
    jobs = remedy_jobs("x", "y", None, ["distil", "lora_image", "caption_mask"], "demo", [], BASE, strengths)
    assert [job.name for job in jobs] == [
        "t2i_pretrained",
        "remedy_caption_mask",
        *(f"remedy_distil distil.weight={weight}" for weight in (0.1, 0.3, 1.0, 3.0)),
        *(f"remedy_lora_image lora.rank={rank} lora.alpha={2.0 * rank}" for rank in (4, 16, 64)),
    ]
    assert [job.config.distil.weight for job in jobs[2:6]] == [0.1, 0.3, 1.0, 3.0]
    for same in ([["distil.weight=1"]] * 2, [["trainer.threads=1"], ["trainer.threads=2"]]):
        with pytest.raises(ValueError, match=r"two strengths of remedy_distil are the same"):
            remedy_jobs("x", None, None, ["distil"], "demo", [], BASE, {"distil": same})
    with pytest.raises(ValueError, match=r"--plan: strengths of l2: expected one of caption_mask"):
        remedy_jobs("x", "y", None, [], "demo", [], BASE, {"l2": [["optim.l2_sp=1"]]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strengths: {l2_sp: {optim.l2_sp: 3}}", r"strengths\.l2_sp\.optim\.l2_sp=3: expected a list of numbers"),
        ("strengths: {l2_sp: {optim.l2_sp: []}}", r"strengths\.l2_sp\.optim\.l2_sp=\[\]: expected a list of numbers"),
        ("strengths: {l2_sp: {optim.l2_sp: [a]}}", "expected a list of numbers"),
        ("strengths: {lora: {lora.rank: [1, 2], lora.alpha: [1]}}", "strengths.lora=.*lists of equal lengths"),
        ("strengths: {lora: [1]}", "strengths.lora=.*lists of values by config key"),
        ("strengths: []", "strengths=.*keys and values by remedy"),
        ("arms: {}", "expected the strengths of remedies, found the plan of a comparison"),
        ("strength: {}", "one key, strengths"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_plan_is_refused_by_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)plan\.yaml.*{message}"):
        read_strengths(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match="no plan file"):
        read_strengths(tmp_path / "absent.yaml")
