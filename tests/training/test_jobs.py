"""Several runs: equal in parallel and in sequence, failures by name, and a signal that stops all of them."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from callbacks.checkpoints import checkpoint_path, mark_not_started
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment, save_experiment
from t2i_lm.config.sections import RunConfig
from t2i_lm.data.scenes.version import SCENES_FORMAT
from t2i_lm.storage.run_folder import CHECKPOINTS, CONFIG, ENVIRONMENT, REPORT, read_run, run_folders
from t2i_lm.training.jobs import Job, find_equal_run, run_jobs

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
QUIET = ["samples.prompts=0", "samples.preference_scenes=0", "trainer.threads=1"]


def arms(root: Path, *overrides: str) -> list[ExperimentConfig]:
    files = [EXPERIMENTS / f"uncond_{arm}.yaml" for arm in ("scratch", "pretrained")]
    return [load_experiment(file, "demo", [*overrides, *QUIET, f"run.dir={root}"]) for file in files]


def losses(root: Path) -> list[tuple[str, Any]]:
    runs = sorted(run_folders(root), key=lambda folder: folder.parent.name)
    return [(run.parent.name, [record["val"] for record in read_run(run).validations()]) for run in runs]


def test_a_run_stands_for_jobs_that_compute_and_report_the_same(tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    run.mkdir(parents=True)
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    save_experiment(config, run / CONFIG)
    (run / REPORT).write_text("{}")
    for equal in (
        config,
        replace(config, data=replace(config.data, workers=3, cache_dir="elsewhere")),
        replace(config, trainer=replace(config.trainer, threads=7, checkpoint_interval=5)),
    ):
        assert find_equal_run(equal) == (run, True)
    for other in (
        replace(config, seed=1),
        replace(config, init="shuffled"),
        replace(config, samples=replace(config.samples, prompts=7)),
        replace(config, forgetting=replace(config.forgetting, interval=5, text="heldout.txt")),
        replace(config, fid=replace(config.fid, prompts=7)),
        replace(config, trainer=replace(config.trainer, packing=True)),
    ):
        assert find_equal_run(other) == (None, False)


def test_a_run_without_the_checkpoints_to_keep_stands_for_no_job(tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    (run / CHECKPOINTS).mkdir(parents=True)
    plain = ExperimentConfig(run=RunConfig(str(tmp_path)))
    config = replace(plain, trainer=replace(plain.trainer, keep_steps=[3]))
    save_experiment(plain, run / CONFIG)
    checkpoint_path(run / CHECKPOINTS, 2).touch()
    assert find_equal_run(config) == (run, False)  # step 3 is still to come
    checkpoint_path(run / CHECKPOINTS, 4).touch()
    assert find_equal_run(config) == (None, False)
    (run / REPORT).write_text("{}")
    assert find_equal_run(config) == (None, False)
    assert find_equal_run(plain) == (run, True)
    checkpoint_path(run / CHECKPOINTS, 3).touch()
    assert find_equal_run(config) == (run, True)


@pytest.mark.parametrize(
    ("recorded", "equal"), [({"scenes": SCENES_FORMAT}, True), ({"threads": 1}, False), ({}, True)]
)
def test_a_run_on_former_scenes_stands_for_no_job(recorded: dict[str, int], equal: bool, tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    run.mkdir(parents=True)
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    save_experiment(config, run / CONFIG)
    (run / ENVIRONMENT).write_text(json.dumps(recorded))
    mark_not_started(run / CHECKPOINTS)
    assert find_equal_run(config) == (run if equal else None, False)


def test_a_run_from_the_latest_alignment_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "align" / "20260101-000000-demo" / "aligned_rows.safetensors"
    run = tmp_path / "experiment" / "20260102-000000-demo"
    for folder in (file.parent, run):
        folder.mkdir(parents=True)
    file.touch()
    config = ExperimentConfig(init="aligned", aligned_rows="latest", run=RunConfig(str(tmp_path)))
    save_experiment(config, file.parent / CONFIG)
    save_experiment(replace(config, aligned_rows=str(file)), run / CONFIG)
    assert find_equal_run(config) == (None, False), "killed before its first checkpoint: a new run takes its place"
    mark_not_started(run / CHECKPOINTS)
    assert find_equal_run(config) == (run, False)


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
def test_a_failed_run_is_named_with_the_end_of_its_log_and_no_more_are_started(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = arms(tmp_path, *tiny)[0]
    bad = replace(
        good, name="broken", backbone=replace(good.backbone, path=str(tmp_path / "absent")), init="pretrained"
    )
    jobs = [Job(config) for config in (bad, replace(bad, name="broken too"), replace(good, name="never"))]
    assert run_jobs(jobs, parallel=2) == 2
    captured = capfd.readouterr()
    assert "== broken: failed with code 2" in captured.err
    assert "absent" in captured.err
    assert "never" not in captured.out


@pytest.mark.slow
def test_keep_going_trains_the_others_after_a_failure(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = replace(arms(tmp_path, *tiny)[0], name="good")
    bad = replace(
        good, name="broken", backbone=replace(good.backbone, path=str(tmp_path / "absent")), init="pretrained"
    )
    assert run_jobs([Job(bad), Job(good)], keep_going=True) == 2
    assert "absent: no such file" in capfd.readouterr().err
    assert [folder.parent.name for folder in run_folders(tmp_path)] == ["good"]


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
def test_a_signal_saves_and_stops_all_runs(tiny: list[str], tmp_path: Path) -> None:
    long = ["trainer.max_steps=4000", "trainer.val_check_interval=4000", "trainer.checkpoint_interval=4000"]
    command = [sys.executable, "-m", "t2i_lm.ablate", "--all", "--jobs", "2", *tiny, *QUIET, *long]
    process = subprocess.Popen(
        [*command, f"run.dir={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        metrics = list(tmp_path.glob("*/*/metrics.jsonl"))
        if len(metrics) == 2 and all('"train"' in path.read_text() for path in metrics):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    folders = run_folders(tmp_path)
    assert sorted(folder.parent.name for folder in folders) == ["uncond_pretrained", "uncond_scratch"]
    for folder in folders:
        assert len(list((folder / "checkpoints").glob("step-*.ckpt"))) == 1
        assert not (folder / REPORT).exists()
