"""Several runs of one command: one after another here, or some at a time in processes of their own."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig, is_neutral, is_reported
from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.config.sections import require
from t2i_lm.runtime.command_line import FAILURES
from t2i_lm.storage.run_folder import CONFIG, REPORT, run_folders


@dataclass(frozen=True)
class Job:
    """A run to make, or with `folder` to go on with; `label` tells it from others of the same experiment."""

    config: ExperimentConfig
    folder: Path | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.config.name} {self.label}".strip()


@dataclass(frozen=True)
class Running:
    """A job in a process of its own, in one of as many slots as run at a time."""

    job: Job
    process: BaseProcess
    slot: int
    log: Path
    started: float

    def send(self, number: int) -> None:
        """A signal; nothing where the process has ended."""
        with suppress(ProcessLookupError):
            assert self.process.pid is not None
            os.kill(self.process.pid, number)


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Those that no finished run of an equal config stands for; one that was stopped goes on. Says which are done."""
    missing = []
    for job in jobs:
        folder, finished = find_equal_run(job.config)
        if finished:
            print(f"== {job.name} (finished: {folder})", flush=True)
        else:
            missing.append(replace(job, folder=folder))
    return missing


def find_equal_run(config: ExperimentConfig) -> tuple[Path | None, bool]:
    """The newest run folder of an equal config and whether it is finished; finished ones first."""
    if config.aligned_rows is not None:  # the others need no torch
        from t2i_lm.models.aligned_rows import resolve_aligned_rows

        config = resolve_aligned_rows(config)  # as in a run's config.yaml
    wanted = _computed(config)
    equal = []
    for folder in run_folders(Path(config.run.dir), config.name):
        if _computed_in(folder / CONFIG) == wanted:
            equal.append(folder)
    finished = [folder for folder in equal if (folder / REPORT).is_file()]
    if finished:
        return finished[-1], True
    return (equal[-1] if equal else None), False


@cache
def _computed_in(file: Path) -> dict[str, object] | None:
    """Of a run's config, which never changes; read once, however many jobs ask. None where it has other keys."""
    try:
        return _computed(load_experiment(file))
    except ValueError:
        return None


def _computed(config: ExperimentConfig) -> dict[str, object]:
    return {key: value for key, value in flatten(config).items() if not is_neutral(key) or is_reported(key)}


def run_jobs(jobs: Sequence[Job], at_once: int = 1, keep_going: bool = False) -> int:
    """Makes all runs; stops at the first that fails, or goes on with the others.

    Of several at once each has its share of the processor's cores, the next of the GPUs in turn, and a log in the
    folder of runs. Two runs with a core each take less time than one after another with two, whose
    threads wait for each other.

    Returns:
        0, or the exit code of the first that failed. A signal to stop reaches every run, which saves itself.

    Raises:
        ValueError: if runs that are to go on at once take several devices each.
    """
    require(at_once >= 1, "--jobs", at_once, "at least 1")
    if at_once == 1 or len(jobs) < 2:
        return _one_after_another(jobs, keep_going)
    for job in jobs:
        devices = job.config.trainer.devices
        require(devices == 1, "trainer.devices", devices, "1 with --jobs, whose runs have one device each")
    return _at_once(jobs, min(at_once, len(jobs)), keep_going)


def _one_after_another(jobs: Sequence[Job], keep_going: bool) -> int:
    failed = 0
    for job in jobs:
        print(f"== {job.name}", flush=True)
        code = _run(job)
        failed = failed or code
        if code > 128 or (code and not keep_going):  # above 128: stopped by a signal
            break
    return failed


def _run(job: Job) -> int:
    from t2i_lm.training.run import run

    try:
        return run(job.config, job.folder, resume=job.folder is not None)
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _at_once(jobs: Sequence[Job], slots: int, keep_going: bool) -> int:
    import torch

    gpus = _visible(torch.cuda.device_count())
    threads = max(1, torch.get_num_threads() // slots)
    waiting, running, free = list(jobs), list[Running](), list(range(slots))
    codes, signals, started = list[int](), list[int](), time.monotonic()

    def stop(number: int, _: object) -> None:
        signals.append(number)
        for one in running:
            one.send(number)

    def goes_on() -> bool:
        return bool(waiting) and not signals and (keep_going or not any(codes))

    with _handled(stop):
        try:
            while running or goes_on():
                while free and goes_on():
                    slot = free.pop(0)
                    running.append(_start(waiting.pop(0), slot, threads, gpus[slot % len(gpus)] if gpus else None))
                    for number in signals:  # that came while it was being started
                        running[-1].send(number)
                ended = wait([one.process.sentinel for one in running], timeout=1.0)
                for one in [one for one in running if one.process.sentinel in ended]:
                    running.remove(one)
                    one.process.join()
                    free.append(one.slot)
                    code = one.process.exitcode or 0
                    codes.append(code if code >= 0 else 128 - code)
                    _tell(one, codes[-1], len(codes), len(jobs), time.monotonic() - started)
        finally:  # whatever went wrong here: no run is left without a parent
            for one in running:
                one.send(signal.SIGTERM)
                one.process.join()
    if signals:
        return 128 + signals[0]
    return next((code for code in codes if code), 0)


def _start(job: Job, slot: int, threads: int, gpu: str | None) -> Running:
    log = Path(job.config.run.dir) / (re.sub(r"[^\w.=-]", "_", job.name) + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    trainer = replace(job.config.trainer, threads=job.config.trainer.threads or threads)
    job = replace(job, config=replace(job.config, trainer=trainer))
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(job, log, gpu))
    process.start()
    print(f"== {job.name}: started, {log}", flush=True)
    return Running(job, process, slot, log, time.monotonic())


def _child(job: Job, log: Path, gpu: str | None) -> None:
    """A run whose output goes to its log."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything looks for GPUs
    import torch

    torch.set_num_threads(job.config.trainer.threads or torch.get_num_threads())
    sys.exit(_run(job))


def _visible(count: int) -> list[str]:
    """The GPUs at hand, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def _tell(one: Running, code: int, done: int, jobs: int, seconds: float) -> None:
    took = timedelta(seconds=round(time.monotonic() - one.started))
    if code:
        print(f"== {one.job.name}: failed with code {code} after {took}; its last lines:", file=sys.stderr)
        print(*one.log.read_text(errors="replace").splitlines()[-5:], sep="\n", file=sys.stderr)
        return
    left = timedelta(seconds=round(seconds / done * (jobs - done)))
    print(f"== {one.job.name}: finished after {took}; {done} of {jobs}, about {left} left", flush=True)


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Both signals to stop go to the handler meanwhile."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
