"""Tiny runs: to train them in this process, to launch them in another, and to compare what they computed."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import read_checkpoint
from t2i_lm.storage.run_folder import REPORT, Run, read_run, run_folders
from t2i_lm.train import main
from tests.callbacks.toy_run import server

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
PRETRAINED, SCRATCH = (str(EXPERIMENTS / f"t2i_{arm}.yaml") for arm in ("pretrained", "scratch"))
PROMPT = "a red circle on a white background"
# No samples in the report: the losses are the same without.
QUICK = ("samples.prompts=0", "samples.preference_scenes=0")


def train(experiment: str, root: Path, *overrides: str) -> Run:
    assert main([experiment, *overrides, f"run.dir={root}"]) == 0
    return read_run(run_folders(root)[-1])


def launch(experiment: str, root: Path, *overrides: str) -> "subprocess.Popen[str]":
    return launch_module("t2i_lm.train", experiment, *overrides, f"run.dir={root}")


def launch_module(module: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Forked:
    """`python -m MODULE ARGUMENTS` as `launch_module` starts it, sooner: forked from `toy_run.server`."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        handle, log = tempfile.mkstemp()
        os.close(handle)
        self._log = Path(log)
        self._process = server.Process(target=_run_module, args=(module, arguments, environment, self._log))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def signal_group(self, number: int) -> None:
        """As torchrun and terminals do."""
        assert self._process.pid is not None
        os.killpg(self._process.pid, number)

    def communicate(self, timeout: float = 60) -> tuple[str, None]:
        """Its output, once it has ended."""
        self._process.join(timeout)
        output = self._log.read_text()
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"not ended after {timeout} s: {output}")
        self._log.unlink()
        return output, None


def write_into(log: Path, environment: dict[str, str]) -> None:
    """Makes a forked process one of its own: output, variables of the environment, one thread."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= environment
    torch.set_num_threads(1)


def _run_module(module: str, arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
    write_into(log, {"OMP_NUM_THREADS": "1"} | environment)
    os.setpgid(0, 0)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


Launched = subprocess.Popen[str] | Forked


def succeed(*processes: Launched) -> None:
    """Waits for processes, which must end without an error."""
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output


def checkpoints(run: Run) -> list[Path]:
    """Oldest first."""
    return sorted((run.folder / "checkpoints").glob("*.ckpt"))


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    state: dict[str, torch.Tensor] = read_checkpoint(checkpoints(run)[-1], only="state_dict")["state_dict"]
    return state


def curve(run: Run) -> list[dict[str, Any]]:
    """All that a run computed; what a clock measured is left out."""
    clock = ("time", "throughput")
    return [{key: value for key, value in record.items() if key not in clock} for record in run.metrics]


def losses(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Losses of a line of metrics.jsonl by split: of training, or of every validation split; empty for other lines."""
    return {key: entries for key, entries in record.items() if re.fullmatch("train|val(/.*)?", key)}


def doubled_points(run: Run) -> set[tuple[str, int]]:
    """Tags and places on the axis that TensorBoard holds more than once."""
    events = EventAccumulator(str(run.folder / "tb"), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0))
    events.Reload()
    tags = events.Tags()
    assert tags["scalars"]
    points = Counter((tag, event.step) for tag in tags["scalars"] for event in events.Scalars(tag))
    points += Counter((tag, event.step) for tag in tags["images"] for event in events.Images(tag))
    points += Counter((tag, event.step) for tag in tags["tensors"] for event in events.Tensors(tag))
    return {point for point, count in points.items() if count > 1}


def same_losses(one: Run, other: Run, tolerance: float) -> None:
    assert len(one.metrics) == len(other.metrics)
    for ours, theirs in zip(one.metrics, other.metrics, strict=True):
        for key, entries in losses(ours).items():
            for name in ("text", "image", "boundary", "all"):
                assert entries[name]["count"] == theirs[key][name]["count"]
                assert entries[name]["nll"] == pytest.approx(theirs[key][name]["nll"], rel=tolerance)
        assert ours["tokens_real"] == theirs["tokens_real"]


def without_newest(run: Run, root: Path) -> Path:
    """A copy of a run's folder as it was when its newest checkpoint had not been written."""
    folder = root / run.folder.parent.name / run.folder.name
    shutil.copytree(run.folder, folder)
    (folder / REPORT).unlink()
    for file in (folder / "checkpoints").glob(f"{checkpoints(run)[-1].name}*"):
        file.unlink()
    return folder


def resume_from_middle(
    experiment: str, root: Path, whole: Run, *overrides: str, first: Callable[[Path], None] = lambda folder: None
) -> Run:
    """Trains again from the whole run's older checkpoint; `first` may change the folder before."""
    folder = without_newest(whole, root)
    first(folder)
    assert main([experiment, "--resume", str(folder), *overrides]) == 0
    return read_run(folder)


def coco_result(folder: Path) -> dict[str, Any]:
    """The COCO result of an evaluation."""
    content: dict[str, Any] = json.loads((folder / "coco.json").read_text())
    return content


def coco_arguments(run: Path, coco: Path, weights: Path) -> list[str]:
    """Arguments of t2i_lm.evaluate for a small COCO evaluation of a run."""
    sizes = ["--features", "64", "--prompts", "10", "--part", "3"]
    return ["--checkpoint", str(run), "--coco", str(coco), "--weights", str(weights), *sizes]
