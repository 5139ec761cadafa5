"""Several runs of one command: in sequence in this process, or in parallel in processes of their own."""

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

from t2i_lm.assets import find
from t2i_lm.comparison.portable import portable_config
from t2i_lm.config.experiment import ExperimentConfig, is_neutral, is_reported
from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.config.sections import is_plugin, require
from t2i_lm.data.scenes.version import SCENES_FORMAT, scenes_version
from t2i_lm.runtime.command_line import exit_code
from t2i_lm.runtime.slurm import requeue
from t2i_lm.storage.hashing import known_sha256
from t2i_lm.storage.hub import is_hub
from t2i_lm.storage.run_folder import CHECKPOINTS, CONFIG, REPORT, is_collected, read_environment, run_folders
from t2i_lm.training.resume import NUMERICS

LARGEST_HASHED = 64 * 2**20  # bytes of weights that are hashed to find equal results
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


def find_equal_run(
    config: ExperimentConfig, folders: Sequence[Path] | None = None, apart: tuple[str, ...] = ()
) -> tuple[Path | None, bool]:
    """The newest run folder of an equal config to resume, and whether it is finished; finished ones first.

    Collected results of a finished run count as it. Runs on an older version of generated scenes, or of code that
    computes other numbers, are not equal.

    Args:
        config: with today's default of every key.
        folders: run folders to look among, oldest first; None for those of the experiment in `run.dir`.
        apart: beginnings of keys that may differ.
    """
    if folders is None:
        folders = run_folders(Path(config.run.dir), config.name)
    results = [folder for folder in folders if is_collected(folder) and _equal_results(config, folder, apart)]
    if results:
        return results[-1], True
    if config.aligned_rows is not None:  # the others need no torch
        from t2i_lm.models.aligned_rows import resolve_aligned_rows

        config = resolve_aligned_rows(config)  # as in a run's config.yaml
    computed = _without(_computed(config), apart)
    equal = []
    for folder in folders:
        found = _computed_in(folder / CONFIG)
        same = found is not None and _without(found, apart) == computed and _same_code(config, folder)
        if same and not _lacks_steps(config, folder):
            equal.append(folder)
    finished = [folder for folder in equal if (folder / REPORT).is_file()]
    if finished:
        return finished[-1], True
    # A run that was killed before its first checkpoint has nothing to resume from.
    saved = [folder for folder in equal if any((folder / CHECKPOINTS).glob("*"))]
    return (saved[-1] if saved else None), False


def _lacks_steps(config: ExperimentConfig, folder: Path) -> bool:
    """Whether a run has passed a step of `trainer.keep_steps` and has no checkpoint of it."""
    if not config.trainer.keep_steps:
        return False
    from callbacks.checkpoints import checkpoints, step_of

    steps = {step_of(path) for path in checkpoints(folder / CHECKPOINTS)}
    reached = config.trainer.max_steps if (folder / REPORT).is_file() else max(steps, default=0)
    return any(step <= reached and step not in steps for step in config.trainer.keep_steps)


def _equal_results(config: ExperimentConfig, folder: Path, apart: tuple[str, ...]) -> bool:
    """Whether collected results are of a run of an equal config; their paths are shorter, and `latest` is resolved."""
    own, theirs = portable_config(_computed(config), [Path.cwd()]), _computed_in(folder / CONFIG)
    if theirs is None or not (folder / REPORT).is_file():
        return False
    if config.aligned_rows == "latest":
        own["aligned_rows"] = theirs["aligned_rows"]
    same = _without(own, apart) == _without(theirs, apart) and _same_code(config, folder)
    return same and _same_weights(config, folder)


def _same_weights(config: ExperimentConfig, folder: Path) -> bool:
    """Whether the backbone's weights are those that results record, where both are known and small enough to hash."""
    recorded, path = read_environment(folder).get("backbone"), config.backbone.path
    if not isinstance(recorded, dict) or path is None or is_plugin(path) or is_hub(path):
        return True
    file = find(path)
    names = [] if file is None else [name for name in recorded if (file / name if file.is_dir() else file).is_file()]
    files = {name: file / name if file.is_dir() else file for name in names} if file is not None else {}
    return all(
        known_sha256(one) == recorded[name] for name, one in files.items() if one.stat().st_size <= LARGEST_HASHED
    )


def _without(values: dict[str, object], apart: tuple[str, ...]) -> dict[str, object]:
    return {key: value for key, value in values.items() if not key.startswith(apart)} if apart else values


def _same_code(config: ExperimentConfig, folder: Path) -> bool:
    """Whether a run has generated scenes and numerics of this code's versions."""
    recorded = read_environment(folder)  # empty in a run that ended before it wrote one
    scenes = config.data.source != "scenes" or not recorded or scenes_version(recorded) == SCENES_FORMAT
    return scenes and recorded.get("numerics", NUMERICS) == NUMERICS


@cache
def _computed_in(file: Path) -> dict[str, object] | None:
    """`_computed` of a run's config.yaml, cached since the file never changes; None for unknown keys or values."""
    try:
        return _computed(load_experiment(file))
    except ValueError:
        return None


def _computed(config: ExperimentConfig) -> dict[str, object]:
    return {key: value for key, value in flatten(config).items() if not is_neutral(key) or is_reported(key)}


def run_jobs(jobs: Sequence[Job], parallel: int = 1, keep_going: bool = False) -> int:
    """Trains all jobs and returns 0, or the exit code of the first that failed.

    Parallel runs divide the processor's cores among them, take the GPUs in turn, and write a log each in the folder of
    runs. Two runs with one core each take less time than one after another with two cores, whose threads wait for
    each other. A signal is forwarded to every run, which saves itself; the code is then 128 plus its number.

    Args:
        jobs: runs to train.
        parallel: number of runs at a time.
        keep_going: whether the others are still trained after a failure.

    Raises:
        ValueError: if a path is missing, or parallel runs use several devices each.
    """
    require(parallel >= 1, "--jobs", parallel, "at least 1")
    for job in jobs:
        job.config.require_paths()
    if parallel == 1 or len(jobs) < 2:
        return _run_in_sequence(jobs, keep_going)
    for job in jobs:
        devices = job.config.trainer.devices
        require(devices == 1, "trainer.devices", devices, "1 with --jobs, whose runs have one device each")
    return _run_in_parallel(jobs, min(parallel, len(jobs)), keep_going)


def _run_in_sequence(jobs: Sequence[Job], keep_going: bool) -> int:
    first_failure = 0
    for job in jobs:
        print(f"== {job.name}", flush=True)
        code = _run(job)
        first_failure = first_failure or code
        if code > 128 or (code and not keep_going):  # above 128: stopped by a signal
            break
    return first_failure


def _run(job: Job) -> int:
    from t2i_lm.training.run import run

    return exit_code(lambda: run(job.config, job.folder))


def _run_in_parallel(jobs: Sequence[Job], slots: int, keep_going: bool) -> int:
    import torch

    gpus = _visible_gpus(torch.cuda.device_count())
    threads = max(1, torch.get_num_threads() // slots)
    waiting, running, free = list(jobs), list[Running](), list(range(slots))
    codes, signals, started = list[int](), list[int](), time.monotonic()

    def forward(number: int, _: object) -> None:
        signals.append(number)
        for one in running:
            one.send(number)

    def start_more() -> bool:
        return bool(waiting) and not signals and (keep_going or not any(codes))

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
                    code = one.process.exitcode or 0
                    codes.append(code if code >= 0 else 128 - code)
                    _report(one, codes[-1], len(codes), len(jobs), time.monotonic() - started)
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
    log = Path(job.config.run.dir) / (re.sub(r"[^\w.=-]", "_", job.name) + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    trainer = replace(job.config.trainer, threads=job.config.trainer.threads or threads)
    job = replace(job, config=replace(job.config, trainer=trainer))
    process = multiprocessing.get_context("spawn").Process(target=_run_logged, args=(job, log, gpu))
    process.start()
    print(f"== {job.name}: started, {log}", flush=True)
    return Running(job, process, slot, log, time.monotonic())


def _run_logged(job: Job, log: Path, gpu: str | None) -> None:
    """A job in its own process, with its output in a log file."""
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is initialized
    import torch

    torch.set_num_threads(job.config.trainer.threads or torch.get_num_threads())
    sys.exit(_run(job))


def _visible_gpus(count: int) -> list[str]:
    """The GPUs of this process, as named in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def _report(one: Running, code: int, done: int, jobs: int, seconds: float) -> None:
    took = timedelta(seconds=round(time.monotonic() - one.started))
    if code:
        print(f"== {one.job.name}: failed with code {code} after {took}; last lines of its log:", file=sys.stderr)
        print(*one.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:], sep="\n", file=sys.stderr)
        return
    left = timedelta(seconds=round(seconds / done * (jobs - done)))
    print(f"== {one.job.name}: finished after {took}; {done}/{jobs}, ETA {left}", flush=True)


@contextmanager
def _signal_handler(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handles SIGTERM, SIGUSR1 and SIGINT, and restores the previous handlers on exit."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
