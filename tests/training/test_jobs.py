"""Several runs: equal in parallel and in sequence, failures by name, and a signal that stops all of them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t2i_lm import ablate, remedies
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.storage.run_folder import OWNER, REPORT, read_run, run_folders
from t2i_lm.training import jobs, run
from t2i_lm.training.jobs import PRELOAD, Job, list_jobs, run_jobs
from t2i_lm.training.study import StudyRun
from tests.runs import Forked
from tests.study_folders import finish

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
QUIET = ["samples.prompts=0", "samples.preference_scenes=0", "trainer.threads=1"]


def arms(root: Path, *overrides: str) -> list[ExperimentConfig]:
    files = [EXPERIMENTS / f"uncond_{arm}.yaml" for arm in ("scratch", "pretrained")]
    return [load_experiment(file, "demo", [*overrides, *QUIET, f"run.dir={root}"]) for file in files]


def broken(config: ExperimentConfig, folder: Path) -> ExperimentConfig:
    """A run that fails when it reads its language model, from a folder without one."""
    folder.mkdir()
    return replace(config, name="broken", backbone=replace(config.backbone, path=str(folder)), init="pretrained")


def losses(root: Path) -> list[tuple[str, Any]]:
    runs = sorted(run_folders(root), key=lambda folder: folder.parent.name)
    return [(run.parent.name, [record["val"] for record in read_run(run).validations()]) for run in runs]


@pytest.mark.slow
def test_parallel_runs_equal_runs_in_sequence(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_jobs([Job(config) for config in arms(tmp_path / "sequence", *tiny)]) == 0
    capfd.readouterr()
    assert run_jobs([Job(config) for config in arms(tmp_path / "parallel", *tiny)], parallel=2) == 0
    assert losses(tmp_path / "parallel") == losses(tmp_path / "sequence")
    output = capfd.readouterr().out
    assert "== uncond_scratch: finished after" in output
    assert "2/2, ETA 0:00:00" in output
    assert "step 8/8" not in output
    assert "step 8/8" in (tmp_path / "parallel" / "uncond_scratch.log").read_text()


@pytest.mark.slow
def test_what_runs_are_forked_from_does_not_call_cuda() -> None:
    """A child of a process that has called it cannot use a GPU."""
    program = """import importlib, os, sys
import torch
torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = lambda *_: os._exit(3)
for name in sys.argv[1:]:
    importlib.import_module(name)"""
    assert subprocess.run([sys.executable, "-c", program, *PRELOAD], check=False).returncode == 0


@pytest.mark.slow
def test_a_failed_run_is_named_with_the_end_of_its_log(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = arms(tmp_path, *tiny)[0]
    bad = broken(good, tmp_path / "empty")
    several = [Job(config) for config in (bad, replace(bad, name="broken too"))]
    assert run_jobs(several, parallel=2) == 2
    captured = capfd.readouterr()
    assert "== broken: failed with code 2" in captured.err
    assert "empty" in captured.err


@pytest.mark.slow
def test_after_a_failure_the_others_are_trained(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = replace(arms(tmp_path, *tiny)[0], name="good")
    bad = broken(good, tmp_path / "empty")
    assert run_jobs([Job(bad), Job(good)]) == 2
    assert "backbone.path" in capfd.readouterr().err
    assert [folder.parent.name for folder in run_folders(tmp_path)] == ["good"]


def end(job: Job, log: Path, gpu: str | None) -> None:
    """In place of a run in a process of its own: killed, stopped by a signal that it handles, or finished."""
    if job.config.seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(128 + signal.SIGTERM if job.config.seed == 1 else 0)


def test_a_run_that_a_signal_ends_alone_is_a_failure_and_stops_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "_run_logged", end)
    monkeypatch.setattr(jobs, "CONTEXT", multiprocessing.get_context("fork"))  # at once: these processes load nothing
    configs = [replace(arms(tmp_path)[0], seed=seed) for seed in range(3)]
    several = [Job(config, label=f"seed={config.seed} data.path={'x' * 250}") for config in configs]
    assert run_jobs(several, parallel=2) == 1
    captured = capfd.readouterr()
    name = "== uncond_scratch seed=0"
    assert captured.err.count(f"{name} data.path=") == 1
    assert "xx: killed by SIGKILL (perhaps for lack of memory) after" in captured.err
    assert "xx: stopped by SIGTERM after" in captured.err
    assert "xx: finished after" in captured.out
    assert len([*tmp_path.glob("uncond_scratch_seed=*.log")]) == 3


def test_every_absent_path_is_named_before_anything_is_trained(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = arms(tmp_path, *tiny, f"backbone.path={tmp_path}/lm", f"image_tokenizer.path={tmp_path}/vq")
    absent = (f"backbone.path={tmp_path}/lm", f"image_tokenizer.path={tmp_path}/vq")
    lines = [f"missing path: {word} (2 runs to train)" for word in absent]
    with pytest.raises(ValueError, match="missing path") as caught:
        run_jobs([Job(config) for config in two])
    assert str(caught.value).splitlines() == lines
    assert run_folders(tmp_path) == []
    assert list_jobs([Job(config) for config in two]) == 2
    output = capsys.readouterr()
    assert output.out.splitlines() == ["== uncond_scratch", "== uncond_pretrained"]
    assert output.err.splitlines() == lines


@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_no_traceback(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "t2i_lm.ablate", "--all", "--jobs", "2", *tiny, *QUIET, f"run.dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert "started" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "Traceback" not in output


def test_runs_of_several_devices_are_not_trained_in_parallel(tiny: list[str], tmp_path: Path) -> None:
    jobs = [Job(config) for config in arms(tmp_path, *tiny, "trainer.devices=2")]
    with pytest.raises(ValueError, match=r"trainer\.devices=2: expected 1 with --jobs"):
        run_jobs(jobs, parallel=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_saves_and_stops_all_runs(number: signal.Signals, tiny: list[str], tmp_path: Path) -> None:
    long = ["trainer.max_steps=4000", "trainer.val_check_interval=4000", "trainer.checkpoint_interval=4000"]
    process = Forked("t2i_lm.ablate", "--all", "--jobs", "2", *tiny, *QUIET, *long, f"run.dir={tmp_path}")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        metrics = list(tmp_path.glob("*/*/metrics.jsonl"))
        if len(metrics) == 2 and all('"train"' in path.read_text() for path in metrics):
            break
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), output
    folders = run_folders(tmp_path)
    assert sorted(folder.parent.name for folder in folders) == ["uncond_pretrained", "uncond_scratch"]
    deadline = time.monotonic() + 120
    for folder in folders:
        while number == signal.SIGKILL and (folder / OWNER).exists() and time.monotonic() < deadline:
            time.sleep(0.2)  # runs end after their killed command
        assert not (folder / OWNER).exists()
        assert len(list((folder / "checkpoints").glob("step-*.ckpt"))) == 1
        assert not (folder / REPORT).exists()


def test_an_error_of_any_kind_in_sequence_is_one_failed_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int] = []

    def train(config: ExperimentConfig, folder: Path | None) -> int:
        begun.append(config.seed)
        if config.seed == 1:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return 0

    monkeypatch.setattr(run, "run", train)
    configs = [load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", [f"seed={seed}"]) for seed in range(3)]
    assert run_jobs([Job(config) for config in configs]) == 1
    assert begun == [0, 1, 2]
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("RuntimeError: CUDA error: device-side assert triggered\n")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_a_command_stops_its_runs_in_sequence(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: ExperimentConfig, folder: Path | None) -> int:
        raise stop(7)

    monkeypatch.setattr(run, "run", stopped)
    several = [Job(load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", []))] * 2
    with pytest.raises(SystemExit, match="7") if stop is SystemExit else nullcontext():
        assert run_jobs(several) == 130


@pytest.mark.parametrize("command", ["ablate", "remedies"])
def test_an_arm_that_fails_stops_no_other_and_finished_arms_are_not_trained_again(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(config: ExperimentConfig, folder: Path | None) -> int:
        trained.append(config.name)
        if len(trained) == 2:
            raise RuntimeError("CUDA error")
        finish([StudyRun({}, 0, Job(config))], lambda _: 1.0, first=len(trained))
        return 0

    monkeypatch.setattr(run, "run", train)
    monkeypatch.chdir(ROOT)
    first = ["--all"] if command == "ablate" else ["--only", "caption_mask", "--only", "distil", "--only", "l2_sp"]
    main = {"ablate": ablate.main, "remedies": remedies.main}[command]
    arguments = [*first, "--out", str(tmp_path / "out"), f"run.dir={tmp_path / 'runs'}"]
    assert main(arguments) == 1
    number = len(trained)
    assert (number, len(run_folders(tmp_path / "runs"))) == ((6, 5) if command == "ablate" else (4, 3))
    figure = tmp_path / "out" / ("figure5.png" if command == "ablate" else "figure_remedies.png")
    assert figure.is_file()
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(" (finished: ") == number - 1
    if command == "ablate":  # one arm is trained each time, as by `train`
        freeze = ["--freeze", "ffn", f"run.dir={tmp_path / 'runs'}"]
        assert [main(freeze), main(freeze)] == [0, 0]
        assert trained[number:] == ["uncond_pretrained_freeze_ffn"] * 2


def test_runs_in_sequence_tell_when_all_will_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter((0, 2, 0))
    monkeypatch.setattr(jobs, "_run", lambda job: next(codes))
    configs = [load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", [f"seed={seed}"]) for seed in range(3)]
    assert run_jobs([Job(config, label=f"seed={config.seed}") for config in configs]) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert [line.partition(":")[0] for line in lines] == ["== t2i_scratch seed=0", "== t2i_scratch seed=2"]
    assert lines[-1].endswith("finished after 0:00:00; 3/3, ETA 0:00:00")
