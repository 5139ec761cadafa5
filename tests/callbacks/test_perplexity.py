import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks import EMASplitPerplexity, MetricsFile

MODULE: Any = SimpleNamespace(modalities=("text", "image", "boundary"))


def trainer(step: int) -> Any:
    return SimpleNamespace(global_step=step, is_global_zero=True, loggers=[], optimizers=[], sanity_checking=False)


def output(text: float, text_count: int) -> dict[str, Any]:
    return {
        "nll_sum": torch.tensor([text, 20.0, 1.0], dtype=torch.float64),
        "count": torch.tensor([text_count, 10, 5]),
        "samples": 2,
        "tokens_nominal": 40,
        "tokens_real": torch.tensor(15 + text_count),
    }


def test_sums_are_divided_once(tmp_path: Path) -> None:
    meter = EMASplitPerplexity(2, 0.9, tmp_path / "metrics.jsonl")
    for step, (text, count) in enumerate([(6.0, 3), (10.0, 1)], start=1):
        meter.on_train_batch_end(trainer(step), MODULE, output(text, count), None, step)
    (record,) = MetricsFile(tmp_path / "metrics.jsonl").read()
    # 16 nats over 4 tokens, not the mean of 2 and 10.
    assert record["train"]["text"]["nll"] == 4.0
    assert record["train"]["all_no_boundary"] == pytest.approx(
        {"nll_sum": 56.0, "count": 24}
        | {key: record["train"]["all_no_boundary"][key] for key in ("nll", "ppl", "nll_ema", "ppl_ema")}
    )
    assert record["samples"] == 4
    assert record["tokens_nominal"] == 80
    assert record["tokens_real"] == 34


def test_an_interval_without_text_leaves_its_average_alone(tmp_path: Path) -> None:
    meter = EMASplitPerplexity(1, 0.9, tmp_path / "metrics.jsonl")
    meter.on_train_batch_end(trainer(1), MODULE, output(6.0, 3), None, 0)
    meter.on_train_batch_end(trainer(2), MODULE, output(0.0, 0), None, 1)
    meter.on_train_batch_end(trainer(3), MODULE, output(3.0, 1), None, 2)
    first, second, third = (record["train"]["text"] for record in MetricsFile(tmp_path / "metrics.jsonl").read())
    assert first["nll_ema"] == 2.0
    assert "nll" not in second
    assert third["nll_ema"] == pytest.approx((0.9 * 0.1 * 2 + 0.1 * 3) / (1 - 0.81))


def test_the_state_goes_through_a_checkpoint_mid_interval(tmp_path: Path) -> None:
    whole = EMASplitPerplexity(3, 0.9, tmp_path / "whole.jsonl")
    first = EMASplitPerplexity(3, 0.9, tmp_path / "parts.jsonl")
    for step in range(1, 5):
        for meter in (whole, first):
            meter.on_train_batch_end(trainer(step), MODULE, output(step, step), None, step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = EMASplitPerplexity(3, 0.9, tmp_path / "parts.jsonl")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(5, 10):
        for meter in (whole, second):
            meter.on_train_batch_end(trainer(step), MODULE, output(step, step), None, step)
    ours, theirs = (
        [{k: v for k, v in record.items() if k != "time"} for record in MetricsFile(tmp_path / name).read()]
        for name in ("parts.jsonl", "whole.jsonl")
    )
    assert ours == theirs
    assert len(ours) == 3


def test_saving_does_not_disturb_the_interval() -> None:
    meter = EMASplitPerplexity(2)
    meter.on_train_batch_end(trainer(1), MODULE, output(6.0, 3), None, 0)
    before = meter.state_dict()
    assert torch.equal(meter.state_dict()["nll_sum"], before["nll_sum"])


@pytest.mark.parametrize(("interval", "alpha"), [(0, 0.9), (1, 1.0), (1, -0.1)])
def test_wrong_settings_are_refused(interval: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        EMASplitPerplexity(interval, alpha)


def test_a_torn_line_and_later_steps_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (2, 4, 6):
        file.append({"step": step})
    path.write_text(path.read_text() + '{"step": 8, "tr')
    file.cut_after(4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
