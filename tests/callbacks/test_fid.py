"""The callback: one rank equals two, sums and network stay out of the module, a stop gives the measurement up."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from callbacks import CocoFID, FidTask, Inception
from tests.callbacks.toy_run import finish, free_port, server

DRAWN, REAL = 23, 17


def pictures(numbers: Sequence[int], shift: int) -> Tensor:
    """Smooth pictures (B, 3, 32, 32), each a function of its number."""
    found = []
    for number in numbers:
        draw = torch.Generator().manual_seed(1000 * shift + number)
        small = torch.randint(0, 200 + shift, (1, 3, 4, 4), generator=draw).float()
        found.append(torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear"))
    return torch.cat(found).to(torch.uint8)


def reference(network: Inception, rank: int, world: int) -> Iterator[tuple[Sequence[int], Tensor]]:
    for start in range(4 * rank, REAL, 4 * world):
        numbers = range(start, min(REAL, start + 4))
        yield numbers, network(pictures(numbers, 50))


def callback(weights: Path, prompts: int = DRAWN, **options: Any) -> CocoFID:
    task = FidTask(prompts, lambda numbers: pictures(numbers, 0), reference, {"title": "FID"}, batch=4)
    return CocoFID(1, task, Inception(weights, 64), **options)


def rank_of_two(rank: int, port: int, weights: Path, out: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=2)
    torch.save(callback(weights).measure(trainer, torch.device("cpu")), out / str(rank))
    dist.destroy_process_group()


def test_one_rank_equals_two(inception_weights: Path, tmp_path: Path) -> None:
    port = free_port()
    ranks = [server.Process(target=rank_of_two, args=(rank, port, inception_weights, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    alone = callback(inception_weights)
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    one = alone.measure(trainer, torch.device("cpu"))
    assert one is not None
    assert one == alone.measure(trainer, torch.device("cpu"))  # the reference is kept, what was drawn is not
    assert finish(*ranks) == [0, 0]
    for rank in range(2):
        two = torch.load(tmp_path / str(rank), weights_only=True)
        assert two["n"] == DRAWN
        for name in ("fid", "kid"):
            assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert one["fid"] > 0


def test_a_run_that_is_asked_to_stop_gives_it_up(inception_weights: Path) -> None:
    answers = iter([False, True])
    preemption: Any = SimpleNamespace(asked=lambda: next(answers))
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    assert callback(inception_weights, preemption=preemption).measure(trainer, torch.device("cpu")) is None
    with pytest.raises(StopIteration):
        next(answers)


def test_senseless_values_are_named(inception_weights: Path) -> None:
    with pytest.raises(ValueError, match="prompts=1"):
        callback(inception_weights, prompts=1)
    task = FidTask(2, lambda numbers: pictures(numbers, 0), reference, {})
    with pytest.raises(ValueError, match="interval=0"):
        CocoFID(0, task, Inception(inception_weights, 64))
