"""The benchmarks run, print one line of JSON, and time nothing that differs. No time is asserted."""

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import (
    encode,
    fid,
    generate,
    head,
    loader,
    peers,
    rounds,
    saves,
    shards,
    suite,
    train_step,
    trainer_overhead,
)
from t2i_lm.config.sections import DataConfig
from tests.callbacks.toy_run import finish, server
from tests.test_layers import MODULES, imports

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
# Script -> fields of its own in the JSON line.
SCRIPTS = {
    "train_step": ("times_ours", "tokens_per_s", "first_call_seconds"),
    "head": ("times_ours", "peak_mib", "gradients_mib"),
    "generate": ("times_ours", "ids_per_s"),
    "encode": ("images_per_s", "equal_ids"),
    "loader": ("times_ours", "samples_per_s"),
    "trainer_overhead": ("overhead_percent", "throughput_ratio"),
    "fid": ("times_ours", "fastest"),
    "saves": ("stall_seconds", "write_seconds", "stall_percent", "cost_percent", "extra_memory"),
}
SHARED = ("benchmark", "date", "machine", "versions", "threads", "load", "noisy", "settings", "gate")


Started = Mapping[str, tuple[BaseProcess, Path]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """All scripts at once: one waits where another computes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    started = {name: (server.Process(target=run_script, args=(name, folder)), folder / name) for name in SCRIPTS}
    for process, _ in started.values():
        process.start()
    yield started
    for process, _ in started.values():
        process.kill()
        process.join()


def run_script(name: str, folder: Path) -> None:
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{ending}", os.O_WRONLY | os.O_CREAT), stream)
    torch.set_num_threads(1)
    script = importlib.import_module(f"benchmarks.{name}")
    sys.exit(script.main(["--quick", "--rounds", "1", "--device", "cpu", "--no-compile"]))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    else:
        yield float(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_last_line_is_the_result(name: str, runs: Started) -> None:
    process, stem = runs[name]
    codes = finish(process, timeout=300)
    out, err = (stem.with_suffix(ending).read_text() for ending in (".out", ".err"))
    assert codes == [0], err
    line = json.loads(out.splitlines()[-1])
    assert set(SHARED + SCRIPTS[name]) <= set(line)
    assert line["benchmark"] == name
    assert "no figures" not in err
    assert line["settings"]["quick"]
    assert list(numbers(line["gate"]))
    assert all(value > 0 for field in SCRIPTS[name][:1] if field == "times_ours" for value in numbers(line[field]))
    for private in (str(ROOT), os.uname().nodename):
        assert private not in out.splitlines()[-1], "made to be published"


def test_help_needs_no_heavy_import() -> None:
    code = f"import sys; from benchmarks import {', '.join(SCRIPTS)}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("module", [train_step, head, generate, loader, trainer_overhead, fid, saves])
def test_help_has_an_example_that_parses(module: Any) -> None:
    command = module.EXAMPLE.split()
    assert command[:3] == ["python", "-m", module.__name__]
    assert module.options(command[3:]).rounds >= 9


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own look
def test_ours_compiled_is_compiled_by_block_and_has_the_same_weights() -> None:
    decoder, _ = peers.build_decoder(peers.SHAPES["tiny"], "cpu")
    by_block = peers.compiled_by_block(decoder, backend="eager")
    assert all(block._compiled_call_impl is not None for block in by_block.layers)
    assert all(block._compiled_call_impl is None for block in decoder.layers)
    own = dict(decoder.named_parameters())
    assert own.keys() == dict(by_block.named_parameters()).keys()
    assert all(parameter is own[name] for name, parameter in by_block.named_parameters())
    ids_BT = torch.arange(24).view(2, 12)
    torch.testing.assert_close(by_block.loss(ids_BT, ids_BT).total, decoder.loss(ids_BT, ids_BT).total)
    forms = list(train_step.loss_forms(decoder, [], ids_BT, ids_BT, "fp32", compiled=True))
    assert [form.name for form in forms] == ["t2i_lm eager", "t2i_lm compiled"]
    assert all(form.module is decoder for form in forms), "one optimizer"


def test_forms_are_compared_with_the_whole_batch() -> None:
    decoder, _ = peers.build_decoder(peers.SHAPES["tiny"], "cpu")
    ids_BT = torch.arange(60).view(5, 12)
    target_BT = ids_BT.flip(0)
    form = next(train_step.loss_forms(decoder, [], ids_BT, target_BT, "fp32", compiled=False))
    found = train_step.expected_loss_and_norm(decoder, ids_BT, target_BT)
    torch.testing.assert_close(found, train_step.loss_and_norm(form, "cpu"))
    assert all(parameter.grad is None for parameter in decoder.parameters())


@pytest.mark.slow
def test_the_papers_training_step_has_a_batch_that_fits_and_no_float32_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.SHAPES, "paper", peers.SHAPES["tiny"])
    fixed = ["--rounds", "1", "--device", "cpu", "--no-compile", "--precision", "bf16"]
    assert train_step.main(["--shape", "paper", "--peers", "transformers", *fixed]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["seconds"].keys() == {"t2i_lm eager", "transformers eager"}
    assert line["shape"]["batch"] == 8


def test_a_full_gpu_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill(options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert rounds.exit_code(fill, train_step.options([])) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "out of GPU memory" in err
    assert "--batch" in err
    assert "--peers" in err

    def fail(options: Any) -> None:
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        rounds.exit_code(fail, train_step.options([]))


def test_the_head_is_timed_as_loss_backend_torch_runs_it() -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked loss")
    assert {"torch chunked", "loss.backend=torch"} <= head.variants("fp32", compiled=False).keys()
    assert "loss.backend=torch" not in head.variants("bf16", compiled=False)


def test_a_form_that_cannot_generate_is_named_unless_memory_was_short() -> None:
    def forms(error: Exception) -> dict[str, tuple[str, Callable[[], torch.Tensor]]]:
        def draw() -> torch.Tensor:
            raise error

        return {"other": ("other", draw)}

    with pytest.raises(rounds.GateError, match="other cannot generate: bad"):
        generate.generate_all(forms(RuntimeError("bad")))
    with pytest.raises(torch.OutOfMemoryError):
        generate.generate_all(forms(torch.OutOfMemoryError("CUDA out of memory")))


@pytest.mark.slow
def test_alone_needs_no_peer_and_positions_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Any] = []
    build = peers.build_decoder

    def watched(*given: Any) -> Any:
        built.append(build(*given))
        return built[-1]

    monkeypatch.setattr(peers, "build_llama", lambda *_: pytest.fail("memory for nothing"))
    monkeypatch.setattr(peers, "build_decoder", watched)
    fixed = ["--quick", "--rounds", "1", "--device", "cpu"]
    assert generate.main(["--alone", "--precision", "bf16", *fixed]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["seconds"].keys() == {"t2i_lm eager"}
    assert line["gate"]["recomputed"] < generate.TIE
    decoder = built[0][0]
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert decoder.rotary_cos.dtype == torch.float32


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_random_shards_are_read_with_the_padding_of_the_scale(scale: str) -> None:
    overlay = yaml.safe_load((ROOT / "experiments" / "scale" / f"{scale}.yaml").read_text(encoding="utf-8"))
    stated = overlay["data"].get("pad_to_multiple_of", DataConfig.pad_to_multiple_of)
    assert shards.experiment(4, 1152, 2, scale=scale).data.pad_to_multiple_of == stated


@pytest.mark.slow
def test_every_round_has_every_contender_in_a_rotated_order() -> None:
    order: list[str] = []
    contenders = [rounds.Contender(name, name, partial(order.append, name)) for name in "abc"]
    seconds = rounds.interleave(contenders, rounds=3, warmup=1, device="cpu")
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.slow
def test_preparation_of_a_contender_is_not_timed() -> None:
    times = iter(range(100))
    contender = rounds.Contender("a", "a", lambda: next(times), lambda: [next(times) for _ in range(5)])
    seconds = rounds.interleave([contender], rounds=2, warmup=1, device="cpu", clock=lambda: float(next(times)))
    assert seconds == {"a": [2.0, 2.0]}
    assert next(times) == 1 + 5 + 2 * (5 + 3)


def test_dropped_files_are_read_again(tmp_path: Path) -> None:
    shards.write_random_shards(tmp_path, 256, 1024, 50_432, 16_384, 1152)
    data = loader.open_data(tmp_path, "paper", 18)

    dropped = loader.drop_from_memory(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    assert sum(1 for _ in data.train_dataloader()) == 18
    read = 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before)
    size = sum(path.stat().st_size for path in Path(tmp_path, "train").rglob("*.arrow"))
    assert (read > size / 2) == dropped, "read again where the file system drops files"


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
    assert {entry.command[0] for entry in suite.CPU} == {f"benchmarks.{name}" for name in scripts - {"suite"}}
    assert {entry.command[0] for entry in suite.GPU} <= {f"benchmarks.{name}" for name in scripts} | {"t2i_lm.train"}
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert all(f"## {name}\n" in results for name in scripts - {"suite"})


def test_make_gives_the_suite_its_options(tmp_path: Path) -> None:
    stamp = tmp_path / "installed"
    stamp.touch()

    def line(target: str, *more: str) -> str:
        command = ["make", "--no-print-directory", target, f"STAMP={stamp}", "PY=echo", *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    assert line("bench", "ARGS=--quick", "OPEN_LM=") == "-m benchmarks.suite --quick"
    assert line("bench-gpu", "OPEN_LM=/a checkout") == "-m benchmarks.suite --gpu --open-lm /a checkout"


def test_open_lm_takes_part_in_training_steps_alone() -> None:
    for gpu, with_checkout in (([], "train_step"), (["--gpu"], "open_lm")):
        given, more = suite.options([*gpu, "--open-lm", "/a checkout", "--rounds", "3"])
        assert more == ["--rounds", "3"]
        for entry in suite.entries(given):
            command = suite.arguments_of(entry, given, more, Path("runs"))
            assert ("/a checkout" in command) == (entry.name == with_checkout)
            assert (command[-2:] == more) == (entry.name != "demo")


def test_the_gpus_suite_fits_its_eight_minutes_and_every_command_parses() -> None:
    given, _ = suite.options(["--gpu"])
    modules = {
        f"benchmarks.{module.__name__.split('.')[-1]}": module for module in (train_step, head, generate, encode, saves)
    }
    modules["benchmarks.trainer_overhead"] = trainer_overhead
    for entry in suite.entries(given):
        assert entry.limit < suite.GPU_SECONDS
        if entry.name != "demo":
            modules[entry.command[0]].options(suite.arguments_of(entry, given, [], Path())[3:])


def test_the_copy_of_a_checkpoint_is_measured_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert saves.main(["--copy-only", "--quick", "--rounds", "2", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] == {"copy": 0.0}
    assert set(found["stall_seconds"]) == {"with memory to take", "later"}
    assert len(list(suite.numbers(found))) == 3  # the table has both, and the memory


def test_what_does_not_end_is_stopped_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry(name: str, code: str, limit: float = 60) -> suite.Entry:
        return suite.Entry(name, (code,), limit)

    line = {"benchmark": "head", "seconds": {"ours": {"median": 2.5, "p10": 1, "p90": 3}}, "peak_mib": {"ours": 12345}}
    chosen = (
        entry("slow", "import time; time.sleep(60)", 0.2),
        entry("broken", "raise SystemExit(3)"),
        entry("good", f"print('a word'); print({json.dumps(line)!r})"),
    )
    monkeypatch.setattr(suite, "CPU", chosen)
    monkeypatch.setattr(suite, "arguments_of", lambda entry, *_: [sys.executable, "-c", entry.command[0]])
    assert suite.main([]) == 1
    out, err = capsys.readouterr()
    first, *rows = out.splitlines()
    assert json.loads(first) == line
    assert [row.split() for row in rows[1:3]] == [
        ["slow", "time", "stopped", "after", "0", "s"],
        ["broken", "time", *rows[2].split()[2:]],
    ]
    assert "failed with exit code 3" in rows[2]
    assert [row.split() for row in rows[-2:]] == [
        ["good", "seconds", "ours", "2.5"],
        ["good", "peak_mib", "ours", "12,345"],
    ]
    assert "error: slow: stopped after 0 s" in err
    assert suite.main(["--only", "good"]) == 0
    assert suite.main(["--only", "good", "--seconds", "-1"]) == 1
    assert "good: no time left" in capsys.readouterr().err
    assert suite.main(["--only", "bad"]) == 2
    assert "--only bad: expected one of slow, broken, good" in capsys.readouterr().err


@pytest.mark.slow
def test_the_suite_runs_small_on_a_cpu() -> None:
    """One script in the form of the GPU's suite; the scripts themselves are tested above."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.suite",
        "--gpu",
        "--quick",
        "--only",
        "head",
        "draw_64",
        "--no-compile",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [json.loads(line)["benchmark"] for line in lines[:2]] == ["head", "generate"]
    assert any(line.split()[:2] == ["draw_64", "first_call_seconds"] for line in lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_benchmark_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
