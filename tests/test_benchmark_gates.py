"""Gates of the benchmarks: contenders that disagree are not timed."""

from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import fid, generate, head, loader, peers, rounds, train_step, trainer_overhead


@pytest.mark.parametrize("module", [train_step, generate])
def test_other_weights_are_not_timed(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = peers.copy_weights

    def copy_wrongly(decoder: Any, peer: peers.Peer) -> None:
        copy(decoder, peer)
        peer.model.model.layers[1].mlp.down_proj.weight.data[3].mul_(1.5)

    monkeypatch.setattr(peers, "copy_weights", copy_wrongly)
    assert module.main(["--quick", "--rounds", "1", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "transformers: logits differs" in err
    assert "not timed" in err


def test_other_gradients_are_not_timed() -> None:
    """A peer whose logits are equal and whose gradients are not: what a padding row of its embedding does."""
    shape = peers.SHAPES["tiny"]
    decoder, vocab = peers.build_decoder(shape, "cpu")
    llama = peers.build_llama(shape, vocab, "cpu")
    peers.copy_weights(decoder, llama)
    ids_BT = torch.arange(24).view(2, 12)
    train_step.check_peer(decoder, llama, ids_BT, ids_BT)
    llama.model.model.embed_tokens.padding_idx = 5
    with pytest.raises(rounds.GateError, match=r"gradient of model\.embed_tokens\.weight"):
        train_step.check_peer(decoder, llama, ids_BT, ids_BT)


def test_another_loss_in_the_head_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = head.fused
    monkeypatch.setattr(head, "fused", lambda *given: fused(*given) * 1.00001)
    assert head.main(["--quick", "--rounds", "1", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "t2i_lm fused: loss in fp32 differs" in err


def test_another_distance_is_not_timed() -> None:
    given, found = fid.gaussians(16), fid.implementations()
    assert fid.check(found, given).keys() == {"scipy", "torchmetrics"}
    found["scipy"] = lambda *statistics: fid.scipy_root(*statistics) * (1 + 1e-9)
    with pytest.raises(rounds.GateError, match="scipy: distance differs"):
        fid.check(found, given)


def test_other_ids_are_not_timed() -> None:
    codes_BN = torch.arange(6).view(2, 3)
    logits_BNV = 10 * torch.nn.functional.one_hot(codes_BN, 6).float()

    def check(others_BN: torch.Tensor, device: str) -> dict[str, Any]:
        return generate.check({rounds.OURS: codes_BN, "other": others_BN}, lambda _: logits_BNV, device)

    found = check(codes_BN, "cpu")
    assert found["equal_ids"]["other"] == 1
    assert found["rows_that_part"]["other"] == 0
    with pytest.raises(rounds.GateError, match="other: only 33"):
        check(codes_BN.flip(1), "cpu")
    with pytest.raises(rounds.GateError, match="other: its first"):
        check(codes_BN.flip(1), "cuda")
    logits_BNV[0, 1, 4] = 10 - 1e-3  # as good as the best, at which a GPU's kernels may differ; what follows may, too
    parted_BN = torch.tensor([[0, 4, 5], [3, 4, 5]])
    assert check(parted_BN, "cuda")["rows_that_part"] == {rounds.OURS: 0, "other": 1}
    with pytest.raises(rounds.GateError, match="other: only 66"):
        check(parted_BN, "cpu")
    parted_BN[1, 2] = -7  # no image code
    with pytest.raises(rounds.GateError, match="other: its first"):
        check(parted_BN, "cuda")
    logits_BNV[1, 0, 1] = 11
    with pytest.raises(rounds.GateError, match=r"t2i_lm: an id is 9\.1e-02"):
        check(codes_BN, "cpu")


def stream(wrong_resume: bool) -> Any:
    """A data module of four batches of two ids."""
    batches = [{"ids_BT": torch.tensor([[number, 0]])} for number in range(4)]
    place = SimpleNamespace(start=0)

    def load_state_dict(state: dict[str, int]) -> None:
        place.start = max(0, state["consumed"] - wrong_resume)

    return SimpleNamespace(
        train_dataloader=lambda: batches[place.start :],
        load_state_dict=load_state_dict,
        layout=SimpleNamespace(vocab=SimpleNamespace(pad=9)),
        config=SimpleNamespace(data=SimpleNamespace(batch_size=1)),
    )


def test_other_batches_and_another_resumed_stream_are_not_timed() -> None:
    padded = [torch.tensor([[number, 0, 9]]) for number in range(4)]
    assert loader.check(stream(False), lambda: padded, 4) == {"batches_equal": 4, "resumed_batches_equal": 2}
    with pytest.raises(rounds.GateError, match="resumed after batch 2"):
        loader.check(stream(True), lambda: padded, 4)
    with pytest.raises(rounds.GateError, match="batch 3 differs"):
        loader.check(stream(False), lambda: [*padded[:3], torch.tensor([[3, 0, 7]])], 4)


def test_files_that_stay_in_memory_are_told_from_dropped_ones(tmp_path: Path) -> None:
    data_file = tmp_path / "train" / "data.arrow"
    data_file.parent.mkdir()
    data_file.write_bytes(bytes(2**20))
    parts = SimpleNamespace(rows=[1], files=lambda number: [data_file])
    train_set = SimpleNamespace(columns=SimpleNamespace(parts=parts))
    data = SimpleNamespace(folder=tmp_path, setup=lambda stage: None, train_set=train_set)

    with data_file.open("rb") as file:
        assert loader.share_in_memory(file) == 1, "just written"
        with mmap(file.fileno(), 0, access=ACCESS_READ) as pages:
            assert not any(pages[::4096])
            assert not loader.drop_from_memory(data), "what a process has mapped stays"
            assert loader.share_in_memory(file) == 1
        dropped = loader.drop_from_memory(data)
        shares = [loader.share_in_memory(file) for _ in range(20)]
        assert shares == [shares[0]] * 20, "looking adds no pages"
        assert dropped == (shares[0] < 0.5)


def test_another_training_is_not_timed() -> None:
    before = {"w": torch.zeros(3)}

    def trained(*weights: float, loss: float = 4.0) -> trainer_overhead.Trained:
        return trainer_overhead.Trained(1.0, torch.tensor([5.0, loss]), {"w": torch.tensor(weights)})

    after = trained(1.0, 1.0, 1.0)
    assert trainer_overhead.check(after, after, before, "cpu") == {"losses": 0.0, "weights": 0.0}
    with pytest.raises(rounds.GateError, match="weight w"):
        trainer_overhead.check(after, trained(1.0, 1.0, 1.0 + 1e-6), before, "cpu")
    with pytest.raises(rounds.GateError, match="loss differs"):
        trainer_overhead.check(after, trained(1.0, 1.0, 1.0, loss=4.00001), before, "cpu")
    with pytest.raises(rounds.GateError, match="have not changed"):
        trainer_overhead.check(trained(0.0, 0.0, 0.0), after, before, "cpu")


def test_on_a_gpu_trainings_may_differ_by_the_order_of_sums() -> None:
    before = {"a": torch.zeros(2), "b": torch.zeros(1)}

    def trained(last: float, loss: float = 4.0) -> trainer_overhead.Trained:
        weights = {"a": torch.ones(2), "b": torch.tensor([last])}
        return trainer_overhead.Trained(1.0, torch.tensor([5.0, loss]), weights)

    found = trainer_overhead.check(trained(1.1), trained(1.0, loss=4.005), before, "cuda")
    assert found == pytest.approx({"losses": 1e-3, "weight_change": 0.1 / 3**0.5}, rel=1e-4)
    with pytest.raises(rounds.GateError, match=r"changes differ by 28\.9%"):
        trainer_overhead.check(trained(1.5), trained(1.0), before, "cuda")
    with pytest.raises(rounds.GateError, match="loss differs"):
        trainer_overhead.check(trained(1.0), trained(1.0, loss=4.1), before, "cuda")


@pytest.mark.parametrize("found", [float("nan"), 1.1])
def test_the_gate_refuses_nan_and_differences_above_its_tolerance(found: float) -> None:
    with pytest.raises(rounds.GateError, match="x differs"):
        rounds.gate("x", torch.tensor([1.0, found]), torch.ones(2), 0.05)
    assert rounds.gate("x", torch.tensor([1.0, 1.01]), torch.ones(2), 0.05) == pytest.approx(0.01, rel=1e-3)
