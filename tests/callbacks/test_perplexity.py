"""Perplexities of the sums of all micro-batches, smoothed by the documented formula."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset, default_collate

from callbacks import EMASplitPerplexity, RunScalars
from callbacks.base.tags import loss_tags

SPLIT = ("text", "image", "boundary")
Sums = list[tuple[float, int]]  # (nll_sum, count) of each modality in one micro-batch


class Scripted(pl.LightningModule):
    """Reports the sums that a test gives it."""

    def __init__(self, train: list[Sums], val: list[Sums], modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.modalities, self.scripts = modalities, {"train": train, "val": val}
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.weight * 1.0, **self._output("train", batch_idx)}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self._output("val", batch_idx + dataloader_idx)

    def _output(self, key: str, batch_idx: int) -> dict[str, Any]:
        sums = self.scripts[key][batch_idx]
        return {
            "nll_sum": torch.tensor([nll for nll, _ in sums]),
            "count": torch.tensor([count for _, count in sums]),
            "samples": 2,
            "tokens_nominal": 20,
            "tokens_real": torch.tensor(10 + batch_idx),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches(number: int, seconds: float = 0.0) -> DataLoader[Any]:
    """As many batches, of nothing, each after some seconds."""

    def collate(rows: list[Any]) -> Any:
        time.sleep(seconds)
        return default_collate(rows)

    return DataLoader(TensorDataset(torch.zeros(number)), collate_fn=collate)


def fit(
    folder: Path,
    train: list[Sums],
    val: list[Sums],
    meter: EMASplitPerplexity,
    modalities: tuple[str, ...] = SPLIT,
    accumulate: int = 1,
    sanity: int = 0,
    logger: Any = False,
    others: Sequence[pl.Callback] = (),
    loading: float = 0.0,
) -> list[dict[str, Any]]:
    """Runs the script; the lines that it wrote."""
    trainer = pl.Trainer(
        max_steps=len(train) // accumulate,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if val else 0,
        num_sanity_val_steps=sanity,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*[extra for extra in meter.extras if isinstance(extra, pl.Callback)], meter, *others],
    )
    # Loader number n begins at the n-th script of the validation.
    loaders = [batches(len(val) - number) for number, _ in enumerate(meter.validations)]
    trainer.fit(Scripted(train, val, modalities), batches(len(train), loading), loaders)
    assert meter.file is not None
    return meter.file.read()


def meter_in(folder: Path, interval: int = 1, alpha: float = 0.5) -> EMASplitPerplexity:
    """The callback under test."""
    return EMASplitPerplexity(interval, alpha, folder / "metrics.jsonl")


def test_a_line_and_the_loggers_hold_every_validation_split(tmp_path: Path) -> None:
    splits = ("val/iid", "val/compositional")
    val: list[Sums] = [[(8.0, 4), (6.0, 2), (0.0, 1)], [(3.0, 1), (0.0, 0), (0.5, 1)]]
    meter = EMASplitPerplexity(1, 0.5, tmp_path / "metrics.jsonl", validations=splits)
    logger = TensorBoardLogger(tmp_path)
    written = fit(tmp_path, [[(1.0, 1)] * 3] * 2, val, meter, sanity=-1, logger=logger)
    lines = [line for line in written if "train" not in line]
    assert [line["step"] for line in lines] == [0, 2]
    for line in lines:
        first, second = (line[split] for split in splits)
        assert (first["text"]["nll"], first["all"]["count"]) == (pytest.approx(11 / 5), 9)
        assert (second["text"]["nll"], second["all"]["count"]) == (3.0, 2)
        assert "nll" not in second["image"]
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"{split}/text/nll" for split in splits} | {"val/iid/image/nll", "train/image/nll"} <= tags
    assert "val/compositional/image/nll" not in tags


def test_an_interval_is_the_sum_of_its_micro_batches_not_the_mean_of_their_means(tmp_path: Path) -> None:
    train: list[Sums] = [[(2.0, 1), (6.0, 3), (0.0, 2)], [(30.0, 10), (8.0, 1), (1.0, 2)]] * 2
    first, second = fit(tmp_path, train, [], meter_in(tmp_path), accumulate=2)
    text = first["train"]["text"]
    assert (text["nll_sum"], text["count"]) == (32.0, 11)
    assert text["nll"] == pytest.approx(32 / 11, abs=0)
    assert text["ppl"] == pytest.approx(math.exp(32 / 11), rel=1e-15)
    assert first["train"]["all"]["nll"] == pytest.approx(47 / 19, rel=1e-15)
    assert first["train"]["all_no_boundary"]["nll"] == pytest.approx(46 / 15, rel=1e-15)
    assert [first[name] for name in ("step", "samples", "tokens_nominal", "tokens_real", "lr")] == [1, 4, 40, 21, 0.5]
    assert [second[name] for name in ("step", "samples", "tokens_nominal", "tokens_real")] == [2, 8, 80, 46]
    assert (first["interval"], first["ema"]) == (1, 0.5)


def test_the_average_is_of_losses_bias_corrected_and_only_then_exponentiated(tmp_path: Path) -> None:
    losses, alpha = [5.0, 3.0, 4.0, 1.0], 0.9
    train: list[Sums] = [[(loss * 7, 7), (loss, 1), (0.0, 1)] for loss in losses]
    written = fit(tmp_path, train, [], meter_in(tmp_path, alpha=alpha))
    average = 0.0
    for number, (loss, line) in enumerate(zip(losses, written, strict=True), start=1):
        average = alpha * average + (1 - alpha) * loss
        expected = average / (1 - alpha**number)
        assert line["train"]["text"]["nll_ema"] == pytest.approx(expected, rel=1e-12)
        assert line["train"]["text"]["ppl_ema"] == pytest.approx(math.exp(expected), rel=1e-12)
    assert written[0]["train"]["text"]["nll_ema"] == pytest.approx(5.0)


def test_intervals_count_optimizer_steps(tmp_path: Path) -> None:
    train: list[Sums] = [[(1.0, 1)] * 3] * 12
    written = fit(tmp_path, train, [], meter_in(tmp_path, interval=2), accumulate=2)
    assert [line["step"] for line in written] == [2, 4, 6]
    assert {line["train"]["text"]["count"] for line in written} == {4}


def test_a_modality_without_targets_has_no_loss_and_keeps_its_average(tmp_path: Path) -> None:
    train: list[Sums] = [[(4.0, 2), (3.0, 1), (1.0, 1)], [(0.0, 0), (3.0, 1), (1.0, 1)], [(8.0, 2), (3.0, 1), (1.0, 1)]]
    one, two, three = (line["train"] for line in fit(tmp_path, train, [], meter_in(tmp_path)))
    assert two["text"] == {"nll_sum": 0.0, "count": 0}
    assert two["all"]["nll"] == pytest.approx(2.0)
    # The second update of text's average is the third interval's.
    assert three["text"]["nll_ema"] == pytest.approx((0.5 * 0.5 * 2 + 0.5 * 4) / (1 - 0.5**2))
    assert one["text"]["nll_ema"] == pytest.approx(2.0)


def test_a_loss_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    train: list[Sums] = [[(4.0, 2), (float("inf"), 1), (1.0, 1)], [(2.0, 2), (3.0, 1), (float("nan"), 5)]]
    (line,) = fit(tmp_path, train, [], meter_in(tmp_path), accumulate=2)
    assert line["train"]["text"] == pytest.approx(line["train"]["text"] | {"nll_sum": 6.0, "count": 4})
    assert (line["train"]["image"]["nll"], line["train"]["image"]["nonfinite"]) == (3.0, 1)
    assert (line["train"]["boundary"]["nll"], line["train"]["boundary"]["nonfinite"]) == (1.0, 1)
    assert line["train"]["all"]["nonfinite"] == 2
    assert "nonfinite" not in line["train"]["text"]


def test_scalars_that_are_not_finite_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"distil_kl": float("nan"), "gradient_cosine": 0.5, "other": float("inf")}
    monkeypatch.setattr(Scripted, "scalars", lambda _: values, raising=False)
    (line,) = fit(tmp_path, [[(1.0, 1)] * 3], [], meter_in(tmp_path))
    assert line["scalars"] == {"gradient_cosine": 0.5}


def test_a_loss_too_high_for_exp_is_written_all_the_same(tmp_path: Path) -> None:
    (line,) = fit(tmp_path, [[(1e6, 1)] * 3], [], meter_in(tmp_path))
    assert line["train"]["text"]["nll"] == 1e6
    assert math.isfinite(line["train"]["text"]["ppl"])


def test_text_alone_has_no_aggregates(tmp_path: Path) -> None:
    (line,) = fit(tmp_path, [[(6.0, 3)]], [], meter_in(tmp_path), modalities=("text",))
    assert list(line["train"]) == ["text"]


def test_validation_sums_the_whole_set_at_its_step_with_tokens_up_to_date(tmp_path: Path) -> None:
    train: list[Sums] = [[(1.0, 1)] * 3] * 5
    val: list[Sums] = [[(2.0, 1), (0.0, 1), (1.0, 1)], [(1.0, 3), (5.0, 4), (1.0, 1)]]
    written = fit(tmp_path, train, val, meter_in(tmp_path, interval=3), sanity=-1)
    validations = [line for line in written if "val" in line]
    assert [line["step"] for line in validations] == [0, 2, 4]
    # Between two ends of logging intervals: 4 steps have been seen, the last interval ended at 3.
    assert [line["tokens_nominal"] for line in validations] == [0, 40, 80]
    assert [line["tokens_real"] for line in validations] == [0, 21, 46]
    for line in validations:
        assert line["val"]["text"] == {"nll_sum": 3.0, "count": 4, "nll": 0.75, "ppl": math.exp(0.75)}
        assert line["val"]["all"]["count"] == 11


def test_a_partial_sanity_check_writes_nothing(tmp_path: Path) -> None:
    train, val = [[(1.0, 1)] * 3] * 2, [[(1.0, 1)] * 3] * 2
    written = fit(tmp_path, train, val, meter_in(tmp_path), sanity=1)
    assert [line["step"] for line in written if "val" in line] == [2]


LATE = (("train", "nll_ema"), ("val", "nll"))


def test_tensorboard_gets_stable_tags_against_tokens(tmp_path: Path) -> None:
    train, val = [[(2.0, 1), (3.0, 1), (1.0, 1)]] * 4, [[(1.0, 1)] * 3]
    logger = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    fit(tmp_path, train, val, meter_in(tmp_path), logger=logger)
    read = EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = set(read.Tags()["scalars"])
    losses = {f"train/{name}/{field}" for name in ("text", "image", "all") for field in ("nll", "nll_ema", "ppl_ema")}
    losses |= {"train/boundary/nll", *(f"val/{name}/nll" for name in ("text", "image", "boundary", "all"))}
    late = {f"late/{key}/{name}/{field}" for key, field in LATE for name in ("text", "image", "all")}
    assert tags == losses | late | {"optim/lr"}
    assert [event.step for event in read.Scalars("train/text/ppl_ema")] == [20, 40, 60, 80]
    assert [event.step for event in read.Scalars("val/image/nll")] == [40, 80]


def test_late_losses_leave_out_the_start_and_prefixes_tell_tasks_apart() -> None:
    values = {"train": {"text": {"nll": 2.0, "nll_ema": 3.0, "ppl_ema": 20.0, "ppl": 7.4}}}
    assert loss_tags(values, share=0.1) == {
        "train/text/nll": 2.0,
        "train/text/nll_ema": 3.0,
        "train/text/ppl_ema": 20.0,
    }
    late = loss_tags(values, "align/", 0.2)
    assert late["align/late/train/text/nll_ema"] == 3.0
    assert all(tag.startswith("align/") for tag in late)


@pytest.mark.parametrize(
    ("interval", "alpha", "named"), [(0, 0.9, "interval=0"), (1, 1.0, "alpha=1.0"), (1, -1, "alpha=-1")]
)
def test_a_value_out_of_range_is_refused_by_name(interval: int, alpha: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EMASplitPerplexity(interval, alpha)


def test_a_module_without_modalities_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Scripted.modalities=\(\)"):
        fit(tmp_path, [[(1.0, 1)]], [], meter_in(tmp_path), modalities=())


class Images(pl.LightningModule):
    """Reports scalars of its own, for batches of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        value = torch.tensor(float(batch_idx))
        return {"loss": self.weight * 1.0, "metrics": {"l1": value, "mse": value**2}, "samples": 1 + batch_idx}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def validation_summary(self, dataloader_idx: int = 0) -> dict[str, float]:
        return {"psnr": 20.0 + dataloader_idx}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_scalars_are_means_over_samples_and_count_them(tmp_path: Path) -> None:
    meter = RunScalars(2, tmp_path / "metrics.jsonl")
    trainer = pl.Trainer(
        max_steps=4,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[meter],
    )
    trainer.fit(Images(), batches(4), batches(1))
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["samples"]) for line in written] == [(0, 0), (2, 3), (3, 6), (4, 10)]
    assert written[1]["train"] == {"l1": pytest.approx(2 / 3), "mse": pytest.approx(2 / 3)}
    assert written[3]["train"] == {"l1": pytest.approx(18 / 7), "mse": pytest.approx(48 / 7)}
    assert written[0]["val"] == written[2]["val"] == {"psnr": 20.0}


def test_scalars_are_summarized_by_validation_split(tmp_path: Path) -> None:
    meter = RunScalars(1, tmp_path / "metrics.jsonl", ["val/iid", "val/compositional"])
    options: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", num_sanity_val_steps=-1, callbacks=[meter], **options)
    trainer.fit(Images(), batches(1), [batches(1), batches(2)])
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["val/iid"], first["val/compositional"]) == ({"psnr": 20.0}, {"psnr": 21.0})
