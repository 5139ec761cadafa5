"""Compact results of runs: equal numbers, curves that look the same, no path of the machine, and what is refused."""

import gzip
import json
import math
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2i_lm.collect import main
from t2i_lm.comparison.comparability import differences
from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.portable import portable
from t2i_lm.comparison.thinning import LATE, TOLERANCE, kept_places, thinned_records
from t2i_lm.config.load import load_experiment, save_experiment
from t2i_lm.data.scenes.version import SCENES_FORMAT
from t2i_lm.evaluate import main as evaluate
from t2i_lm.export import main as export
from t2i_lm.generation.grid import grid_cells, save_grid
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.plots.sweep import LAST, Outcome
from t2i_lm.reporting.probes import find_probes
from t2i_lm.reporting.samples import sample_blocks
from t2i_lm.sample import main as sample
from t2i_lm.storage.run_folder import CONFIG, CONFIG_DIGEST, ENVIRONMENT, REPORT, Run, read_run, run_folders
from t2i_lm.storage.sealed import sealed
from t2i_lm.train import main as train
from t2i_lm.training.equal_runs import find_equal_run
from t2i_lm.training.resumption import config_entry
from tests.comparison.test_compare import set_environment
from tests.plots.synthetic_runs import write_probe, write_relearning, write_run, write_tokens
from tests.runs import EXPERIMENTS, PRETRAINED

ARMS = ("t2i_pretrained", "t2i_scratch")
ENDPOINTS = (
    "val.image.nll",
    "val/compositional.text.nll",
    "train.image.nll",
    "train.image.nll_ema",
    "forgetting.text.text_rows.nll",
    "report.text_floor_nll",
)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Run folders of both arms, with measurements of forgetting and relearning."""
    runs = {
        name: write_run(tmp_path / "runs", name, splits=("iid", "compositional"), forgotten=0.5 + number)
        for number, name in enumerate(ARMS)
    }
    for name, run in runs.items():
        write_relearning(run, 9.0, checkpoint_sha256=name)
    return runs


def collected(root: Path, *words: object) -> Path:
    """The folder of the results of all runs."""
    assert main([*map(str, words), "--runs", str(root / "runs"), "--out", str(root / "out")]) == 0
    return root / "out"


def left_out(root: Path, capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """What a call that leaves runs out says of them."""
    capsys.readouterr()
    assert main([*map(str, words), "--runs", str(root / "runs"), "--out", str(root / "out")]) == 2
    return capsys.readouterr().err.splitlines()


def results(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_endpoints_and_tables_are_equal_and_figures_are_drawn(pair: dict[str, Path], tmp_path: Path) -> None:
    out = collected(tmp_path)
    runs, copies = (
        [read_run(root / path.relative_to(tmp_path / "runs")) for path in pair.values()]
        for root in (tmp_path / "runs", out)
    )
    for run, copy in zip(runs, copies, strict=True):
        assert not differences([run, copy])
        for name in ENDPOINTS:
            assert Endpoint(name).value(copy) == Endpoint(name).value(run)
        for kind in ("forgetting", "val/iid", "val/compositional"):
            assert copy.records(kind) == run.records(kind)
        assert Outcome("", (), copy).training_nll("image") == Outcome("", (), run).training_nll("image")
        assert len(copy.records("train")) < len(run.records("train"))
    saved = Endpoint("tokens_saved.image")
    assert saved.difference(*copies) == saved.difference(*runs)
    for name in ("4", "forgetting", "relearning"):
        assert FIGURES[name](Request(out)).table == FIGURES[name](Request(tmp_path / "runs")).table


def test_results_are_small_and_collected_once(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = collected(tmp_path, tmp_path / "runs" / ARMS[0])
    assert [path.parent.name for path in out.rglob(CONFIG)] == [pair[ARMS[0]].name]
    collected(tmp_path)
    first = results(out)
    assert sum(map(len, first.values())) < 2 * 25_000
    capsys.readouterr()
    collected(tmp_path)
    assert "0 runs collected, 2 were there already" in capsys.readouterr().out
    assert results(out) == first
    (next(out.rglob(REPORT))).unlink()  # as after a kill: the report is written last
    collected(tmp_path)
    assert results(out) == first


def curve(steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Training lines of a long run: a noisy loss, its average, and a modality that comes late."""
    noise, smooth = random.Random(seed), 0.0
    for number in range(1, steps + 1):
        loss = 1.7 + 6 * math.exp(-number / 30) + noise.gauss(0, 0.05)
        smooth = 0.95 * smooth + 0.05 * loss
        entry = {"nll": loss, "nll_ema": smooth / (1 - 0.95**number), "nll_sum": loss * 7, "count": 7}
        yield {"step": 10 * number, "train": {"image": entry, "text": entry if number > 50 else {}}}


@pytest.mark.parametrize("steps", [1, 2, 39, 160, 2560])
def test_curves_between_kept_lines_are_straight_but_for_a_line_width(steps: int) -> None:
    lines = [*curve(steps, steps)]
    kept = kept_places(lines)
    assert {0, steps - 1} <= {*kept}
    assert {place for place, line in enumerate(lines) if line["step"] > (1 - LATE) * lines[-1]["step"]} <= {*kept}
    assert len(kept) <= 60 + steps / 8
    raw, smooth = (np.array([line["train"]["image"][key] for line in lines]) for key in ("nll", "nll_ema"))
    assert {int(raw.argmin()), int(raw.argmax())} <= {*kept}  # of which the axis is made
    error = np.abs(np.interp(np.arange(steps), kept, smooth[kept]) - smooth)
    assert error.max() <= TOLERANCE * (max(raw.max(), smooth.max()) - min(raw.min(), smooth.min()))


def test_lines_without_a_loss_by_modality_and_the_last_of_each_kind_are_whole(tmp_path: Path) -> None:
    losses = ({"all": {"nll": 5.1, "nll_ema": 5.2}}, {"mse": 0.1234567890123})
    lines = [{"step": step, "train": loss, "time": 3.0} for step in range(100) for loss in losses]
    assert thinned_records(Run(tmp_path, {}, {}, lines, None)) == lines
    split = [{**line, "throughput": {"tokens_per_s": 1.5}, "time": 3.0} for line in curve(100, 0)]
    first, *_, last = thinned_records(Run(tmp_path, {}, {}, split, None))
    assert last == split[-1]
    assert first.keys() == {"step", "train"}
    assert first["train"]["image"]["nll_sum"] == split[0]["train"]["image"]["nll_sum"]
    assert first["train"]["image"]["nll"] == pytest.approx(split[0]["train"]["image"]["nll"], rel=1e-5)


def test_the_final_share_is_that_of_the_sweeps_table() -> None:
    assert LATE == LAST


def test_no_file_holds_a_path_of_the_machine(pretrained: Run, tmp_path: Path) -> None:
    root = pretrained.folder.parents[1]
    assert main(["--runs", str(root), "--out", str(tmp_path / "out")]) == 0
    (folder,) = run_folders(tmp_path / "out")
    copy = read_run(folder)
    assert copy.config["backbone"]["path"] == Path(pretrained.config["backbone"]["path"]).name
    assert "directory" not in copy.environment
    assert not differences([copy, pretrained], ("backbone.path",))
    for name, content in results(tmp_path / "out").items():
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
        for word in (str(tmp_path.parents[1]), str(root), str(EXPERIMENTS.parent), str(Path.home()) + "/"):
            assert word not in text, name
        assert socket.gethostname() not in text
    assert Endpoint("val/iid.image.nll").value(copy) == Endpoint("val/iid.image.nll").value(pretrained)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ada/project/runs/align/x/rows", "runs/align/x/rows"),
        ("/home/ada/data set/a", "a"),
        ("code:m:f:/home/ada/x/y", "code:m:f:y"),
        ("OSError: /home/ada/project/runs/x: disk full, see /srv/log/a.txt", "OSError: runs/x: disk full, see a.txt"),
        ("file:///srv/ada/shards", "shards"),
        ("hf://org/name/file", "hf://org/name/file"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("nll (nats/token), end with </s>, 1/2, and/or, ~/x/y", "nll (nats/token), end with </s>, 1/2, and/or, ~/x/y"),
        ("../x/y", "../x/y"),
    ],
)
def test_paths_become_relative_or_names(value: str, expected: str) -> None:
    starts = [Path("/home/ada/project"), Path("/")]
    assert portable({"a": [value]}, starts) == {"a": [expected]}
    assert portable({value: 1.5}, starts) == {expected: 1.5}
    assert portable({"completions": {"x": value}}, starts) == {"completions": {"x": value}}


def test_unfinished_and_damaged_runs_are_named_and_the_others_collected(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = write_run(tmp_path / "runs", ARMS[0], "20260116-093000", steps=150, finished=False)
    damaged = write_run(tmp_path / "runs", ARMS[1], "20260117-093000")
    (damaged / "metrics.jsonl").write_text("{\n")
    said = left_out(tmp_path, capsys)
    assert said[0] == f"left out: {stopped}: unfinished at step 150 of 300"
    assert said[1].startswith(f"left out: {damaged}: {damaged}/metrics.jsonl line 1 is damaged")
    assert len(said) == 2
    assert len([*(tmp_path / "out").rglob(CONFIG)]) == 2


@pytest.mark.parametrize("arm", ARMS)
def test_another_data_version_of_a_setting_is_refused(
    arm: str, pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collected(tmp_path, tmp_path / "runs" / ARMS[0])
    write_run(tmp_path / "runs", arm, "20260118-093000", config={"seed": 1}, data_hash="f" * 16)
    write_run(tmp_path / "runs", arm, "20260119-093000", config={"optim.lr": 0.1}, data_hash="f" * 16)
    (line,) = left_out(tmp_path, capsys)
    first = tmp_path / "out" / ARMS[0] / pair[ARMS[0]].name
    assert f"{arm}/20260118-093000-demo: cannot be compared with the run of its setting in {first}: " in line
    assert line.endswith(f"data hash {'f' * 16}, there 0123456789abcdef")
    assert len([*(tmp_path / "out").rglob(CONFIG)]) == 3


def test_files_of_other_paths_are_other_settings_and_another_file_of_a_path_is_refused(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokenized(number: int, path: str, sha256: str) -> None:
        config = {"image_tokenizer.path": path, "seed": number}
        run = write_run(tmp_path / "runs", ARMS[0], f"202601{18 + number}-093000", config=config, data_hash=sha256[:16])
        set_environment(run, tokenizers={"image": sha256}, directory=str(tmp_path / "work" / "place"))

    tokenized(1, "/srv/cache/one", "1" * 64)
    tokenized(2, str(tmp_path / "work" / "place" / "two"), "2" * 64)
    collected(tmp_path)
    tokenized(3, "/home/ada/one", "3" * 64)
    tokenized(4, "two", "2" * 64)
    (line,) = left_out(tmp_path, capsys)
    assert f"image tokenizer {'3' * 64}, there {'1' * 64}" in line
    assert len([*(tmp_path / "out").rglob(CONFIG)]) == 5


def test_a_seed_has_one_precision_and_another_seed_may_have_another(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in pair.values():
        set_environment(folder, precision="bf16-mixed")
    collected(tmp_path)
    for seed, precisions in ((1, ("32-true", "32-true")), (2, ("32-true", "bf16-mixed"))):
        for arm, precision in zip(ARMS, precisions, strict=True):
            run = write_run(tmp_path / "runs", arm, f"202601{18 + seed}-093000", config={"seed": seed})
            set_environment(run, precision=precision)
    (line,) = left_out(tmp_path, capsys)
    assert line.startswith(f"left out: {tmp_path}/runs/{ARMS[1]}/20260120-093000-demo: ")
    assert line.endswith("precision bf16-mixed, there 32-true")
    assert len([*(tmp_path / "out").rglob(CONFIG)]) == 5


def test_a_run_that_has_changed_since_is_named(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = collected(tmp_path)
    first = results(out)
    content = json.loads((pair[ARMS[0]] / REPORT).read_text())
    (pair[ARMS[0]] / REPORT).write_text(json.dumps(content | {"steps": 3}))
    (line,) = left_out(tmp_path, capsys)
    assert f"{ARMS[0]}/{pair[ARMS[0]].name} was collected with other content of report.json; delete it" in line
    assert results(out) == first


def test_later_evaluations_are_added_and_other_ones_named(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = collected(tmp_path)
    later = pair[ARMS[0]] / "evaluations" / "later" / "coco.json"
    later.parent.mkdir()
    later.write_text(json.dumps(sealed({"fid": 3.0, "made_with": {"seed": 0}})))
    collected(tmp_path)
    copy = out / later.relative_to(tmp_path / "runs")
    assert json.loads(copy.read_text())["fid"] == 3.0
    later.write_text(json.dumps(sealed({"fid": 4.0, "made_with": {"seed": 0}})))
    (line,) = left_out(tmp_path, capsys)
    assert f"{copy} is another result; delete it" in line


def test_wrong_folders_are_one_line(pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        ([tmp_path], f"{tmp_path} is not in --runs {tmp_path / 'runs'}"),
        ([tmp_path / "none"], "none: no such folder"),
        (["--out", tmp_path / "runs"], "expected another folder than --runs"),
    ):
        assert main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *map(str, words)]) == 2
        assert expected in capsys.readouterr().err
    out = collected(tmp_path)
    assert main(["--runs", str(out), "--out", str(tmp_path / "again")]) == 2
    assert capsys.readouterr().err.count("holds collected results already") == 2


def test_runs_behind_a_link_are_collected_at_their_place(pair: dict[str, Path], tmp_path: Path) -> None:
    folder = pair[ARMS[0]].parent
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "disk")
    out = collected(tmp_path, folder)
    assert [path.parent for path in out.rglob(CONFIG)] == [out / folder.name / pair[ARMS[0]].name]


def test_what_requires_a_checkpoint_is_refused_in_one_line(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = collected(tmp_path) / ARMS[0]
    for command in (
        lambda: train([PRETRAINED, "--resume", str(out)]),
        lambda: sample(["--checkpoint", str(out), "a red circle", "--out", str(tmp_path / "x")]),
        lambda: export([str(out), "--out", str(tmp_path / "x")]),
        lambda: evaluate(["--checkpoint", str(out), "--report"]),
    ):
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out / pair[ARMS[0]].name} holds collected results, thinned and without checkpoints" in line
    assert not (tmp_path / "x").exists()


def test_a_study_takes_collected_results_for_finished_runs(tmp_path: Path) -> None:
    words = [f"backbone.path={tmp_path / 'lm'}", "aligned_rows=latest", f"run.dir={tmp_path / 'runs'}"]
    config = load_experiment(EXPERIMENTS / "t2i_aligned.yaml", "demo", words)
    folder = write_run(tmp_path / "runs", "t2i_aligned")
    rows = tmp_path / "runs" / "align" / "a" / "aligned_rows.safetensors"
    save_experiment(replace(config, aligned_rows=str(rows)), folder / CONFIG)
    environment = json.loads((folder / ENVIRONMENT).read_text())
    environment |= {"scenes": SCENES_FORMAT, CONFIG_DIGEST: config_entry(folder)}
    (folder / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    out = collected(tmp_path)
    for changed, found in (("seed=0", True), ("seed=1", False), (f"backbone.path={tmp_path / 'other'}", False)):
        other = load_experiment(EXPERIMENTS / "t2i_aligned.yaml", "demo", [*words, f"run.dir={out}", changed])
        if found:
            assert find_equal_run(other) == (out / "t2i_aligned" / folder.name, True)
        else:
            with pytest.raises(ValueError, match="no finished run of align"):
                find_equal_run(other)


def test_images_of_the_report_are_smaller_and_shown(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    captions = [f"a circle, “{number}”" for number in range(12)]
    write_tokens(pair[ARMS[0]])
    save_grid([*pixels], captions, pair[ARMS[0]] / "samples" / "grid.png")
    write_probe(pair, "tokens")
    collected(tmp_path)
    out = collected(tmp_path, "--images")
    copy = out / ARMS[0] / pair[ARMS[0]].name
    cells = grid_cells(copy / "samples" / "grid.webp")
    assert [cell.caption for cell in cells] == captions[:8]
    difference = np.asarray(cells[7].image, dtype=float) - np.kron(pixels[7], np.ones((3, 3, 1)))
    assert np.abs(difference).mean() < 40
    assert FIGURES["1"](Request(out)).table == FIGURES["1"](Request(tmp_path / "runs")).table
    runs = [read_run(out / name / run.name) for name, run in pair.items()]
    (block,), notes = sample_blocks({ARMS[0]: runs[0]})
    assert [row[0].caption for row in block.rows] == captions[:8]
    probes, more = find_probes(runs, runs)
    assert probes is not None
    assert probes.figures[0].image.width == 80
    assert not notes
    assert not more
    (pair[ARMS[0]] / "samples" / "grid.png").write_bytes(b"")
    (line,) = left_out(tmp_path, capsys, "--images")
    assert f"{pair[ARMS[0]]}/samples/grid.png cannot be read: " in line
