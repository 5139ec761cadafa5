"""The time of a training step, before any run is finished."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t2i_lm.config.load import load_experiment
from t2i_lm.training import step_time
from t2i_lm.training.step_time import STEPS, step_seconds, steps_in_all
from tests.test_docs import EXPERIMENTS


@pytest.mark.parametrize("name", ["t2i_scratch", "uncond_scratch"])
def test_a_step_is_timed_in_micro_batches(name: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*tiny, "trainer.accumulate_grad_batches=2"]
    config = load_experiment(EXPERIMENTS / f"{name}.yaml", "demo", words)
    shapes: list[torch.Size] = []
    module = getattr(step_time, "TextToImageModule" if name == "t2i_scratch" else "UnconditionalImageModule")
    sums = module.sums

    def recorded(self: Any, ids_BT: torch.Tensor) -> Any:
        shapes.append(ids_BT.shape)
        return sums(self, ids_BT)

    monkeypatch.setattr(module, "sums", recorded)
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])  # 9 s of the first step, then 2, 1 and 4
    monkeypatch.setattr(step_time, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert step_seconds(config) == 2.0
    assert len(shapes) == 2 * (1 + STEPS)
    assert {shape[0] for shape in shapes} == {config.data.batch_size // 2}


def test_other_tasks_and_large_models_are_not_timed(tiny: list[str]) -> None:
    assert step_seconds(load_experiment(EXPERIMENTS / "align.yaml", "demo", tiny)) is None
    config = load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", tiny)
    large = replace(config, data=replace(config.data, batch_size=2**20))
    assert step_seconds(large) is None


def test_validations_are_forward_passes_of_all_sets() -> None:
    words = ["trainer.max_steps=400", "trainer.val_check_interval=100", "data.val_size=480", "data.batch_size=16"]
    config = load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", words)
    assert steps_in_all(config) == 400 + 5 * 2 * 30 / 3, "before training and four times, iid and compositional"
    one_set = replace(config, data=replace(config.data, hold_out_pairs=False))
    assert steps_in_all(one_set) == 400 + 5 * 30 / 3
