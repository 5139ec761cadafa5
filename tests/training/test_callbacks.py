"""Callbacks of a run: which, and in which order."""

from pathlib import Path

import pytest

from callbacks import EventLog
from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import build
from t2i_lm.training.callbacks import callbacks_for
from t2i_lm.training.intervals import even_interval

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FIRST, LAST = ["Throughput", "Preemption", "NonFiniteGuard"], ["RngState", "RunCheckpoints"]


def names(experiment: str, folder: Path, *overrides: str) -> list[str]:
    config = load_experiment(EXPERIMENTS / f"{experiment}.yaml", "demo", overrides)
    callbacks = callbacks_for(build(config), folder, EventLog(folder / "events.log"))
    return [type(callback).__name__ for callback in callbacks]


def test_measurements_come_after_the_meter_and_before_the_random_state(tiny: list[str], tmp_path: Path) -> None:
    plain = names("t2i_pretrained", tmp_path, *tiny, "samples.interval=null")
    assert plain == [*FIRST, "EMASplitPerplexity", "RunProgress", "WallTime", "Dashboard", *LAST]
    intervals = ["samples.interval=4", "forgetting.interval=4", "forgetting.text=book.txt"]
    measured = names("t2i_pretrained", tmp_path, *tiny, *intervals)
    assert measured == [*plain[:-2], "SampleGrid", "Forgetting", *LAST]


@pytest.mark.parametrize(
    ("experiment", "meter"),
    [("uncond_pretrained", "EMASplitPerplexity"), ("align", "EMASplitPerplexity"), ("image_tokenizer", "RunScalars")],
)
def test_the_meter_depends_on_the_loss(experiment: str, meter: str, tiny: list[str], tmp_path: Path) -> None:
    overrides = [] if experiment == "image_tokenizer" else [*tiny, "samples.interval=4"]
    assert names(experiment, tmp_path, *overrides) == [*FIRST, meter, "RunProgress", "WallTime", "Dashboard", *LAST]


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [(400, 1200, 400), (133, 400, 134), (67, 200, 67), (400, 100, 400), (1, 7, 1), (100, 150, 100), (50, 1009, 51)],
)
def test_no_interval_ends_just_before_the_run(interval: int, steps: int, expected: int) -> None:
    assert even_interval(interval, steps) == expected
