"""A copy of a checkpoint in memory, from which it is written while training goes on."""

import copy
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from callbacks.files.available_memory import available_memory
from callbacks.files.nested import leaves, mapped

# Each storage begins at a multiple of this.
ALIGNMENT = 64
# Memory that must be available, as a multiple of the copy.
MARGIN = 1.1
# Bytes taken in advance beyond the state of model and optimizer, for random generators and counters.
SLACK = 2**24
PORTABLE = 1  # flag of `cudaHostRegister`: pinned for every device


class NoMemoryError(Exception):
    """The copy of a checkpoint does not fit into memory."""


class Staging:
    """Memory of the copy, kept from one save to the next: taking it from the system costs more than the copy.

    One anonymous mapping that workers forked later do not inherit; pinned where a GPU is in use. `prepare` takes it in
    a thread, so that the first save need not.
    """

    def __init__(self, sharers: int = 1) -> None:
        """`sharers` is the number of processes on this machine that each take as much."""
        self.sharers = sharers
        self._memory: mmap.mmap | None = None
        self._pinned = False
        self._preparing: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Bytes held."""
        return len(self._memory) if self._memory is not None else 0

    def prepare(self, content: Any) -> None:
        """Takes the memory for a copy of `content` and what is added to it in a thread.

        Raises:
            NoMemoryError: if it is not available.
        """
        self._take(bytes_of(content) + SLACK)

    def copy(self, content: Any) -> Any:
        """`content` with its strided tensors copied into this memory, which invalidates the copy before.

        Tensors that share a storage still do; everything else is copied as by `copy.deepcopy`.

        Raises:
            NoMemoryError: if the memory is not available.
        """
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        size = bytes_of(content)
        if size > self.size:
            self._take(size, wait=True)
        storages, start = {}, 0
        for storage in _storages(content):
            storages[storage._cdata] = self._copied(storage, start)
            start += _aligned(storage.nbytes())

        def rebuilt(tensor: Tensor) -> Tensor:
            storage = storages[tensor.untyped_storage()._cdata]
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            new = torch.empty(0, dtype=tensor.dtype).set_(storage, *place)
            return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

        staged = mapped(content, _is_plain, rebuilt, copy.deepcopy)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return staged

    def release(self) -> None:
        """Gives the memory back; the last copy must no longer be in use."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address())  # type: ignore[no-untyped-call]
            self._pinned = False
        self._memory = None

    def _copied(self, storage: torch.UntypedStorage, start: int) -> torch.UntypedStorage:
        size = storage.nbytes()
        if size == 0:
            return torch.empty(0, dtype=torch.uint8).untyped_storage()
        assert self._memory is not None
        there = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=start)
        here = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if storage.device.type == "cpu":
            # By one thread, which is as fast as memory is: several would wait for each other on busy cores (2 GB in
            # 2 to 5 s by two threads, 0.5 to 0.8 s by one).
            there.numpy()[:] = here.numpy()
        else:
            there.copy_(here, non_blocking=self._pinned)
        return there.untyped_storage()

    def _take(self, size: int, wait: bool = False) -> None:
        self.release()
        free = available_memory()
        if free is not None and free < size * MARGIN * self.sharers:
            raise NoMemoryError(
                f"{size * self.sharers / 1e9:.2f} GB for a copy of the checkpoint, {free / 1e9:.2f} GB available"
            )
        if size == 0:
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._memory = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise NoMemoryError(f"{size / 1e9:.2f} GB for a copy of the checkpoint: {error.strerror}") from error
        if hasattr(mmap, "MADV_DONTFORK"):
            self._memory.madvise(mmap.MADV_DONTFORK)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        thread = threading.Thread(target=self._touch, args=(self._memory, device), name="checkpoint memory")
        thread.start()
        if wait:
            thread.join()
        else:
            self._preparing = thread

    def _touch(self, memory: mmap.mmap, device: int | None) -> None:
        np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 0
        if device is not None:
            torch.cuda.set_device(device)
            code = torch.cuda.cudart().cudaHostRegister(self._address(), len(memory), PORTABLE)  # type: ignore[no-untyped-call]
            self._pinned = int(code) == 0  # otherwise the copy is slower

    def _address(self) -> int:
        return torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()


def bytes_of(content: Any) -> int:
    """Bytes of the storages in `content`, each counted once."""
    return sum(_aligned(storage.nbytes()) for storage in _storages(content))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _storages(content: Any) -> Iterator[torch.UntypedStorage]:
    seen = set()
    for tensor in filter(_is_plain, leaves(content)):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )
