"""Several runs of one command: in sequence in this process, or in parallel in processes of their own."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from t2i_lm.comparison.plan import setting_folder
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import require
from t2i_lm.experiment.required_files import missing_paths, print_missing
from t2i_lm.runtime.command_line import exit_code, failure
from t2i_lm.runtime.launch import is_first_process, require_launched
from t2i_lm.runtime.slurm import requeue
from t2i_lm.training.equal_runs import find_equal_run

# A process of its own for each run: none inherits threads or CUDA. On Linux runs are forked from a process that has
# loaded these modules, which takes seconds; their import does not initialize CUDA.
PRELOAD = ("torch", "lightning.pytorch")
CONTEXT: SpawnContext | ForkServerContext
if sys.platform == "linux":
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(list(PRELOAD))
else:
    CONTEXT = multiprocessing.get_context("spawn")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        config: its experiment.
        folder: run folder to continue; None for a new run.
        label: distinguishes it from other runs of the experiment in messages.
    """

    config: ExperimentConfig
    folder: Path | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Experiment and label, for messages."""
        return f"{self.config.name} {self.label}".strip()


@dataclass(frozen=True)
class Running:
    """A job in a process of its own; `slot` is its place among those that run in parallel."""

    job: Job
    process: BaseProcess
    slot: int
    log: Path
    started: float

    def send(self, number: int) -> None:
        """Sends a signal; no effect once the process has ended."""
        with suppress(ProcessLookupError):
            assert self.process.pid is not None
            os.kill(self.process.pid, number)


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Jobs still to run: finished runs of the same config are skipped (and printed), interrupted ones resume."""
    remaining = []
    for job in jobs:
        folder, finished = find_equal_run(job.config)
        if finished:
            print(f"== {job.name} (finished: {folder})", flush=True)
        else:
            remaining.append(replace(job, folder=folder))
    return remaining


def is_first_of(jobs: Sequence[Job]) -> bool:
    """Whether this process, of all that train some jobs together, is the one that draws them."""
    return is_first_process(max(job.config.trainer.processes for job in jobs))


def list_jobs(jobs: Sequence[Job]) -> int:
    """Prints runs to train, and on stderr the paths that they lack; 2 if there are any, else 0."""
    print(*(f"== {job.name}" for job in jobs), sep="\n", flush=True)
    return print_missing(job.config for job in jobs)


def train_and_draw(jobs: Sequence[Job], remaining: Sequence[Job], parallel: int, draw: Callable[[], int]) -> int:
    """Trains and draws; returns the exit code of the first run that failed, else that of `draw`.

    After a failure the other runs are trained, and those that there are drawn; after a signal nothing is.

    Args:
        jobs: every run of the figures.
        remaining: those to train, of `unfinished`.
        parallel: number of runs at a time.
        draw: draws the figures and returns an exit code; called by the first process alone.

    Raises:
        ValueError: as `run_jobs`.
    """
    code = run_jobs(remaining, parallel)
    if code > 128 or not is_first_of(jobs):
        return code
    drawn = exit_code(draw)
    return code or drawn


def run_jobs(jobs: Sequence[Job], parallel: int = 1) -> int:
    """Trains all jobs, after a failure the others too; returns 0, or the exit code of the first that failed.

    Parallel runs divide the processor's cores among them, take the GPUs in turn, and write a log each in the folder of
    runs. Two runs with one core each take less time than one after another with two cores, whose threads wait for
    each other. A signal is forwarded to every run, which saves itself; the code is then 128 plus its number, and only
    then above 128. If this process is killed, they save themselves, too.

    Args:
        jobs: runs to train.
        parallel: number of runs at a time.

    Raises:
        ValueError: before anything is trained, naming every path that a run reads and that is not there; or if a
            launcher started other numbers of processes, or parallel runs use several devices each.
    """
    require(parallel >= 1, "--jobs", parallel, "at least 1")
    for job in jobs:
        require_launched(job.config.trainer)
        job.config.require_paths()
    if missing := missing_paths(job.config for job in jobs):
        raise ValueError("\n".join(missing))
    if parallel == 1 or len(jobs) < 2:
        return _run_in_sequence(jobs)
    for job in jobs:
        devices = job.config.trainer.devices
        require(devices == 1, "trainer.devices", devices, "1 with --jobs, whose runs have one device each")
    return _run_in_parallel(jobs, min(parallel, len(jobs)))


def _run_in_sequence(jobs: Sequence[Job]) -> int:
    first_failure, started = 0, time.monotonic()
    for done, job in enumerate(jobs, start=1):
        print(f"== {job.name}", flush=True)
        begun = time.monotonic()
        code = _run(job)
        first_failure = first_failure or code
        if code > 128:  # stopped by a signal
            break
        if not code and len(jobs) > 1:
            _print_finished(job, begun, started, done, len(jobs))
    return first_failure


def _run(job: Job) -> int:
    """Trains; an error of any kind is the job's own, as in a process of its own."""
    from t2i_lm.training.run import run

    try:
        return exit_code(lambda: run(job.config, job.folder))
    except Exception:
        traceback.print_exc()
        return 1


def _run_in_parallel(jobs: Sequence[Job], slots: int) -> int:
    import torch

    from t2i_lm.runtime.threads import default_threads

    gpus = _visible_gpus(torch.cuda.device_count())
    threads = max(1, default_threads() // slots)
    waiting, running, free = list(jobs), list[Running](), list(range(slots))
    codes, signals, started = list[int](), list[int](), time.monotonic()

    def forward(number: int, _: object) -> None:
        signals.append(number)
        for one in running:
            one.send(number)

    def start_more() -> bool:
        return bool(waiting) and not signals

    with _signal_handler(forward):
        try:
            while running or start_more():
                while free and start_more():
                    slot = free.pop(0)
                    running.append(_start(waiting.pop(0), slot, threads, gpus[slot % len(gpus)] if gpus else None))
                    for number in signals:  # received while the process was started
                        running[-1].send(number)
                ended = wait([one.process.sentinel for one in running], timeout=1.0)
                for one in [one for one in running if one.process.sentinel in ended]:
                    running.remove(one)
                    one.process.join()
                    free.append(one.slot)
                    code, words = failure(one.process.exitcode or 0)
                    codes.append(code)
                    _report(one, words if code else "", started, len(codes), len(jobs))
        finally:  # after any error here: no run outlives this process
            for one in running:
                one.send(signal.SIGTERM)
                one.process.join()
    if signals:
        if signals[0] == signal.SIGUSR1 and (line := requeue()):
            print(line, flush=True)
        return 128 + signals[0]
    return next((code for code in codes if code), 0)


def _start(job: Job, slot: int, threads: int, gpu: str | None) -> Running:
    log = Path(job.config.run.dir) / f"{setting_folder([job.name])}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    trainer = replace(job.config.trainer, threads=job.config.trainer.threads or threads)
    job = replace(job, config=replace(job.config, trainer=trainer))
    process = CONTEXT.Process(target=_run_logged, args=(job, log, gpu))
    process.start()
    print(f"== {job.name}: started, {log}", flush=True)
    return Running(job, process, slot, log, time.monotonic())


def _run_logged(job: Job, log: Path, gpu: str | None) -> None:
    """A job in its own process, with its output in a log file."""
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_stop_with_parent, name="stop with parent", daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is initialized
    sys.exit(_run(job))


def _stop_with_parent() -> None:
    """Ends this run as SIGTERM does once the command that started it is gone: killed, it could not tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    print("the command that started this run has ended: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _visible_gpus(count: int) -> list[str]:
    """The GPUs of this process, as named in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def _report(one: Running, failed: str, started: float, done: int, jobs: int) -> None:
    if failed:
        took = timedelta(seconds=round(time.monotonic() - one.started))
        print(f"== {one.job.name}: {failed} after {took}; last lines of its log:", file=sys.stderr)
        print(*one.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:], sep="\n", file=sys.stderr)
        return
    _print_finished(one.job, one.started, started, done, jobs)


def _print_finished(job: Job, begun: float, started: float, done: int, jobs: int) -> None:
    """How long a run took, and when all will be done; `begun` is its own start, `started` that of the first."""
    now = time.monotonic()
    took, left = timedelta(seconds=round(now - begun)), timedelta(seconds=round((now - started) / done * (jobs - done)))
    print(f"== {job.name}: finished after {took}; {done}/{jobs}, ETA {left}", flush=True)


@contextmanager
def _signal_handler(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handles SIGTERM, SIGUSR1 and SIGINT, and restores the previous handlers on exit."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
