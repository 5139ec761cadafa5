"""Progress reporting: a Rich bar on a terminal, periodic log lines otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

# Called with the number of items finished since the last call.
Advance = Callable[[int], None]
# Seconds between log lines.
LOG_EVERY_S = 10.0
# Called at each sign of progress, also of other processes that this one waits for.
listeners: list[Callable[[], None]] = []


def going_on() -> None:
    """Tells the listeners that long work makes progress."""
    for listener in listeners:
        listener()


def log_progress(what: str, items: int | None, rank: int = 0, world: int = 1, unit: str = "images") -> Advance:
    """Log lines on stderr with rate and ETA, printed by rank 0 for all ranks.

    Args:
        what: the work, as in `tokenizing train`.
        items: number of items of all ranks; None if unknown.
        rank: of this process.
        world: number of processes, assumed to advance alike.
        unit: plural name of the items.
    """
    started = time.monotonic()
    logged, done, ended = started, 0, False

    def advance(more: int) -> None:
        nonlocal done, logged, ended
        going_on()
        done += more
        now = time.monotonic()
        shown = done * world if items is None else min(items, done * world)
        last = shown == items and not ended  # always logged, but once: other ranks may continue
        if rank or (now - logged < LOG_EVERY_S and not last):
            return
        logged, ended = now, ended or last
        rate = shown / max(now - started, 1e-9)
        speed = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"
        if items is None:
            print(f"{what}: {shown:,} {unit}, {speed}", file=sys.stderr, flush=True)
        else:
            left = timedelta(seconds=round((items - shown) / rate))
            print(f"{what}: {shown:,}/{items:,} {unit}, {speed}, ETA {left}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def progress(what: str, items: int | None, rank: int = 0, unit: str = "images") -> Iterator[Advance]:
    """A bar if stderr is a terminal, else `log_progress`, for this process's items."""
    if not sys.stderr.isatty():
        yield log_progress(what, items, rank, unit=unit)
        return
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(disable=rank > 0) as bar:
        task = bar.add_task(escape(what), total=items)

        def advance(more: int) -> None:
            going_on()
            bar.advance(task, more)

        yield advance
