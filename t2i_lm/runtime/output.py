"""Standard output and error that never end a run, and through which no file name controls the terminal."""

import io
import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


class LastingOutput(io.FileIO):
    """A file descriptor that drops what it cannot write any more: its reader is gone, or its disk is full."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: "Buffer") -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


# Control characters but tab and line feed, and those that turn the direction of a text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Packages whose output may move the cursor and set colors.
TERMINAL_PACKAGES = ("rich", "tqdm")


def escaped(text: str) -> str:
    """A text whose control characters are written as escapes, as names of files and tensors may hold them."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class EscapingOutput(io.TextIOWrapper):
    """A text stream to which `TERMINAL_PACKAGES` alone write control characters; all else is `escaped`."""

    def write(self, text: str, /) -> int:
        if _CONTROLS.search(text) is not None:
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if caller.partition(".")[0] not in TERMINAL_PACKAGES:
                super().write(escaped(text))
                return len(text)
        return super().write(text)


def lasting(stream: TextIO | None, original: TextIO | None) -> TextIO:
    """A standard stream whose writes never raise, or that stream itself where a notebook or a test has replaced it.

    Characters that its encoding lacks, and control characters, are written as escapes.
    """
    if stream is None:  # closed by the shell
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    if stream is not original or isinstance(getattr(stream.buffer, "raw", None), LastingOutput):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream
    try:
        raw = LastingOutput(stream.fileno())
    except OSError:  # no descriptor
        return stream
    stream.flush()
    # Lines are written at once on a terminal, and on stderr.
    buffered = io.BufferedWriter(raw)
    at_once = raw.isatty() or original is sys.__stderr__
    return EscapingOutput(buffered, stream.encoding, "backslashreplace", line_buffering=at_once)


def last_to_the_end() -> None:
    """Makes standard output and error `lasting`."""
    sys.stdout = lasting(sys.stdout, sys.__stdout__)
    sys.stderr = lasting(sys.stderr, sys.__stderr__)
