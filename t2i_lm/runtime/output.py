"""Standard output and error that never end a run: no character and no closed pipe is an error."""

import io
import os
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


def lasting(stream: TextIO | None, original: TextIO | None) -> TextIO:
    """A standard stream whose writes never raise, or that stream itself where a notebook or a test has replaced it.

    Characters that its encoding lacks are written as escapes.
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
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", line_buffering=at_once)


def last_to_the_end() -> None:
    """Makes standard output and error `lasting`."""
    sys.stdout = lasting(sys.stdout, sys.__stdout__)
    sys.stderr = lasting(sys.stderr, sys.__stderr__)
