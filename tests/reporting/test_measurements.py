"""Which measurements a study still has to make for its page, as commands that the other commands accept."""

import shutil
from pathlib import Path

import pytest

from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.study_plan import MEASUREMENTS, read_study
from t2i_lm.evaluate import parser as evaluate_parser
from t2i_lm.probe import parser as probe_parser
from t2i_lm.reporting.measurements import missing_measurements
from t2i_lm.reporting.request import first_pair
from t2i_lm.storage.run_folder import CHECKPOINTS
from t2i_lm.training.study import compare_arms, study_runs
from tests.plots.synthetic_runs import write_relearning
from tests.study_folders import finish

EXPERIMENTS = Path("experiments")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two seeds of both arms, each with a learning rate of its own, with folders of checkpoints."""
    arms = "{t2i_pretrained: {optim.lr: 6e-3}, t2i_scratch: {}}"
    (tmp_path / "study.yaml").write_text(f"seeds: [1, 2]\nsecondary: []\ncomparisons: {{one: {{arms: {arms}}}}}\n")
    study = read_study(tmp_path / "study.yaml")
    runs = study_runs(study, EXPERIMENTS, [f"run.dir={tmp_path}"])
    for folder in finish(runs, lambda config: 2.0):
        (folder / CHECKPOINTS).mkdir()
    return compare_arms(study, runs)[0]


def test_the_first_seed_is_measured_and_its_arms_are_probed_together(comparison: Comparison, tmp_path: Path) -> None:
    first, second = (run.folder for run in first_pair(comparison).values())
    commands = list(missing_measurements(MEASUREMENTS, comparison, tmp_path / "out"))
    assert [name for name, _ in commands] == ["evaluate", "evaluate", "probe"]
    measured = [evaluate_parser().parse_args(arguments) for _, arguments in commands[:2]]
    assert [one.checkpoint for one in measured] == [first, second]
    assert all(one.relearn is not None for one in measured)
    probed = probe_parser().parse_args(commands[2][1])
    assert probed.runs == [first, second]
    assert probed.out == tmp_path / "out" / "probes"
    assert "optim.lr" in probed.varied
    assert not list(missing_measurements((), comparison, tmp_path))


def test_what_is_measured_is_not_measured_again(comparison: Comparison, tmp_path: Path) -> None:
    first, second = (run.folder for run in first_pair(comparison).values())
    write_relearning(first, 7.0)
    assert [arguments[1] for _, arguments in missing_measurements(["relearning"], comparison, tmp_path)] == [
        str(second)
    ]
    write_relearning(second, 7.0)
    assert not list(missing_measurements(["relearning"], comparison, tmp_path))


def test_results_without_checkpoints_are_noted(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collected = first_pair(comparison)["t2i_scratch"].folder
    shutil.rmtree(collected / CHECKPOINTS)
    assert not list(missing_measurements(["probes"], comparison, tmp_path))
    assert capsys.readouterr().err == f"note: no probes: {collected} has no checkpoints\n"
