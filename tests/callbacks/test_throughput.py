"""Speed, waiting and memory in the training lines of metrics.jsonl."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EMASplitPerplexity, Throughput
from callbacks.base.periodic import Periodic
from tests.callbacks.test_perplexity import fit


class Slow(pl.Callback):
    """Takes its time after a batch, or in a validation."""

    def __init__(self, seconds: float, validation: float = 0.0) -> None:
        self.seconds, self.validation = seconds, validation

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)

    def on_validation_end(self, *_: Any) -> None:
        time.sleep(self.validation)


def test_speed_memory_and_waiting_are_in_the_training_lines(tmp_path: Path) -> None:
    throughput = Throughput(flop_per_token=1e6, peak=1e12)
    meter = EMASplitPerplexity(2, 0.5, tmp_path / "metrics.jsonl", extras=[throughput])
    first, second = fit(tmp_path, [[(1.0, 1)] * 3] * 4, [[(1.0, 1)] * 3], meter)[::2]
    for line in (first, second):
        speed = line["throughput"]
        assert speed["tokens_per_s"] == pytest.approx(20 * speed["samples_per_s"] / 2, rel=1e-3)
        assert 0 < speed["tokens_real_per_s"] < speed["tokens_per_s"]
        assert 0 <= speed["data_wait"] <= 1
        assert speed["memory_mib"] > 10
        assert speed["tflop_per_s"] == pytest.approx(speed["tokens_per_s"] / 1e6, rel=1e-3)
        assert speed["mfu"] == pytest.approx(speed["tflop_per_s"], rel=1e-3, abs=1e-4)
    assert first["throughput"]["eta_s"] > second["throughput"]["eta_s"] == 0
    assert "GiB" in throughput.note()
    assert "MFU" in throughput.note()
    assert "throughput" not in meter.seen


@pytest.mark.slow
@pytest.mark.parametrize(("working", "loading"), [(0.1, 0.0), (0.0, 0.1)])
def test_waiting_is_for_data_alone_and_validations_are_left_out(tmp_path: Path, working: float, loading: float) -> None:
    throughput = Throughput()
    meter = EMASplitPerplexity(2, 0.5, tmp_path / "metrics.jsonl", extras=[throughput])
    slow = Slow(working, validation=1.0)
    written = fit(tmp_path, [[(1.0, 1)] * 3] * 6, [[(1.0, 1)] * 3], meter, others=[slow], loading=loading)
    speeds = [line["throughput"] for line in written if "throughput" in line][1:]
    assert len(speeds) == 2
    for speed in speeds:
        assert speed["data_wait"] > 0.5 if loading else speed["data_wait"] < 0.2
        assert speed["samples_per_s"] > 4 / 1.0


class Probe(Periodic):
    """A measurement of half a second, also before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.measure_now(trainer, pl_module, 0)

    def due(self, *_: Any) -> None:
        time.sleep(0.5)


@pytest.mark.slow
def test_measurements_are_left_out(tmp_path: Path) -> None:
    meter = EMASplitPerplexity(2, 0.5, tmp_path / "metrics.jsonl", extras=[Throughput()])
    written = fit(tmp_path, [[(1.0, 1)] * 3] * 6, [[(1.0, 1)] * 3], meter, others=[Probe(2), Slow(0.05)])
    speeds = [line["throughput"]["samples_per_s"] for line in written if "throughput" in line]
    assert len(speeds) == 3
    assert min(speeds) > 4 / 0.4  # 0.1 s of steps an interval, 0.6 s with a measurement


def test_speed_is_drawn_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    meter = EMASplitPerplexity(2, 0.5, tmp_path / "metrics.jsonl", extras=[Throughput(1e6)])
    fit(tmp_path, [[(1.0, 1)] * 3] * 4, [[(1.0, 1)] * 3], meter, logger=logger)
    tags = set(EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["scalars"])
    assert {f"throughput/{name}" for name in ("tokens_per_s", "data_wait", "memory_mib")} <= tags
    assert "throughput/mfu" not in tags  # of a device whose peak is not known
