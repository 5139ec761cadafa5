"""The callback: one rank equals several, sums and network stay out of the module, a stop abandons the measurement."""

import json
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks import (
    CocoFID,
    EMASplitPerplexity,
    FidTask,
    Inception,
    Preempted,
    Preemption,
    RngState,
    find_resumable,
    kernel_distance,
)
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.generate import generate
from t2i_lm.tokenizers.layout import Layout
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import CHECKPOINTS, build, finish, free_port, lines, server
from tests.decoders import tiny_decoder as tiny

DRAWN, REAL, CODES = 10, 17, 512


def images(numbers: Sequence[int], shift: int) -> Tensor:
    """Smooth images (B, 3, 32, 32), each a function of its number."""
    found = []
    for number in numbers:
        draw = torch.Generator().manual_seed(1000 * shift + number)
        small = torch.randint(0, 200 + shift, (1, 3, 4, 4), generator=draw).float()
        found.append(torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear"))
    return torch.cat(found).to(torch.uint8)


def reference(network: Inception, rank: int, world: int) -> Iterator[tuple[Sequence[int], Tensor]]:
    for start in range(4 * rank, REAL, 4 * world):
        numbers = range(start, min(REAL, start + 4))
        yield numbers, network(images(numbers, 50))


class Model:
    """Samples after captions of several lengths in bfloat16, where codes depend on the rest of the batch."""

    def __init__(self) -> None:
        self.decoder = tiny("rotary", seq_len=48, hidden_dim=256, n_heads=4)
        self.layout = Layout(expand_vocabulary(self.decoder, CODES, torch.Generator().manual_seed(1)), 16, 48)
        self.decoder.bfloat16()

    def draw(self, numbers: Sequence[int]) -> Tensor:
        """Images (B, 3, 32, 32), whose 16 codes are the grays of their parts."""
        prompts = [torch.from_numpy(self.layout.prompt(np.arange(5 * number % 26))) for number in numbers]
        drawn_BN = generate(self.decoder, self.layout.vocab, prompts, 16, list(numbers))
        gray_B1hw = drawn_BN.view(-1, 1, 4, 4) % 256
        return gray_B1hw.expand(-1, 3, -1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8)


class Diverged(Model):
    """From the prompt on whose number is 4 or more."""

    def draw(self, numbers: Sequence[int]) -> Tensor:
        if max(numbers) >= 4:
            self.decoder.norm.weight.data.fill_(float("nan"))
        return super().draw(numbers)


def callback(
    weights: Path, prompts: int = DRAWN, batch: int = 4, model: type[Model] = Model, **options: Any
) -> CocoFID:
    task = FidTask(prompts, model().draw, reference, lambda: {"title": "FID"}, batch)
    return CocoFID(1, task, Inception(weights, 64), **options)


def one_rank(rank: int, world: int, port: int, weights: Path, out: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo")
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=world)
    torch.save(callback(weights).measure(trainer, torch.device("cpu")), out / str(rank))
    assert callback(weights, model=Diverged).measure(trainer, torch.device("cpu")) is None  # on all ranks
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])  # 3 batches: one rank has two, or none
def test_several_ranks_equal_one(world: int, inception_weights: Path, tmp_path: Path) -> None:
    """With samples after ragged prompts, which another split into batches would change."""
    port = free_port()
    ranks = [
        server.Process(target=one_rank, args=(rank, world, port, inception_weights, tmp_path)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    alone = callback(inception_weights)
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    one = alone.measure(trainer, torch.device("cpu"))
    assert one is not None
    assert one == alone.measure(trainer, torch.device("cpu"))  # the reference is cached, the samples are not
    assert finish(*ranks) == [0] * world
    for rank in range(world):
        other = torch.load(tmp_path / str(rank), weights_only=True)
        assert other["n"] == DRAWN
        for name in ("fid", "kid"):
            assert other[name] == pytest.approx(one[name], rel=1e-6)
    assert one["fid"] > 0
    assert not torch.equal(Model().draw(range(DRAWN)), torch.cat([Model().draw([number]) for number in range(DRAWN)]))


@pytest.mark.slow
def test_the_kernel_distance_is_of_all_reference_images(inception_weights: Path) -> None:
    """As many as `evaluate` uses, not as many as are sampled."""
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    network = Inception(inception_weights, 64)
    found = callback(inception_weights).measure(trainer, torch.device("cpu"))
    assert found is not None
    drawn_BD = torch.cat([network(Model().draw(part.tolist())) for part in torch.arange(DRAWN).split(4)])
    kid, deviation = kernel_distance(drawn_BD, network(images(range(REAL), 50)))
    assert (found["kid"], found["kid_std"]) == pytest.approx((kid, deviation), rel=1e-6)


def test_the_card_is_read_when_it_is_written(inception_weights: Path, tmp_path: Path) -> None:
    """A trainer turns on float8, for one, after the task is set up."""
    fid, state = callback(inception_weights, folder=tmp_path), {"title": "FID", "fp8": False}
    fid.task = replace(fid.task, card=lambda: dict(state))
    state["fp8"] = True
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, loggers=[])
    fid.due(trainer, LightningModule(), 3)
    assert json.loads((tmp_path / "step-00000003.json").read_text())["card"]["fp8"] is True


def test_a_model_that_has_diverged_has_no_fid_and_trains_on(
    inception_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, loggers=[])
    fid = callback(inception_weights, model=Diverged, folder=tmp_path)
    fid.due(trainer, LightningModule(), 3)
    assert fid.latest is None
    assert not list(tmp_path.iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no FID: logits are NaN or infinite: the model has diverged")


def test_a_stop_request_abandons_the_measurement(inception_weights: Path) -> None:
    answers = iter([False, True])
    preemption: Any = SimpleNamespace(asked=lambda: next(answers))
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    assert callback(inception_weights, preemption=preemption).measure(trainer, torch.device("cpu")) is None
    with pytest.raises(StopIteration):
        next(answers)


class Gray:
    """In place of Inception, for tests of when it is asked: 16 brightnesses of an image."""

    width = 16

    def to(self, device: torch.device) -> None:
        """Stays on the CPU."""

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float().mean(dim=1), 4).flatten(1)


def train(toy: Toy, stop_at: int | None = None) -> int:
    """Trains a toy whose FID is measured every second step, from its newest checkpoint; a signal comes amid one."""
    trainer, module, data = build(toy)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    meter, preemption = (
        next(one for one in callbacks if isinstance(one, kind)) for kind in (EMASplitPerplexity, Preemption)
    )

    def sample(numbers: Sequence[int]) -> Tensor:
        step = fid._pending["step"] if fid._pending else trainer.global_step
        if step == stop_at and toy.rank == toy.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return images(numbers, int(module.rows.weight.abs().sum() * 100) % 50)

    network: Any = Gray()
    task = FidTask(DRAWN, sample, reference, lambda: {"title": "FID"}, 4)
    fid = CocoFID(2, task, network, toy.folder / "fid", meter, preemption)
    callbacks.insert(next(place for place, one in enumerate(callbacks) if isinstance(one, RngState)), fid)
    try:
        trainer.fit(module, data, ckpt_path=find_resumable(toy.folder / CHECKPOINTS), weights_only=True)
    except Preempted as stop:
        return stop.exit_code
    return 0


def train_rank(toy: Toy, stop_at: int | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(toy.port), "LOCAL_RANK": str(toy.rank)}
    os.environ |= {"WORLD_SIZE": str(toy.world), "NODE_RANK": "0"}
    os._exit(train(toy, stop_at))


SHORT: dict[str, Any] = {"steps": 10, "val_every": 4, "save_every": 3, "plain": True}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unstopped")
    assert train(Toy(folder, **SHORT)) == 0
    return lines(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("step", [4, 6, 10], ids=["before a validation", "amid the run", "after the last step"])
def test_a_resumed_run_measures_what_was_abandoned_first(
    step: int, unstopped: list[dict[str, Any]], tmp_path: Path
) -> None:
    toy = Toy(tmp_path, **SHORT)
    assert train(toy, stop_at=step) == 143
    assert not (tmp_path / f"fid/step-{step:08d}.json").exists()
    assert train(toy, stop_at=step) == 143  # again, in the session that would make up for it
    assert train(toy) == 0
    assert lines(tmp_path) == unstopped
    assert [line["step"] for line in unstopped if "fid" in line] == [2, 4, 6, 8, 10]
    assert len(list((tmp_path / "fid").iterdir())) == 5


@pytest.mark.slow
def test_ranks_agree_on_what_was_abandoned(tmp_path: Path) -> None:
    for stop_at, code in ((4, 143), (None, 0)):
        port = free_port()
        toys = [Toy(tmp_path, rank=rank, world=2, port=port, **SHORT) for rank in range(2)]
        ranks = [server.Process(target=train_rank, args=(toy, stop_at)) for toy in toys]
        for process in ranks:
            process.start()
        assert finish(*ranks) == [code, code]
    assert [line["step"] for line in lines(tmp_path) if "fid" in line] == [2, 4, 6, 8, 10]


def test_invalid_values_are_refused_by_name(inception_weights: Path) -> None:
    with pytest.raises(ValueError, match="prompts=1"):
        callback(inception_weights, prompts=1)
    task = FidTask(2, lambda numbers: images(numbers, 0), reference, dict)
    with pytest.raises(ValueError, match="interval=0"):
        CocoFID(0, task, Inception(inception_weights, 64))
