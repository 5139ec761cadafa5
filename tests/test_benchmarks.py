"""The benchmarks run, say what they found in one line of JSON, and time nothing that differs. No time is asserted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import fid, generate, head, loader, peers, rounds, train_step, trainer_overhead
from tests.test_layers import MODULES, imports

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
# Script -> fields of its own in the JSON line.
SCRIPTS = {
    "train_step": ("times_ours", "tokens_per_s", "first_call_seconds"),
    "head": ("times_ours", "peak_mib", "gradients_mib"),
    "generate": ("times_ours", "ids_per_s"),
    "loader": ("times_ours", "samples_per_s"),
    "trainer_overhead": ("overhead_percent", "throughput_ratio"),
    "fid": ("times_ours", "fastest"),
}
SHARED = ("benchmark", "date", "machine", "versions", "threads", "load", "noisy", "settings", "gate")


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """All scripts at once: most of their time is importing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--rounds", "1", "--device", "cpu"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in SCRIPTS
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    else:
        yield float(value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_last_line_is_the_result(name: str, runs: dict[str, "subprocess.Popen[str]"]) -> None:
    out, err = runs[name].communicate()
    assert runs[name].returncode == 0, err
    line = json.loads(out.splitlines()[-1])
    assert set(SHARED + SCRIPTS[name]) <= set(line)
    assert line["benchmark"] == name
    assert line["settings"]["quick"]
    assert list(numbers(line["gate"]))
    assert all(value > 0 for field in SCRIPTS[name][:1] if field == "times_ours" for value in numbers(line[field]))
    for private in (str(ROOT), os.uname().nodename):
        assert private not in out.splitlines()[-1], "made to be published"


def test_help_needs_no_heavy_import() -> None:
    code = f"import sys; from benchmarks import {', '.join(SCRIPTS)}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("module", [train_step, head, generate, loader, trainer_overhead, fid])
def test_help_has_an_example_that_parses(module: Any) -> None:
    command = module.EXAMPLE.split()
    assert command[:3] == ["python", "-m", module.__name__]
    assert module.options(command[3:]).rounds >= 9


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
    given, found = fid.gaussians(16), fid.ways()
    assert fid.check(found, given).keys() == {"scipy", "torchmetrics"}
    found["scipy"] = lambda *statistics: fid.scipy_root(*statistics) * (1 + 1e-9)
    with pytest.raises(rounds.GateError, match="scipy: distance differs"):
        fid.check(found, given)


def test_other_ids_are_not_timed() -> None:
    codes_BN = torch.arange(6).view(2, 3)
    forms: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {
        f"{rounds.OURS} eager": (rounds.OURS, lambda: codes_BN),
        "other": ("other", lambda: codes_BN),
    }
    assert generate.check(forms)["other"] == 1
    forms["other"] = ("other", lambda: codes_BN.flip(1))
    with pytest.raises(rounds.GateError, match="other: only 33"):
        generate.check(forms)


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


def test_another_training_is_not_timed() -> None:
    before, after = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    assert trainer_overhead.check(after, after, before, "cpu") == {"weights": 0.0}
    with pytest.raises(rounds.GateError, match="weight w"):
        trainer_overhead.check(after, {"w": torch.tensor([1.0, 1.0, 1.0 + 1e-6])}, before, "cpu")
    with pytest.raises(rounds.GateError, match="have not changed"):
        trainer_overhead.check(before, before, before, "cpu")


@pytest.mark.parametrize("found", [float("nan"), 1.1])
def test_the_gate_refuses_nan_and_what_is_above_its_tolerance(found: float) -> None:
    with pytest.raises(rounds.GateError, match="x differs"):
        rounds.gate("x", torch.tensor([1.0, found]), torch.ones(2), 0.05)
    assert rounds.gate("x", torch.tensor([1.0, 1.01]), torch.ones(2), 0.05) == pytest.approx(0.01, rel=1e-3)


def test_every_round_has_every_contender_in_a_rotated_order() -> None:
    order: list[str] = []
    contenders = [rounds.Contender(name, name, lambda name=name: order.append(name)) for name in "abc"]
    seconds = rounds.interleave(contenders, rounds=3, warmup=1, device="cpu")
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_within_rounds_between_the_fastest_forms() -> None:
    contenders = [
        rounds.Contender(name, family, lambda: None)
        for name, family in (("ours slow", "t2i_lm"), ("ours fast", "t2i_lm"), ("peer", "peer"), ("peer slow", "peer"))
    ]
    # The machine is half as fast in the second round and both sides notice.
    seconds = {"ours slow": [9, 18, 9], "ours fast": [1, 2, 1], "peer": [3, 6, 3], "peer slow": [8, 8, 8]}
    found = rounds.compare(contenders, {name: [float(v) for v in values] for name, values in seconds.items()})
    assert found["fastest"] == {"t2i_lm": "ours fast", "peer": "peer"}
    assert found["times_ours"] == {"peer": {"median": 3.0, "p10": 3.0, "p90": 3.0}}


def test_nothing_imports_benchmarks_and_make_runs_them_all() -> None:
    for path in MODULES:
        assert not any(imported.split(".")[0] == "benchmarks" for imported in imports(path)), path
    scripts = {path.stem for path in FILES if '__name__ == "__main__"' in path.read_text()}
    listed = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("BENCHMARKS"))
    assert set(listed.split(":=")[1].split()) == scripts
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert all(f"## {name}\n" in results for name in scripts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_benchmark_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
