"""What the ranks of a run tell each other, and the verdict on a rank that ends the run for all.

A `Beat` says how far a rank's main thread has come; a `Ledger` notes when beats and progress arrived, by the clock of
the process that reads them.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from t2i_lm.storage.owner import has_ended

# Where a rank's main thread is, for messages. The first two are short: a rank that stays there without progress for
# `rank_s` is stuck. All others may take `phase_s`.
PHASES = {
    "training": "in step {step}",
    "drawing": "reading the batch of step {step}",
    "fetching": "fetching the batch of step {step}",
    "first step": "in step {step}, its first",
    "compiling": "compiling in step {step}",
    "building": "building the model and the data",
    "meeting": "waiting for the other ranks",
    "starting": "before its first step",
    "validating": "validating after step {step}",
    "saving": "saving step {step}",
    "measuring": "in work after step {step}",
    "evaluating": "in the evaluation",
}
SHORT = ("training", "drawing")
# Seconds of silence after which a rank counts as stopped where connections to some rank broke, or where a signal asked
# the run to stop: launchers kill 30 s after a SIGTERM.
CUT_S, SIGNALLED_S = 5.0, 15.0
# Seconds that a rank has to end by itself after another has failed, which often is the same error.
GRACE_S = 3.0
# Seconds for the last beat of a process that has ended.
GONE_S = 2.5


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        rank: of the process.
        host: name of its machine, for messages.
        machine: identifies the machine's boot and process namespace.
        pid: process id.
        born: start of the process, which tells it from a later one with the same id.
        number: counts beats.
        place: counts the points that every rank passes in the same order.
        moves: counts all progress of the main thread.
        phase: key of `PHASES`.
        step: optimizer step that is under way, or after which the rank works.
        slowest: longest time in seconds between two signs of progress in a short phase.
        signal: number of a signal that asked it to stop; 0: none.
        cut: whether its connections to another rank broke.
        ended: None while it runs; empty after its last collective; else why it failed.
    """

    rank: int
    host: str
    machine: str
    pid: int
    born: str | None
    number: int = 0
    place: int = 0
    moves: int = 0
    phase: str = "building"
    step: int = 0
    slowest: float = 0.0
    signal: int = 0
    cut: bool = False
    ended: str | None = None

    def where(self) -> str:
        """What its main thread does, for messages."""
        return PHASES[self.phase].format(step=self.step)

    @classmethod
    def loads(cls, text: str | bytes) -> Self:
        """From JSON."""
        return cls(**json.loads(text))

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
        text: the reason, naming ranks.
        ranks: the ranks at fault.
        stopped: last beats of those that no longer answer, whose processes may still exist.
        stuck: whether they answer but make no progress.
    """

    text: str
    ranks: tuple[int, ...]
    stopped: tuple[Beat, ...] = ()
    stuck: bool = False

    @classmethod
    def loads(cls, text: str | bytes) -> Self:
        """From JSON."""
        content = json.loads(text)
        stopped = tuple(Beat(**beat) for beat in content.pop("stopped"))
        return cls(**content | {"ranks": tuple(content["ranks"]), "stopped": stopped})

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign of life, and without progress in a long phase."""

    rank_s: float
    phase_s: float


@dataclass
class _Entry:
    beat: Beat
    heard: float  # when the last beat arrived
    moved: float  # when the last progress arrived
    failed: float = 0.0  # when its failure arrived


@dataclass
class Ledger:
    """Last beats of some ranks.

    Attributes:
        watched: the ranks that this process judges: rank 0 all of them, every other one rank 0.
        world: number of ranks.
        limits: as configured.
        meeting: address where ranks meet, for messages.
        started: when the process began to wait for them.
        machine: of this process.
        children: processes that this one launched, by rank.
    """

    watched: Iterable[int]
    world: int
    limits: Limits
    meeting: str
    started: float
    machine: str
    children: Mapping[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    entries: dict[int, _Entry] = field(default_factory=dict)
    _gone_since: dict[int, float] = field(default_factory=dict)

    def note(self, beat: Beat, now: float) -> None:
        """Notes a beat that was read at `now`."""
        entry = self.entries.get(beat.rank)
        if entry is None:
            self.entries[beat.rank] = _Entry(beat, now, now, now)
            return
        if beat.number != entry.beat.number:
            entry.heard = now
        if (beat.moves, beat.place) != (entry.beat.moves, entry.beat.place):
            entry.moved = now
        if beat.ended is not None and entry.beat.ended is None:
            entry.failed = now
        entry.beat = beat

    def away(self, seconds: float) -> None:
        """Discounts a time in which this process was stopped itself."""
        self.started += seconds
        for entry in self.entries.values():
            entry.heard += seconds
            entry.moved += seconds
            entry.failed += seconds

    def verdict(self, now: float, mine: Beat) -> Verdict | None:
        """The rank that ends the run, if any; `mine` is this process's beat."""
        running = {rank: entry for rank, entry in self.entries.items() if entry.beat.ended is None}
        return (
            self._failed(now, mine)
            or self._gone(running, now)
            or self._silent(running, now, mine)
            or self._absent(now)
            or self._stuck(running, now)
        )

    def _failed(self, now: float, mine: Beat) -> Verdict | None:
        failed = [entry for entry in self.entries.values() if entry.beat.ended]
        if not failed or (not mine.cut and now - min(entry.failed for entry in failed) < GRACE_S):
            return None
        first = min(failed, key=lambda entry: entry.failed).beat
        return Verdict(f"{self.name(first)} failed {first.where()}: {first.ended}", (first.rank,))

    def _gone(self, running: Mapping[int, _Entry], now: float) -> Verdict | None:
        """Processes of this machine, of which the system knows more than their silence."""
        texts = {}
        for rank, entry in running.items():
            beat = entry.beat
            if beat.machine == self.machine and has_ended(beat.pid, beat.born):
                texts[rank] = f"{self.name(beat)} has died, last seen {beat.where()}"
        for rank, process in self.children.items():
            code = process.poll()
            if code is not None and rank not in self.entries:
                name = f"rank {rank} of {self.world} (process {process.pid})"
                texts[rank] = f"{name} ended with code {code} before it met the others"
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in texts}
        # Its last beat, which may name the reason, is read meanwhile.
        dead = [rank for rank, since in self._gone_since.items() if now - since >= GONE_S]
        return Verdict(texts[dead[0]], tuple(dead)) if dead else None

    def _silent(self, running: Mapping[int, _Entry], now: float, mine: Beat) -> Verdict | None:
        beats = [mine, *(entry.beat for entry in running.values())]
        limit = self.limits.rank_s
        if any(beat.signal for beat in beats):
            limit = min(limit, SIGNALLED_S)
        if any(beat.cut for beat in beats):
            limit = min(limit, CUT_S)
        silent = [
            entry.beat for rank, entry in running.items() if now - entry.heard > limit and rank not in self._gone_since
        ]
        if not silent:
            return None
        key = f" (trainer.rank_timeout={limit:g})" if limit == self.limits.rank_s else ""
        text = self._each(f"not answered for {limit:g} s{key}, last seen {{where}}", silent)
        return Verdict(text, tuple(beat.rank for beat in silent), tuple(silent))

    def _absent(self, now: float) -> Verdict | None:
        waited = now - self.started
        absent = [rank for rank in self.watched if rank not in self.entries]
        # It may still import its packages from a slow file system, or finish the run before this one.
        if not absent or waited <= self.limits.phase_s:
            return None
        text = (
            f"{_ranks(absent)} of {self.world} did not arrive at {self.meeting} within {waited:.0f} s "
            f"(trainer.phase_timeout={self.limits.phase_s:g}): not started, ended before, or without a connection"
        )
        return Verdict(text, tuple(absent))

    def _stuck(self, running: Mapping[int, _Entry], now: float) -> Verdict | None:
        """Ranks behind all others, where none of them moves: the others wait for them."""
        if set(self.watched) - set(self.entries) or len(running) < 2 or self._gone_since:
            return None
        last = min(entry.beat.place for entry in running.values())
        behind = [entry for entry in running.values() if entry.beat.place == last]
        slowest = max(entry.beat.slowest for entry in running.values())
        idle = [now - entry.moved for entry in behind]
        limits = [self._patience(entry.beat.phase, slowest) for entry in behind]
        if any(seconds <= limit for seconds, limit in zip(idle, limits, strict=True)):
            return None
        beats = [entry.beat for entry in behind]
        ahead = [rank for rank, entry in running.items() if entry.beat.place > last]
        waits = f", while {_ranks(ahead)} wait{'s' if len(ahead) == 1 else ''}" if ahead else ""
        text = self._each(f"made no progress for {min(idle):.0f} s, {{where}}{waits}", beats)
        return Verdict(text, tuple(beat.rank for beat in beats), stuck=True)

    def _patience(self, phase: str, slowest: float) -> float:
        """Seconds without progress: in a short phase twice the longest that was seen, if that is more."""
        return max(self.limits.rank_s, 2 * slowest) if phase in SHORT else self.limits.phase_s

    def name(self, beat: Beat) -> str:
        """A rank for messages, with host and process."""
        return f"rank {beat.rank} of {self.world} ({beat.host}, process {beat.pid})"

    def _each(self, text: str, beats: Iterable[Beat]) -> str:
        first, *more = beats
        others = f" and {_ranks([beat.rank for beat in more])}" if more else ""
        return f"{self.name(first)}{others} {'have' if more else 'has'} {text.format(where=first.where())}"


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
