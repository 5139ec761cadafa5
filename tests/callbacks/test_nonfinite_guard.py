"""A step with a non-finite gradient changes no parameter and no moment, on any rank, and is logged."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks import EventLog, NonFiniteGuard
from tests.callbacks.toy_model import Toy, ToyModule
from tests.callbacks.toy_run import EVENTS, build, finish, free_port, lines, run_to_end, samples_after, start

pytestmark = pytest.mark.slow


class FusedToy(ToyModule):
    """With the optimizer whose kernel can skip by itself."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, fused=True)


def parameters_by_step(folder: Path) -> list[str]:
    """The bits of the parameters after each step."""
    return [record["witness"]["parameters"] for record in lines(folder) if "witness" in record]


def assert_skipped(folder: Path, skipped: list[int]) -> None:
    """Steps (counted from 0) in `skipped`, and no others, left the parameters alone."""
    after = parameters_by_step(folder)
    unchanged = [step for step in range(1, len(after)) if after[step] == after[step - 1]]
    assert unchanged == skipped


def test_a_skipped_step_changes_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, harm={"nan_at": [9, 10, 15]})) == 0
    assert_skipped(tmp_path, [9, 10, 15])
    assert EventLog(tmp_path / EVENTS).counts() == {"non-finite-gradient": 3}
    text = EventLog(tmp_path / EVENTS).read()[-1][2]
    assert text.startswith("step 16 skipped, gradient not finite, by the loss nan of rank 0; 3 in the run; samples ")
    assert text.split("samples ")[1].split(", ") == samples_after(Toy(tmp_path), 15)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_skip_together_when_one_has_a_nan(tmp_path: Path, rank: int) -> None:
    port = free_port()
    harm = {"nan_at": [9], "on_rank": rank}
    ranks = [start(Toy(tmp_path, rank=number, world=2, port=port, harm=harm)) for number in range(2)]
    assert finish(*ranks) == [0, 0]
    assert_skipped(tmp_path, [9])
    assert EventLog(tmp_path / EVENTS).counts() == {"non-finite-gradient": 1}
    names_mine(tmp_path, rank)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_skip_a_spike_together_and_a_resumed_run_the_same(tmp_path: Path, rank: int) -> None:
    harm = {"spike_at": [9, 12], "on_rank": rank}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder, more in (
        (whole, {}),
        (killed, {"signal_in": "step", "at_step": 11, "signal": signal.SIGTERM, "ranks": [1]}),
        (killed, {}),
    ):
        port = free_port()
        ranks = [start(Toy(folder, rank=number, world=2, port=port, harm=harm | more)) for number in range(2)]
        assert finish(*ranks) == ([143, 143] if more else [0, 0])
    assert_skipped(whole, [9, 12])
    assert EventLog(whole / EVENTS).counts() == {"loss-spike": 2}
    names_mine(whole, rank)
    assert lines(killed) == lines(whole)


def names_mine(folder: Path, rank: int) -> None:
    """The event of step 10 names the samples of a rank in both micro-batches, and no others."""
    (text,) = [text for _, _, text in EventLog(folder / EVENTS).read() if "step 10 skipped" in text]
    assert f" of rank {rank}; " in text
    batch = samples_after(Toy(folder), 9)
    assert text.split("samples ")[1].split(", ") == batch[2 * rank : 2 * rank + 2] + batch[2 * rank + 4 : 2 * rank + 6]


def test_a_run_that_only_skips_stops_with_advice(tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, harm={"nan_at": [9, 10, 12, 13, 14, 15]})) == 1
    assert "not finite in 3 steps in a row (step 15)" in (tmp_path / "output.txt").read_text()
    assert len(parameters_by_step(tmp_path)) == 14, "the step that stops the run is written by no one"


@pytest.mark.parametrize("on_device", [False, True], ids=["no gradients", "found_inf"])
def test_both_ways_of_skipping_leave_moments_and_their_clock_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    monkeypatch.setattr(NonFiniteGuard, "skips_on_device", staticmethod(lambda flag, optimizer: on_device))
    toy = Toy(tmp_path, steps=6, plain=True, harm={"nan_at": [2, 5]})
    trainer, _, data = build(toy)
    module = FusedToy(toy)
    trainer.fit(module, data)
    assert_skipped(tmp_path, [2, 5])
    (optimizer,) = trainer.optimizers
    for state in optimizer.state.values():
        assert int(state["step"]) == 4
        assert state["exp_avg"].isfinite().all()
        assert state["exp_avg_sq"].isfinite().all()
    assert not hasattr(optimizer, "found_inf")
    (guard,) = [callback for callback in trainer.callbacks if isinstance(callback, NonFiniteGuard)]  # type: ignore[attr-defined]
    assert guard.skipped == 2


def test_a_run_that_only_spikes_stops_with_advice(tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, harm={"spike_at": range(12, 20)})) == 1
    printed = (tmp_path / "output.txt").read_text()
    assert "the loss was above 10 times its average in 3 steps in a row (step 15)" in printed
    assert "--allow-mismatch trainer.skip_loss_above" in printed


def test_both_ways_of_skipping_give_the_same_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for on_device in (False, True):
        monkeypatch.setattr(NonFiniteGuard, "skips_on_device", staticmethod(lambda *_, way=on_device: way))
        toy = Toy(tmp_path / str(on_device), steps=6, plain=True, harm={"nan_at": [2]})
        toy.folder.mkdir()
        trainer, _, data = build(toy)
        trainer.fit(FusedToy(toy), data)
        runs.append(parameters_by_step(toy.folder))
    assert runs[0] == runs[1]


def test_skips_are_told_when_a_run_is_saved_though_a_gpu_is_looked_at_rarely(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.log")
    guard = NonFiniteGuard(3, events=events)
    guard._seen = [(4, torch.tensor([1.0, 0.0, 0.0, float("nan")]))]
    trainer = SimpleNamespace(is_global_zero=True, world_size=1)
    guard.on_save_checkpoint(trainer, None, {})
    assert events.counts() == {"non-finite-gradient": 1}
    assert guard._seen == []
    guard._seen = [(5, torch.tensor([0.0, 1.0, 2.0, 9.0]))]
    guard.on_save_checkpoint(trainer, None, {})
    assert guard._tell(trainer), "the next look still knows that it was a spike"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([1.0] * 3, "parameters are those before them"), ([1.0] * 3 + [0.0], "later steps have changed the parameters")],
    ids=["at once", "a step later"],
)
def test_an_error_says_whether_steps_followed_the_skips(flags: list[float], expected: str) -> None:
    """On a GPU, which is looked at rarely."""
    guard = NonFiniteGuard(limit=3)
    for flag in flags:
        guard._count(torch.tensor([flag]))
    trainer: Any = SimpleNamespace(global_step=50, is_global_zero=True, world_size=1)
    with pytest.raises(FloatingPointError, match=rf"in 3 steps in a row \(step 50\); {expected}\. Continue at"):
        guard.on_train_batch_end(trainer, ToyModule(Toy(Path())), None, None, 0)


def test_counts_survive_a_resumption() -> None:
    guard, again = NonFiniteGuard(), NonFiniteGuard()
    for flag in (1.0, 0.0, 1.0, 1.0):
        guard._count(torch.tensor([flag]))
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()
    assert again.state_dict()["counts"] == [3, 2, 2]
    assert again.skipped == 3


def test_a_run_that_was_stopped_for_its_skips_goes_on_at_another_rate() -> None:
    guard = NonFiniteGuard(limit=2)
    guard.load_state_dict({"counts": [7, 1, 2]})  # of an earlier version, without an average
    assert guard.state_dict()["counts"] == [7, 0, 0]


@pytest.mark.parametrize("name", ["limit", "check_every"])
def test_a_number_out_of_range_is_refused_by_name(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        NonFiniteGuard(**options)
