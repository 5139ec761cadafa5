"""Frozen groups under FSDP2 on two CPU processes: bitwise unchanged, without gradient or optimizer state."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import t2i_lm.models.padded_rows as padded_rows
from t2i_lm.config.sections import OptimConfig
from t2i_lm.models.freeze import FREEZE_GROUPS, freeze, group_members
from t2i_lm.models.fsdp import blocks_of, shard
from t2i_lm.models.modality_experts import add_modality_experts
from t2i_lm.modules.optim import adamw
from tests.callbacks.toy_run import finish, server
from tests.models.test_freeze import expanded

STEPS = 2


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ids_BT = torch.arange(24).view(2, 12) + rank
    unsharded = expanded().loss(ids_BT[:, :-1], ids_BT[:, 1:]).total.item()
    padded_rows.DEVICES.add("cpu")  # as on CUDA: rows of zeros beside the gathered ones
    changed: dict[str, dict[str, bool]] = {}
    for group in FREEZE_GROUPS:
        decoder = expanded()
        freeze(decoder, [group])
        before = {name: value.detach().clone() for name, value in decoder.named_parameters()}
        shard(decoder, init_device_mesh("cpu", (2,)))
        optimizer = adamw(list(decoder.named_parameters()), OptimConfig(weight_decay=0.5, lr=1e-2))
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total
            assert step or loss.item() == pytest.approx(unsharded, rel=1e-6)
            loss.backward()
            optimizer.step()
        frozen = group_members(decoder, group).keys()
        for name, parameter in decoder.named_parameters():
            held = parameter.grad is not None or parameter in optimizer.state
            assert held != (name in frozen), (group, name)
        changed[group] = {
            name: not torch.equal(whole(value), before[name]) for name, value in decoder.named_parameters()
        }
    with_experts(rank)
    if rank == 0:
        torch.save(changed, Path(folder) / "changed.pt")
    dist.barrier()
    dist.destroy_process_group()


def with_experts(rank: int) -> None:
    """Modality experts: the loss of the whole model, also on a rank whose batch is text alone."""
    ids_BT = torch.arange(24).view(2, 12) * (3 if rank else 1)
    decoder = add_modality_experts(expanded(), first_image=54)
    freeze(decoder, ["text_expert"])
    expected = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total.item()
    shard(decoder, init_device_mesh("cpu", (2,)))
    loss = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    text = group_members(decoder, "text_expert").keys()
    assert {name for name, value in decoder.named_parameters() if value.grad is None} == text


@pytest.mark.slow
def test_every_frozen_group_is_bitwise_unchanged_when_sharded(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [server.Process(target=worker, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    assert finish(*ranks, timeout=120) == [0, 0]
    changed = torch.load(tmp_path / "changed.pt")
    assert set(changed) == set(FREEZE_GROUPS)
    for group, moved in changed.items():
        frozen = set(group_members(expanded(), group))
        assert {name for name, moves in moved.items() if not moves} == frozen, group


def test_blocks_are_listed() -> None:
    assert len(blocks_of(expanded())) == 4
    with pytest.raises(ValueError, match="no list of blocks"):
        blocks_of(torch.nn.Linear(1, 1))
