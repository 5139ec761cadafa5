"""The codebook of an image tokenizer in training: its first entries, and those that replace unused ones."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.cluster.vq import kmeans2
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig, VQModelConfig
from t2i_lm.modules import image_tokenizer
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule, spread_out
from t2i_lm.tokenizers.vq import PatchedVQ
from tests.callbacks.toy_run import finish, free_port, server

MODEL = VQModelConfig(block_out_channels=[16, 16], codes=16, code_dim=4)


def of_steps(steps: int, warmup_fraction: float = 0.4) -> ImageTokenizerModule:
    torch.manual_seed(0)
    settings = ImageTokenizerConfig(model=MODEL, warmup_fraction=warmup_fraction)
    config = ExperimentConfig(task="image_tokenizer", init="random", image_tokenizer=settings)
    trainer, optim = replace(config.trainer, max_steps=steps), replace(config.optim, warmup_steps=0)
    return ImageTokenizerModule(PatchedVQ(MODEL), replace(config, trainer=trainer, optim=optim))


@pytest.fixture
def module() -> ImageTokenizerModule:
    made = of_steps(1000)
    made.recent.normal_()
    return made


def test_seeds_are_those_of_scipy() -> None:
    points_NE = np.random.default_rng(0).normal(size=(500, 4))
    theirs, _ = kmeans2(points_NE, 40, minit="++", rng=7)
    ours, _ = kmeans2(points_NE, spread_out(points_NE, 40, 7), minit="matrix")
    assert np.array_equal(ours, theirs)


def test_unused_codes_become_finite_latents(module: ImageTokenizerModule) -> None:
    """Also after a step that was skipped because its latents were not finite."""
    module.recent[:1000] = float("nan")
    module.recent[1000:2000] = float("inf")
    before = module.model.codebook.clone()
    module.used[:10] = 1
    module._restart_unused()
    assert torch.equal(module.model.codebook[:10], before[:10])
    finite = module.recent[2000:]
    assert all((finite == code).all(dim=1).any() for code in module.model.codebook[10:])
    assert not module.used.any()


@pytest.mark.parametrize("harm", [float("nan"), float("inf"), None])
def test_ranks_of_other_latents_take_part_in_a_restart(
    harm: float | None, module: ImageTokenizerModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one has latents to choose from must not decide whether it joins the broadcast."""
    calls = []

    def broadcast(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor

    monkeypatch.setattr(image_tokenizer, "_from_rank_zero", broadcast)
    if harm is None:
        module.recent.copy_(module.model.codebook[0].expand_as(module.recent))  # no distance to a code
    else:
        module.recent.fill_(harm)
    module._restart_unused()
    assert len(calls) == 1
    assert module.model.codebook.isfinite().all()


def saved(module: ImageTokenizerModule, step: int = 0) -> dict[str, Any]:
    """A checkpoint of a step, as Lightning collects and the module completes it."""
    checkpoint = {"global_step": step, "state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [
        (41, 100, 40),
        (41, 400, 40),  # quantized, and stays so
        (41, 60, 40),
        (40, 400, 160),  # k-means would be in the next step
        (20, 400, 160),
        (40, 60, 40),  # at once, since 24 is past
        (30, 60, 30),
    ],
)
def test_another_number_of_steps_leaves_a_run_in_its_phase(step: int, steps: int, expected: int) -> None:
    resumed = of_steps(steps)
    resumed.on_load_checkpoint(saved(of_steps(100), step))
    assert resumed.quantize_from == expected


@pytest.mark.parametrize("step", [12, 80])
def test_a_checkpoint_of_an_earlier_version_is_resumed_as_before(step: int) -> None:
    checkpoint = saved(of_steps(100), step)
    del checkpoint["quantize_from"]
    resumed = of_steps(100)
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    assert resumed.quantize_from == 40


def test_a_checkpoint_inside_a_step_is_that_of_its_start() -> None:
    """The step is repeated: its latents would be counted twice, and its k-means begin from another codebook."""
    module = of_steps(100, warmup_fraction=0.0)
    batch = {"images_BCHW": torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.on_train_batch_start(batch, 0)
    module.training_step(batch, 0)
    assert not torch.equal(module.model.codebook, before["model.vq.quantize.embedding.weight"])
    inside, after = saved(module, 0)["state_dict"], saved(module, 1)["state_dict"]
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {"recent", "used", "model.vq.quantize.embedding.weight"}
    assert all(torch.equal(inside[name], before[name]) for name in before)


def one_rank(rank: int, port: int, out: Path) -> None:
    """Saves the codes that the first re-seeding replaces, of a run and of one that was saved and resumed."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    replaced = []
    for is_resumed in (False, True):
        module = of_steps(1000)
        trainer: Any = SimpleNamespace(global_rank=rank, global_step=500)
        module._trainer = trainer
        module.recent.normal_(generator=torch.Generator().manual_seed(3))
        module.used[8 * rank : 8 * rank + 6] = 1  # each rank has codes of its own
        if is_resumed:
            checkpoint = [saved(module, 500)]
            dist.broadcast_object_list(checkpoint)  # ranks load the file of rank 0
            module.on_load_checkpoint(checkpoint[0])
            module.load_state_dict(checkpoint[0]["state_dict"])
        before = module.model.codebook.detach().clone()
        module._restart_unused()
        replaced.append((module.model.codebook != before).any(dim=1).nonzero()[:, 0].tolist())
    torch.save(replaced, out / str(rank))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_resumed_run_replaces_no_code_that_another_rank_used(tmp_path: Path) -> None:
    port = free_port()
    ranks = [server.Process(target=one_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert finish(*ranks) == [0, 0]
    assert all(torch.load(tmp_path / str(rank)) == [[6, 7, 14, 15]] * 2 for rank in range(2))
