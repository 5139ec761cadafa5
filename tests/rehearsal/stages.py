"""Stages in a row: their commands with a log, time and memory, and a record from which a later call goes on.

Imports no torch: on Linux a command's peak memory includes that of the process which starts it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from t2i_lm.storage.run_folder import METRICS, OWNER, run_folders
from t2i_lm.storage.writing import write_atomic

POLL_S = 0.05
STOP_S = 900.0  # within which a command ends that was sent a signal
LAST_LINES = 15
GIB = 2**30
# Of another job, which the commands are not part of.
FOREIGN = ("SLURM_", "PMI_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "T2I_LM_RUN_FOLDER")


class StageError(Exception):
    """A command failed, or something that was checked is not as it should be."""


class Commands:
    """Runs the commands of one stage.

    Attributes:
        log: every command line, its output and its exit code.
        peak: largest memory of one process so far, in bytes.
    """

    def __init__(self, log: Path, folder: Path) -> None:
        """`folder` is where the commands start."""
        self.log, self.folder, self.peak = log, folder, 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def run(
        self,
        *arguments: str | Path,
        code: int | None = 0,
        folder: Path | None = None,
        watch: Callable[[], bool] | None = None,
        **environment: str,
    ) -> str:
        """The output of a command.

        Args:
            arguments: the command line.
            code: the required exit code; None: any but 0.
            folder: where it starts, if not in that of the stage.
            watch: is called several times a second until it returns true.
            environment: more variables.

        Raises:
            StageError: if it ends with another exit code, or before `watch` returned true.
        """
        start = self.log.stat().st_size
        line = shlex.join(map(str, arguments))
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {line}\n")
            log.flush()
            ended, seen = self._wait(arguments, folder or self.folder, log, watch, environment)
            log.write(f"(exit code {ended})\n")
        with self.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(start)
            output = log.read()
        if (ended == 0) if code is None else (ended != code):
            raise StageError(f"{line}\nended with {ended}, expected {'an error' if code is None else code}")
        if not seen:
            raise StageError(f"{line}\nended before it could be stopped")
        return output

    def _wait(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        log: IO[str],
        watch: Callable[[], bool] | None,
        environment: Mapping[str, str],
    ) -> tuple[int, bool]:
        own = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        process = subprocess.Popen(
            list(map(str, arguments)),
            cwd=folder,
            env=own | {"TOKENIZERS_PARALLELISM": "false"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        seen, deadline = watch is None, float("inf")
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, 0 if watch is None else os.WNOHANG)
                if pid:
                    break
                if watch is not None and not seen and watch():
                    seen, deadline = True, time.monotonic() + STOP_S
                if time.monotonic() > deadline:
                    raise StageError(f"{shlex.join(map(str, arguments))}\nhas not ended {STOP_S:.0f} s after a signal")
                time.sleep(POLL_S)
        except BaseException:  # of Ctrl-C, the command knows too, and may save
            process.terminate()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        self.peak = max(self.peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        return process.returncode, seen


class SignalAtStep:
    """Sends a signal to the process that owns the newest run of a folder, once it has logged a training step.

    Attributes:
        text: metrics.jsonl at that moment.
    """

    def __init__(self, root: Path, name: str, step: int, number: signal.Signals, to_parent: bool = False) -> None:
        """`root` is the folder of runs, `name` the experiment's; `to_parent`: to what started the process instead."""
        self.root, self.name, self.step, self.number, self.to_parent = root, name, step, number, to_parent
        self.text = ""

    def __call__(self) -> bool:
        folders = run_folders(self.root, self.name)
        if not folders or not (folders[-1] / METRICS).is_file():
            return False
        text = (folders[-1] / METRICS).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if max((step for step, _ in training_lines(whole)), default=-1) < self.step:
            return False
        pid = int(json.loads((folders[-1] / OWNER).read_text(encoding="utf-8"))["pid"])
        if self.to_parent:
            pid = int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, check=True).stdout)
        os.kill(pid, self.number)
        self.text = whole
        return True


def training_lines(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Steps and losses of the training lines of a metrics.jsonl."""
    lines = map(json.loads, text.splitlines())
    return [(int(line["step"]), line["train"]) for line in lines if "train" in line]


@dataclass(frozen=True)
class Stage:
    """One stage of the rehearsal.

    Attributes:
        name: also the name of its log.
        seconds: duration on two busy CPU cores with made-up parts, for the time that is left.
        run: runs its commands and says what was checked.
    """

    name: str
    seconds: float
    run: Callable[[Commands], str]


@dataclass
class Record:
    """What stages have done, in a file that is complete at every moment.

    Attributes:
        settings: what the stages depend on.
        done: by stage: seconds, peak memory in bytes, and what was checked.
    """

    file: Path
    settings: dict[str, Any]
    done: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, file: Path, settings: dict[str, Any]) -> "Record":
        """The record of an earlier call with the same settings, or an empty one.

        Raises:
            ValueError: if the folder is that of a rehearsal with other settings.
        """
        if not file.is_file():
            return cls(file, settings, {})
        content = json.loads(file.read_text(encoding="utf-8"))
        former = content["settings"]
        for key in {**former, **settings}:
            if former.get(key) != settings.get(key):
                raise ValueError(
                    f"{file.parent} holds a rehearsal with {key}={former.get(key)!r}, now {settings.get(key)!r}: "
                    "delete the folder, or name another by --out"
                )
        return cls(file, settings, content["stages"])

    def add(self, stage: str, entry: dict[str, Any]) -> None:
        """Adds a complete stage."""
        self.done[stage] = entry
        content = {"settings": self.settings, "stages": self.done}
        write_atomic(self.file, json.dumps(content, indent=2) + "\n")


def run_stages(stages: Sequence[Stage], record: Record, folder: Path, estimate: bool) -> None:
    """Runs the stages that are not complete, and prints when one begins and ends.

    Args:
        stages: in order.
        record: of an earlier call, or a new one.
        folder: where their commands start.
        estimate: whether to print the time that is left.

    Raises:
        StageError: naming the stage, its log and the reason; complete stages stay.
    """
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        entry = record.done.get(stage.name)
        if entry is not None:
            print(f"{head}: complete since {entry['finished']}", flush=True)
            continue
        commands = Commands(record.file.parent / "logs" / f"{stage.name.replace(' ', '-')}.log", folder)
        left = f"about {minutes_left(stages, record.done)} min left, " if estimate else ""
        print(f"{head}: {left}log in {commands.log}", flush=True)
        began = time.monotonic()
        try:
            checked = stage.run(commands)
        except (StageError, ValueError, OSError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
            last = "\n".join(commands.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
            place = f"stage {number}, {stage.name}, failed: {reason}\nits log: {commands.log}"
            raise StageError(f"{last}\n{place}; the same command goes on from this stage") from error
        seconds, finished = round(time.monotonic() - began, 1), time.strftime("%Y-%m-%d %H:%M:%S")
        entry = {"seconds": seconds, "peak": commands.peak, "checked": checked, "finished": finished}
        record.add(stage.name, entry)
        print(f"{head}: {seconds:.0f} s, {commands.peak / GIB:.1f} GiB: {checked}", flush=True)


def minutes_left(stages: Sequence[Stage], done: Mapping[str, Mapping[str, Any]]) -> int:
    """Minutes of the stages that are not complete, by the speed of the complete ones."""
    known = [(stage.seconds, done[stage.name]["seconds"]) for stage in stages if stage.name in done]
    expected, measured = (sum(values) for values in zip(*known, strict=True)) if known else (1.0, 1.0)
    left = sum(stage.seconds for stage in stages if stage.name not in done)
    return max(1, round(left * measured / expected / 60))


def table(stages: Sequence[Stage], done: Mapping[str, Mapping[str, Any]]) -> str:
    """Stages, seconds, peak memory and what was checked, in Markdown."""
    lines = ["| stage | seconds | peak memory of a process | checked |", "|---|---:|---:|---|"]
    for stage in stages:
        entry = done[stage.name]
        lines.append(f"| {stage.name} | {entry['seconds']:.0f} | {entry['peak'] / GIB:.1f} GiB | {entry['checked']} |")
    total = sum(done[stage.name]["seconds"] for stage in stages)
    peak = max(done[stage.name]["peak"] for stage in stages)
    return "\n".join([*lines, f"| **total** | {total:.0f} | {peak / GIB:.1f} GiB | |"])
