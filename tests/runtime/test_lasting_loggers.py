"""TensorBoard and CSV files on a disk that is full for a while."""

import csv
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.runtime import lasting_loggers
from t2i_lm.runtime.lasting_loggers import LastingSummaryWriter
from t2i_lm.runtime.loggers import build_logger
from tests.disks import Ballast, file_limit, small_disk
from tests.runs import PRETRAINED


def config(logger: str) -> ExperimentConfig:
    return load_experiment(Path(PRETRAINED), "demo", [f"log.logger={logger}"])


def rows(file: Path) -> list[dict[str, str]]:
    """Of a CSV file."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def points(folder: Path, tag: str = "a") -> list[int]:
    """Steps of a tag, as TensorBoard reads them."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)] if tag in accumulator.Tags()["scalars"] else []


def test_the_file_holds_what_tensorboards_own_writer_writes(tmp_path: Path) -> None:
    for name, kind in (("own", LastingSummaryWriter), ("theirs", SummaryWriter)):
        writer = kind(str(tmp_path / name), purge_step=3)
        for step in range(5):
            writer.add_scalar("a", step / 2, step)
        writer.add_text("t", "text", 1)
        writer.add_image("i", np.zeros((4, 4, 3), np.uint8), 2, dataformats="HWC")
        writer.close()
    read = {}
    for name in ("own", "theirs"):
        accumulator = EventAccumulator(str(tmp_path / name), size_guidance={"tensors": 0})
        accumulator.Reload()
        scalars = [(event.step, event.value) for event in accumulator.Scalars("a")]
        read[name] = (accumulator.Tags(), scalars, accumulator.Images("i")[0].encoded_image_string)
    assert read["own"] == read["theirs"]


def test_points_wait_and_no_reader_meets_a_part_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = build_logger(config("tensorboard"), tmp_path)
    with file_limit(400):
        for step in range(30):
            logger.log_metrics({"a": 1.0, "b": 2.0}, step)
        logger.save()
        written = points(tmp_path / "tb")
        assert 0 < len(written) < 30
    for step in range(30, 40):
        logger.log_metrics({"a": 1.0, "b": 2.0}, step)
        assert points(tmp_path / "tb") == list(range(step + 1))
    logger.finalize("success")
    assert points(tmp_path / "tb", "b") == list(range(40))
    first, second = capsys.readouterr().err.splitlines()
    assert "events.out.tfevents" in first
    assert "MB free); TensorBoard's points are written later, and the run goes on" in first
    assert second.endswith("that waited are written")


def test_a_run_whose_disk_stays_full_closes_its_logger_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting_loggers, "WAITING", 2000)
    logger = build_logger(config("tensorboard"), tmp_path)
    with file_limit(0):
        for step in range(100):
            logger.log_metrics({"a": 1.0}, step)
        logger.finalize("success")
    assert capsys.readouterr().err.splitlines()[-1].endswith("bytes are lost")
    assert not list((tmp_path / "tb").glob("hparams.yaml"))


def test_rows_of_csv_wait_also_when_columns_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = build_logger(config("csv"), tmp_path)
    file = tmp_path / "csv" / "metrics.csv"

    logger.log_metrics({"a": 1.0}, 0)
    before = file.read_bytes()
    with file_limit(len(before) + 10):
        for step in range(1, 5):
            logger.log_metrics({"a": 1.0, "b": 2.0}, step)
        assert file.read_bytes() == before
    logger.log_metrics({"a": 1.0}, 5)
    assert [row["step"] for row in rows(file)] == list("012345")
    assert [row["b"] for row in rows(file)] == ["", *["2.0"] * 4, ""]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}: File too large")


@pytest.mark.parametrize("torn", ["1.0\n2.0", "1.0,20,2"], ids=["a field missing", "a number cut"])
def test_a_resumed_run_continues_the_csv_of_a_killed_one(torn: str, tmp_path: Path) -> None:
    file = tmp_path / "csv" / "metrics.csv"
    first = build_logger(config("csv"), tmp_path)
    for step in range(0, 60, 10):
        first.log_metrics({"a": 1.0}, step)
        assert [int(row["step"]) for row in rows(file)] == list(range(0, step + 1, 10))
    first.log_metrics({"validation": 1.0}, 30)
    with file.open("a") as opened:
        opened.write(torn)
    resumed = build_logger(config("csv"), tmp_path, purge=31)
    resumed.log_metrics({"validation": 1.0}, 30)  # repeated
    resumed.log_metrics({"samples": 1.0}, 30)
    resumed.log_metrics({"a": 2.0}, 40)
    filled = [{name: value for name, value in row.items() if value} for row in rows(file)]
    assert filled == [
        *({"step": str(step), "a": "1.0"} for step in range(0, 40, 10)),
        {"step": "30", "validation": "1.0"},
        {"step": "30", "samples": "1.0"},
        {"step": "40", "a": "2.0"},
    ]


def test_a_small_disk_that_is_full_three_times(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        logger, ballast = build_logger(config("tensorboard"), disk), Ballast(disk)
        for step in range(300):
            if step % 100 == 30:
                ballast.fill()
            if step % 100 == 80:
                ballast.remove()
            logger.log_metrics({"a": 1.0, **{f"more{number}": 0.0 for number in range(20)}}, step)
        logger.finalize("success")
        assert points(disk / "tb") == list(range(300))
