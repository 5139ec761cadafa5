"""A file that grows by whole items, on a disk that may be full for a while."""

import os
from contextlib import suppress
from pathlib import Path

from callbacks.files.disk import named, tell


class AppendedFile:
    """Items (lines, records) that cannot be written wait in memory, and are written later, in order and whole.

    Of an outage, its begin and its end are told in a line each. A part of an item that reached the disk is cut off,
    if not at once then before the next item.

    Attributes:
        path: of the file.
        waiting: bytes of the items that wait.
    """

    def __init__(self, path: Path, items: str, limit: int, drops: bool = False, makes_folder: bool = False) -> None:
        """Writes nothing yet.

        Args:
            path: of the file.
            items: what they are, in messages.
            limit: bytes that may wait.
            drops: whether more are dropped; else they end the run.
            makes_folder: whether the folder of the file is created.
        """
        self.path, self.items, self.limit, self.drops, self.makes_folder = path, items, limit, drops, makes_folder
        self.waiting = self.dropped = 0
        self._queue: list[bytes] = []
        self._told = False
        # Where the file ends without the remains of a failed write or a kill; None if there are none.
        self._end: int | None = None

    def add(self, item: bytes) -> None:
        """Adds an item for the next `write`."""
        if self.drops and self.waiting + len(item) > self.limit:
            self.dropped += 1
        else:
            self._queue.append(item)
            self.waiting += len(item)

    def write(self, durable: bool = False) -> None:
        """Writes what waits; `durable` syncs the file.

        Raises:
            OSError: naming the file; what is not written waits on.
        """
        if not self._queue and not durable:
            return
        try:
            self._write(durable)
        except OSError as error:
            raise named(error, self.path) from error
        if self._told:
            self._told = False
            lost = f"; {self.dropped} were more than may wait and are lost" if self.dropped else ""
            tell(f"{self.path}: the {self.items} that waited are written{lost}")
            self.dropped = 0

    def try_to_write(self) -> bool:
        """Writes what waits, if that is possible; else says why it is not, the first time, and returns False.

        Raises:
            OSError: if more waits than may, and items are not dropped.
        """
        try:
            self.write()
        except OSError as error:
            if not self.drops and self.waiting > self.limit:
                raise
            if not self._told:
                self._told = True
                tell(f"{error}; {self.items} are written later, and the run goes on")
            return False
        return True

    def size(self) -> int:
        """Bytes of the file including what waits."""
        written = self.path.stat().st_size if self.path.is_file() else 0
        return (written if self._end is None else min(written, self._end)) + self.waiting

    def cut_torn_line(self) -> None:
        """Has what follows the last line break, as a kill may leave it, cut off before the next item is written.

        Raises:
            OSError: if the file cannot be read.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._end = whole

    def forget(self) -> None:
        """Drops what waits."""
        self._queue, self.waiting, self._end, self._told = [], 0, None, False

    def _write(self, durable: bool) -> None:
        if self.makes_folder:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        start, done, whole = os.fstat(handle).st_size, 0, 0
        try:
            try:
                if self._end is not None and start > self._end:
                    start = self._end
                    os.ftruncate(handle, start)
                left = memoryview(b"".join(self._queue))
                try:
                    while left:
                        written = os.write(handle, left)
                        done, left = done + written, left[written:]
                except OSError:
                    whole = self._whole(done)
                    raise
                if durable:
                    os.fsync(handle)
            finally:
                try:
                    os.close(handle)  # where a network file system tells that its disk is full
                except OSError:
                    whole = 0
                    raise
        except OSError:
            self._end = start + self._drop_first(whole)
            with suppress(OSError):
                os.truncate(self.path, self._end)
            raise
        self._queue, self.waiting, self._end = [], 0, None

    def _whole(self, size: int) -> int:
        """Number of items that `size` bytes hold whole."""
        for number, item in enumerate(self._queue):
            size -= len(item)
            if size < 0:
                return number
        return len(self._queue)

    def _drop_first(self, items: int) -> int:
        """Removes written items; their bytes."""
        size = sum(map(len, self._queue[:items]))
        self._queue = self._queue[items:]
        self.waiting -= size
        return size
