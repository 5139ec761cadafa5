"""The boundary at which a user's file is opened: whatever a library raises there becomes one line."""

import errno
import os
import pickle
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

# Set to 1, errors that end a command show their traceback too.
DEBUG = "T2I_LM_DEBUG"
# A full disk, an exhausted quota, a limit on the size of a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Faults of the system or of a network file system: the same file may be read a moment later.
PASSING = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH),
)
# Packages whose ValueErrors are already messages for users.
OWN = ("t2i_lm.", "callbacks.")
# In place of torch's message, which advises to load with weights_only=False: that would run the code in the file.
UNPICKLED = "it holds more than tensors, or is damaged, and is not loaded"
# Characters of a library's message that are shown.
LONGEST = 400
# Faults of code rather than of a file, and a full memory.
_PASSED = (AssertionError, NameError, MemoryError)
_MEMORY = ("out of memory", "OutOfMemoryError")


class SpecialFileError(OSError):
    """A FIFO, device or socket in place of a file: reading it may wait or go on for ever."""


_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_lasting(error: BaseException, name: str) -> None:
    """Passes an error of a file, and raises anew one of memory or of the system, which says nothing about the file.

    Raises:
        MemoryError: if the memory is exhausted.
        ValueError: if the system failed (`PASSING`), naming the file.
    """
    if isinstance(error, MemoryError):
        raise MemoryError(f"{name}: the memory is exhausted") from error
    if isinstance(error, OSError) and error.errno in PASSING:
        raise ValueError(f"{name} cannot be read now: {os.strerror(error.errno)}; start again once it can") from error


def require_regular(path: str | os.PathLike[str]) -> None:
    """Checks that reading a path ends; a folder, and a path without a file, are left to the reader.

    Raises:
        SpecialFileError: if it is a FIFO, device or socket.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise SpecialFileError(f"{name}, not a regular file")


def require_regular_files(path: str | os.PathLike[str]) -> None:
    """`require_regular` of a path and, if it is a folder, of everything below it.

    Raises:
        ValueError: naming the first that is none.
    """
    found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in sorted(names)]
    for file in (path, *found):
        try:
            require_regular(file)
        except SpecialFileError as error:
            raise ValueError(f"{os.fspath(file)} is {error}") from error


@contextmanager
def reading(key: str, path: str | Path) -> Iterator[None]:
    """Turns any error inside into a ValueError that names the key and the file.

    Messages of this suite stay as they are. Errors of code, such as a failed assertion, and of memory pass through; a
    file whose sizes do not fit into memory is a MemoryError with its name.

    Args:
        key: the config key or option that names the file.
        path: the file or folder.
    """
    try:
        yield
    except Exception as error:
        if (full := _full_disk(error)) is not None:
            raise full from None
        # Sizes in the file ask for more memory than there is.
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            raise MemoryError(f"{key}: {path} cannot be read: {reason(error)}") from error
        if isinstance(error, _PASSED) or _is_own(error) or any(sign in f"{type(error)} {error}" for sign in _MEMORY):
            raise
        raise ValueError(f"{key}: {path} cannot be read: {reason(error)}{_hint()}") from error


def reason(error: BaseException) -> str:
    """The message of an error in one line, with its type where the message alone says little."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return UNPICKLED
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if text and (isinstance(error, ValueError) or type(error) in (RuntimeError, Exception)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shows_traceback() -> bool:
    """Whether errors show their traceback."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk behind another: of a library that writes a cache while it reads."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _hint() -> str:
    return "" if shows_traceback() else f" ({DEBUG}=1 shows where)"


def _is_own(error: Exception) -> bool:
    """Whether this suite raised a ValueError itself; JSON and Unicode errors are subclasses of ValueError."""
    return type(error) is ValueError and _module(error.__traceback__).startswith(OWN)


def _module(trace: TracebackType | None) -> str:
    """The module that raised."""
    name = ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return name
