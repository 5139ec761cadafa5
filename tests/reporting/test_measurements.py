"""Which measurements a study still has to make for its page, as commands that the other commands accept."""

import json
from pathlib import Path

import pytest

from t2i_lm import study as command
from t2i_lm.collect import main as collect
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.study_plan import MEASUREMENTS, read_study
from t2i_lm.evaluate import parser as evaluate_parser
from t2i_lm.probe import parser as probe_parser
from t2i_lm.reporting.measurements import missing_measurements
from t2i_lm.reporting.probes import ORDER
from t2i_lm.reporting.request import first_pair
from t2i_lm.storage.run_folder import CHECKPOINTS, read_run
from t2i_lm.training.study import compare_arms, study_runs
from tests.plots.synthetic_runs import write_probe, write_relearning
from tests.study_folders import finish

EXPERIMENTS = Path("experiments")
DIGEST = "1" * 64


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two seeds of both arms, each with a learning rate of its own, with digests of checkpoints."""
    arms = "{t2i_pretrained: {optim.lr: 6e-3}, t2i_scratch: {}}"
    (tmp_path / "study.yaml").write_text(f"seeds: [1, 2]\nsecondary: []\ncomparisons: {{one: {{arms: {arms}}}}}\n")
    study = read_study(tmp_path / "study.yaml")
    runs = study_runs(study, EXPERIMENTS, [f"run.dir={tmp_path}", "trainer.max_steps=300"])
    for folder in finish(runs, lambda config: 2.0):
        (folder / CHECKPOINTS).mkdir()
        (folder / CHECKPOINTS / "step-00000300.ckpt.sha256").write_text(f"{DIGEST}  step-00000300.ckpt\n")
    return compare_arms(study, runs)[0]


def folders(comparison: Comparison) -> list[Path]:
    return [run.folder for run in first_pair(comparison).values()]


def test_the_lowest_seed_is_measured_and_its_arms_are_probed_together(comparison: Comparison, tmp_path: Path) -> None:
    commands = missing_measurements(MEASUREMENTS, comparison, tmp_path / "out")
    assert [name for name, *_ in commands] == ["t2i_lm.evaluate", "t2i_lm.evaluate", "t2i_lm.probe"]
    measured = [evaluate_parser().parse_args(arguments) for _, *arguments in commands[:2]]
    assert [one.checkpoint for one in measured] == folders(comparison)
    assert all(one.relearn is not None for one in measured)
    probed = probe_parser().parse_args(commands[2][1:])
    assert probed.runs == folders(comparison)
    assert probed.out == tmp_path / "out" / "probes"
    assert "optim.lr" in probed.varied
    assert [read_run(run).config["seed"] for run in folders(comparison)] == [1, 1]
    assert missing_measurements((), comparison, tmp_path) == []


def test_what_is_measured_of_the_last_checkpoint_is_not_measured_again(comparison: Comparison, tmp_path: Path) -> None:
    first, second = folders(comparison)
    write_relearning(first, 7.0, checkpoint_sha256=DIGEST)
    write_relearning(second, 7.0, checkpoint_sha256="2" * 64)  # of an earlier one
    (again,) = missing_measurements(["relearning"], comparison, tmp_path)
    assert again[2] == str(second)
    (result,) = second.glob("evaluations/*/relearn.json")
    result.write_text("{")
    assert missing_measurements(["relearning"], comparison, tmp_path) == [again], "the command names what is damaged"
    result.write_text(json.dumps({"made_with": {"checkpoint_sha256": DIGEST}}))
    assert missing_measurements(["relearning"], comparison, tmp_path) == []


def test_probes_are_missing_until_each_is_recorded_of_both_runs(comparison: Comparison, tmp_path: Path) -> None:
    pair = dict(zip(("pretrained", "scratch"), folders(comparison), strict=True))
    for name in ORDER:
        assert missing_measurements(["probes"], comparison, tmp_path) != []
        write_probe(pair, name)
    assert missing_measurements(["probes"], comparison, tmp_path) == []


def test_collected_results_are_noted_where_something_is_missing(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect([str(tmp_path / "study"), "--runs", str(tmp_path), "--out", str(tmp_path / "results")]) == 0
    capsys.readouterr()
    first, second = folders(comparison)
    (collected,) = (tmp_path / "results").rglob(second.name)
    runs = {**comparison.runs, "t2i_scratch": {1: [read_run(collected)]}}
    arms = type(comparison.arms)(runs["t2i_pretrained"], runs["t2i_scratch"], ())  # type: ignore[misc]
    mixed = Comparison(comparison.name, comparison.plan, arms, comparison.results)
    assert missing_measurements(["probes"], mixed, tmp_path) == []
    assert capsys.readouterr().err == f"note: no probes: no checkpoints in {collected}\n"
    for run in (first, collected):
        write_relearning(run, 7.0, checkpoint_sha256=DIGEST)
    assert missing_measurements(["relearning"], mixed, tmp_path) == []
    assert capsys.readouterr().err == ""


def test_a_measurement_that_fails_or_is_killed_is_named_and_ends_no_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text("import os, sys; sys.exit(3 if 'RANK' not in os.environ else 4)")
    (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RANK", "0")  # under a launcher, a measurement is alone
    commands = [["failing"], ["this"], ["killed", "one"], ["this"]]
    assert command._run_all(commands[:2]) == 3
    assert command._run_all(commands[2:]) == 1
    captured = capfd.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("==")] == [
        "== python -m failing: failed with code 3",
        "== python -m killed one: killed by SIGKILL (perhaps for lack of memory)",
    ]
    assert [line for line in captured.out.splitlines() if line.startswith("==")] == [
        "== python -m failing",
        "== python -m this",
        "== python -m killed one",
        "== python -m this",
    ]
