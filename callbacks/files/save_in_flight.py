"""One checkpoint on its way to the disk, on one rank."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class SaveInFlight:
    """Runs the parts of a save one after the other, in a thread or at once, and keeps what went wrong.

    A thread, not a process: torch's writer, hashing and files release the interpreter's lock (the main thread waited at
    most 8 ms for it while 1 GB went through torch's writer), and a process would need the copy in shared memory, of
    which containers have little. The thread is no daemon: a process that ends for another reason still completes the
    file.

    Attributes:
        path: of the checkpoint.
        hurry: set if somebody waits: what only protects older checkpoints can be left out.
        error: why the save failed, of a type that all ranks can read; no exception leaves the thread.
        part: name and digest of the part that this rank has written.
        main: content of the main file, to be written when all parts are; None if there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hurry = threading.Event()
        self.error: Exception | None = None
        self.part: tuple[str, str] | None = None
        self.main: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None

    def run(self, job: Callable[[], None], background: bool) -> None:
        """Starts a part; the one before must have ended."""
        assert self.done
        if not background:
            self._run(job)
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save {self.path.name}")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the last part has ended."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Waits for the end of the last part."""
        if self._thread is not None:
            self._thread.join()

    def discard(self) -> None:
        """Deletes the part of a save that failed."""
        if self.part is not None:
            with suppress(OSError):  # deleted with others of killed saves
                self.path.with_name(self.part[0]).unlink(missing_ok=True)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except (OSError, TypeError) as error:
            self.error = error
        except Exception as error:
            self.error = RuntimeError(f"checkpoint {self.path}: {type(error).__name__}: {error}")
            self.error.__cause__ = error
