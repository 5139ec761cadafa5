"""The watch over the ranks of a run: a dead, stopped or stuck one ends the run on all others, which name it.

A thread on each rank writes a beat every second into the store where the process group meets, over a connection of
its own, so it needs neither the collectives nor another port. Rank 0 reads all beats and writes back its own with the
verdict; the others judge rank 0 alone. Times are compared within one process, never between two clocks.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lightning.fabric.utilities.distributed import _destroy_dist_connection
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistError

from t2i_lm.runtime.rank_beats import GRACE_S, PHASES, SHORT, Beat, Ledger, Limits, Verdict
from t2i_lm.storage.owner import Owner, has_ended

if TYPE_CHECKING:
    import subprocess

# Seconds between beats; less where `rank_s` is short.
BEAT_S = 1.0
# Seconds that rank 0 waits for the others to read why the run ends, and that a process has for its last words.
LINGER_S, LAST_WORDS_S = 10.0, 5.0
# Signals at which a run saves and stops.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# In errors of collectives whose peer is gone.
PEER_GONE = ("gloo/transport", "Connection closed by peer", "Connection reset", "NCCL", "ncclRemoteError")
BOARD = "board"
# Phases whose longest step of progress counts for the patience in short ones.
MEASURED = (*SHORT, "first step")
# Stores that this process hosts, kept for its later process groups; and the number of runs so far, in keys.
_hosted: dict[int, Any] = {}
_runs = 0


def _forget_signals() -> None:
    """Workers that read data inherit the pipe of signals, and must not write theirs into it."""
    if _runs:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_signals)


class RankWatch:
    """The watch of one process, which `open` starts and the end of a `with` block ends.

    Attributes:
        advice: what follows the verdict on the terminal, such as how to go on.
        last_words: called with the verdict before this process ends, in a thread with `LAST_WORDS_S`.
        signalled: number of the last signal that asked this rank to stop; 0: none.
    """

    def __init__(self, rank: int, world: int, limits: Limits) -> None:
        owner = Owner.of_this_process()
        self.rank, self.world, self.limits = rank, world, limits
        self.advice: Callable[[], str] = lambda: "all ranks stop"
        self.last_words: Callable[[str], None] = lambda text: None
        self.signalled = 0
        self._me = Beat(rank, owner.host, owner.machine, owner.pid, owner.born)
        # Where the main thread is, in plain attributes: a beat per hook would cost more than all the rest.
        self._phase, self._step, self._place, self._moves, self._slowest = "building", 0, 0, 0, 0.0
        self._cut = False
        self._ended: str | None = None
        self._interval = min(BEAT_S * max(1, world / 500), limits.rank_s / 5)
        self._moved_at = time.monotonic()
        self._main = threading.main_thread().ident
        self._ledger: Ledger | None = None
        self._verdict: Verdict | None = None
        self._acknowledged: set[int] = set()
        self._known = threading.Event()  # the others have read rank 0's last beat or verdict
        self._over = False  # this rank ends by itself
        self._signals: int | None = None
        self._before_compiling = "training"
        self._closed = threading.Event()
        self._ending = threading.Lock()  # of this process, by either thread
        self._ledger_lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def open(self, address: str, port: int, children: "Mapping[int, subprocess.Popen[bytes]] | None" = None) -> None:
        """Begins to watch; rank 0 opens the store at `address`, unless torchrun has.

        Raises:
            ValueError: if the port is in use.
        """
        global _runs
        _runs += 1
        meeting = f"{address}:{port}"
        now = time.monotonic()
        watched = range(self.world) if self.rank == 0 else (0,)
        machine = self._me.machine
        self._ledger = Ledger(watched, self.world, self.limits, meeting, now, machine, children or {})
        if self.rank == 0 and not _agent_serves(address, port) and port not in _hosted:
            try:
                _hosted[port] = TCPStore(
                    address, port, self.world, is_master=True, wait_for_workers=False, multi_tenant=True
                )
            except (DistError, RuntimeError) as error:
                raise ValueError(f"MASTER_PORT={port}: ranks cannot meet at {meeting}: {_line(error)}") from error
        if threading.current_thread() is threading.main_thread():
            # Python calls a handler once the main thread is out of a collective; this pipe tells of a signal at once.
            self._signals, writing = os.pipe()
            os.set_blocking(self._signals, False)
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        prefix = f"ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_runs}"
        for target in (lambda: self._talk(address, port, prefix), self._judge):
            self._threads.append(threading.Thread(target=target, name="watch over ranks", daemon=True))
            self._threads[-1].start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Notes that the main thread is at the next of the points that all ranks pass in the same order."""
        assert phase in PHASES
        self._place += 1
        self._step = self._step if step is None else step
        self._move(phase)

    def moved(self) -> None:
        """Notes that the main thread gets on in its phase; ranks may differ in how often."""
        self._move(self._phase)

    def compiling(self, begins: bool) -> None:
        """Notes that a compilation begins or ends within a step."""
        if begins:
            self._before_compiling = self._phase
        self._move("compiling" if begins else self._before_compiling)

    def _move(self, phase: str) -> None:
        now = time.monotonic()
        if self._phase in MEASURED:
            self._slowest = max(self._slowest, now - self._moved_at)
        self._phase, self._moved_at = phase, now
        self._moves += 1

    def _beat(self, number: int = 0) -> Beat:
        """This rank's beat now."""
        return replace(
            self._me,
            number=number,
            place=self._place,
            moves=self._moves,
            phase=self._phase,
            step=self._step,
            slowest=self._slowest,
            signal=self.signalled,
            cut=self._cut,
            ended=self._ended,
        )

    def stop(self) -> None:
        """Ends the watch, after the last collective."""
        self._leave("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the watch; after an error of this rank the others end, too.

        After an error that another rank caused, this process ends in here, as soon as it is known which.
        """
        if error is not None:
            # At exit, Lightning shuts NCCL down, which waits for ranks that end in a collective.
            atexit.unregister(_destroy_dist_connection)
        if error is not None and is_peer_gone(error):
            self._cut = True
            if self._signals is not None:
                # A launcher that has seen the other rank end sends it at once; this rank ends anyway, after its line.
                signal.signal(signal.SIGTERM, lambda number, frame: None)
            self._closed.wait(2 * LINGER_S)
        self._leave("" if error is None else _line(error))

    def _leave(self, reason: str) -> None:
        with self._ending:  # not given back by a verdict, which ends this process
            if self._over or not self._threads:
                return
            self._over = True
        if self._signals is not None:
            os.close(signal.set_wakeup_fd(-1))
        self._ended = reason
        if self.rank == 0:  # it hosts the store, and its end must not be taken for a death
            self._known.wait(LINGER_S)
        self._closed.set()
        for thread in self._threads:
            thread.join(LAST_WORDS_S)
        if self._signals is not None:
            os.close(self._signals)

    def _talk(self, address: str, port: int, prefix: str) -> None:
        store: Any = None
        number = 0
        while True:
            last = self._closed.is_set()
            try:
                store = store or self._connect(address, port, prefix)
                if store is not None:
                    number += 1
                    self._exchange(store, number)
            except (DistError, RuntimeError, OSError):
                store = None  # rank 0's silence is judged
            if last:
                return
            self._closed.wait(self._interval)

    def _connect(self, address: str, port: int, prefix: str) -> Any:
        if self.rank == 0 and port in _hosted:
            return PrefixStore(prefix, _hosted[port])
        with suppress(OSError), socket.create_connection((address, port), timeout=self._interval):
            # Only then, since the store's own attempts print warnings.
            store = TCPStore(
                address,
                port,
                self.world,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.limits.rank_s),
            )
            return PrefixStore(prefix, store)
        return None

    def _exchange(self, store: Any, number: int) -> None:
        """Writes this rank's beat, and reads those that it judges."""
        beat = self._beat(number)
        ledger = self._ledger
        assert ledger is not None
        if self.rank > 0:
            store.set(str(self.rank), beat.dumps())
            if not store.check([BOARD]):
                return
            board = json.loads(store.get(BOARD))
            with self._ledger_lock:
                ledger.note(Beat.loads(board["beat"]), time.monotonic())
            if board["verdict"] is not None or ledger.entries[0].beat.ended is not None:
                store.set(f"read/{self.rank}", "")
            if board["verdict"] is not None and self._verdict is None:
                self._verdict = Verdict.loads(board["verdict"])
            return
        verdict = self._verdict
        store.set(BOARD, json.dumps({"beat": beat.dumps(), "verdict": verdict and verdict.dumps()}))
        with self._ledger_lock:
            known = {0, *ledger.entries}
        arrived = [rank for rank in range(1, self.world) if rank in known or store.check([str(rank)])]
        if arrived:
            beats = [Beat.loads(text) for text in store.multi_get([str(rank) for rank in arrived])]
            with self._ledger_lock:
                for one in beats:
                    ledger.note(one, time.monotonic())
        with self._ledger_lock:
            ledger.note(beat, time.monotonic())
        if verdict is not None or beat.ended is not None:
            self._await_readers(store, verdict)

    def _await_readers(self, store: Any, verdict: Verdict | None) -> None:
        """Sets `_known` once every rank that still can has read why the run ends."""
        assert self._ledger is not None
        over = {rank for rank, entry in self._ledger.entries.items() if entry.beat.ended is not None}
        if verdict:
            over |= set(range(self.world)) - set(self._ledger.entries)
            over |= set() if verdict.stuck else set(verdict.ranks)
        waiting = [rank for rank in range(1, self.world) if rank not in over | self._acknowledged]
        self._acknowledged |= {rank for rank in waiting if store.check([f"read/{rank}"])}
        if set(waiting) <= self._acknowledged:
            self._known.set()

    def _judge(self) -> None:
        ledger, before = self._ledger, time.monotonic()
        assert ledger is not None
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - before > 2 * self._interval + min(1.0, self.limits.rank_s / 4):
                with self._ledger_lock:  # this process was stopped itself, and cannot tell what the others did
                    ledger.away(now - before)
            before = now
            self._read_signals()
            with self._ledger_lock:
                verdict = self._verdict or ledger.verdict(now, self._beat())
            if self.signalled and self._phase == "meeting" and now - self._moved_at > GRACE_S:
                by = f"by {signal.Signals(self.signalled).name} while waiting for the other ranks"
                verdict = verdict or Verdict(f"{ledger.name(self._me)} was stopped {by}", ())
            if verdict is not None and not self._over:
                self._end(verdict)

    def _read_signals(self) -> None:
        with suppress(OSError):
            numbers = [] if self._signals is None else os.read(self._signals, 64)
            self.signalled = next((number for number in numbers if number in STOPPING), self.signalled)

    def _end(self, verdict: Verdict) -> None:
        """Says why, and ends this process; its main thread may be inside a collective."""
        with self._ending:
            if self._over:
                return
            self._verdict = verdict
            if self.rank == 0:
                self._known.wait(LINGER_S / 2)
            number = self.signalled
            text = verdict.text
            if number and verdict.ranks:
                text += f"; {signal.Signals(number).name} was received, and this rank cannot save without it"
            _bounded(lambda: self._say(text, self.rank in verdict.ranks and verdict.stuck))
            _bounded(lambda: self.last_words(text))
            _bounded(lambda: self._kill(verdict))
            os._exit(128 + number if number else 1)

    def _say(self, text: str, stuck_here: bool) -> None:
        advice = ""
        with suppress(Exception):
            advice = f". {self.advice()}"
        where = ""
        if stuck_here and self._main in (frames := sys._current_frames()):
            where = "".join(["\n", *traceback.format_stack(frames[self._main])[-4:]]).rstrip()
        os.write(2, f"error: {text}{advice}{where}\n".encode())
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()

    def _kill(self, verdict: Verdict) -> None:
        """Ends stopped ranks of this machine, and processes that this one launched: no other process would."""
        for beat in verdict.stopped:
            if beat.machine == self._me.machine and not has_ended(beat.pid, beat.born):
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        assert self._ledger is not None
        deadline = time.monotonic() + LAST_WORDS_S / 2
        for process in self._ledger.children.values():
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()


def is_peer_gone(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, here or in a cause of the error."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, DistError):
            return True
        if isinstance(one, RuntimeError) and any(sign in str(one) for sign in PEER_GONE):
            return True
        one = one.__cause__ or one.__context__
    return False


def _agent_serves(address: str, port: int) -> bool:
    """Whether torchrun's agent hosts the store."""
    environment = os.environ.get
    by_agent = environment("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return by_agent and (environment("MASTER_ADDR"), environment("MASTER_PORT")) == (address, str(port))


def _line(error: BaseException) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _bounded(work: Callable[[], None]) -> None:
    """Calls `work` in a thread, and leaves it after `LAST_WORDS_S`: files may lie on what does not answer."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LAST_WORDS_S)
