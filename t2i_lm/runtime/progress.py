"""How far long work is: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

# Called with how many more items are done.
Told = Callable[[int], None]
# Seconds between lines.
TELL_EVERY = 10.0


def lines(what: str, items: int | None, rank: int = 0, world: int = 1, unit: str = "pictures") -> Told:
    """Lines on stderr with the rate and what is left, from rank 0 for all ranks; `items` of all, None where unknown."""
    started, done, told, ended = time.monotonic(), 0, 0.0, False

    def tell(more: int) -> None:
        nonlocal done, told, ended
        done += more
        now = time.monotonic()
        shown = done * world if items is None else min(items, done * world)
        last = shown == items and not ended  # said once, whatever the time: other ranks may go on
        if rank or (now - told < TELL_EVERY and not last):
            return
        told, ended = now, ended or last
        rate = shown / max(now - started, 1e-9)
        if items is None:
            said = f"{shown:,} {unit}, {rate:.3g} a second"
        else:
            left = timedelta(seconds=round((items - shown) / rate))
            said = f"{shown:,} of {items:,} {unit}, {rate:.3g} a second, {left} left"
        print(f"{what}: {said}", file=sys.stderr, flush=True)

    return tell


@contextmanager
def progress(what: str, items: int | None, rank: int = 0, unit: str = "pictures") -> Iterator[Told]:
    """`lines` of this process's items, or a bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lines(what, items, rank, unit=unit)
        return
    from rich.progress import Progress

    with Progress(disable=rank > 0) as bar:
        task = bar.add_task(what, total=items)
        yield lambda more: bar.advance(task, more)
