"""Sharded runs on two CPU processes: the losses and the checkpoints of an unsharded run, in either direction."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.train import main
from tests.collectives import count_reductions, note_timeouts
from tests.marks import needs_torchs
from tests.runs import PRETRAINED, QUICK, same_losses, weights, without_newest
from tests.two_ranks import train_on_two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("two")
    # Packed, too: neither changes a loss.
    return train_on_two_ranks(PRETRAINED, root, *tiny, *QUICK, "trainer.strategy=fsdp2", "trainer.packing=true")


def test_two_shards_equal_one_process(pretrained: Run, two: Run) -> None:
    same_losses(two, pretrained, 1e-6)
    assert two.report is not None
    for name, value in weights(pretrained).items():
        assert torch.allclose(weights(two)[name], value, atol=1e-5), name


@needs_torchs
def test_torchs_own_loss_trains_the_same_in_shards(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    own = ["trainer.strategy=fsdp2", "loss.backend=torch"]
    same_losses(train_on_two_ranks(PRETRAINED, tmp_path, *tiny, *QUICK, *own), pretrained, 1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_micro_batches_of_a_step_are_reduced_together(
    pretrained: Run, tiny: list[str], tmp_path: Path, strategy: str
) -> None:
    file, root = tmp_path / "reductions.json", tmp_path / "runs"
    changes = [*QUICK, f"trainer.strategy={strategy}", "trainer.accumulate_grad_batches=4"]
    run = train_on_two_ranks(PRETRAINED, root, *tiny, *changes, around=partial(count_reductions, file))
    same_losses(run, pretrained, 1e-6)
    counts = json.loads(file.read_text())
    assert [count > 0 for count in counts] == [False, False, False, True] * 8


def test_two_nodes_that_hold_copies_equal_one_process(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    """A mesh (2, 1): a node is one process, the whole model its shard."""
    changes = [*QUICK, "trainer.strategy=hsdp", "trainer.accumulate_grad_batches=2"]
    file = tmp_path / "timeouts.json"
    run = train_on_two_ranks(PRETRAINED, tmp_path, *tiny, *changes, nodes=2, around=partial(note_timeouts, file))
    same_losses(run, pretrained, 1e-6)
    assert json.loads(file.read_text()) == [1980.0] * 2  # not torch's own
    for name, value in weights(pretrained).items():
        assert torch.allclose(weights(run)[name], value, atol=1e-5), name


def test_shards_go_on_from_a_whole_runs_checkpoint(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    folder = without_newest(pretrained, tmp_path)
    changes = ["--resume", str(folder), "trainer.strategy=hsdp", f"data.cache_dir={tiny[3].split('=')[1]}"]
    same_losses(train_on_two_ranks(PRETRAINED, tmp_path, *changes), pretrained, 1e-6)


def test_a_whole_run_goes_on_from_shards(two: Run, tmp_path: Path) -> None:
    folder = without_newest(two, tmp_path)
    assert main([PRETRAINED, "--resume", str(folder), "trainer.devices=1", "trainer.strategy=auto"]) == 0
    same_losses(read_run(folder), two, 1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=muon"], "needs whole matrices"),
        (["task=align"], "is small and not sharded"),
        (["optim.l2_sp=0.1"], "optim.l2_sp needs the whole model"),
        (["distil.weight=1"], "distil.weight needs the whole model"),
    ],
)
def test_unsupported_combinations_are_refused(
    overrides: list[str], message: str, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PRETRAINED, *tiny, "trainer.strategy=fsdp2", *overrides]) == 2
    assert message in capsys.readouterr().err
