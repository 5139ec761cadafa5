"""CUDA graphs of a decoder's step, which replace hundreds of kernel launches by one.

Shapes: `B` sequences, `D` width.
"""

import sys
from collections.abc import Callable, Hashable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

# Steps before a capture, so that nothing compiles, loads or autotunes during it.
WARM_UP = 3
_CAPTURE_LOCK = Lock()  # a stream can take part in one capture at a time


class StepGraphs:
    """The graphs of one cache, each captured at the first use of its key.

    A replay uses the memory of its capture: the cache, a copy of the ids, and a pool that these graphs share, since
    steps follow each other. A result is therefore valid until the next step. Caches have separate pools.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._refused = False

    def run(self, key: Hashable, step: Callable[[Tensor], Tensor], ids_B: Tensor) -> Tensor:
        """Hidden states (B, D): `step(ids_B)`, which may depend on the key and on tensor values only.

        A capture repeats the step, so its writes must be idempotent.
        """
        if key not in self._graphs and not self._refused:
            try:
                self._graphs[key] = self._capture(step, ids_B)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refused = True
                cause = error.__context__ or error  # the first error, not the failed end of the capture
                _warn_once("generation continues without CUDA graphs (slower): " + str(cause).partition("\n")[0])
        if key not in self._graphs:
            return step(ids_B)
        graph, own_B, out_BD = self._graphs[key]
        own_B.copy_(ids_B)
        graph.replay()
        return out_BD

    def _capture(self, step: Callable[[Tensor], Tensor], ids_B: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        graph, own_B = torch.cuda.CUDAGraph(), ids_B.clone()
        outer, inner = torch.cuda.current_stream(ids_B.device), _side_stream(ids_B.device)
        with _CAPTURE_LOCK, torch.cuda.stream(inner):
            inner.wait_stream(outer)
            for _ in range(WARM_UP):
                step(own_B)
            # thread_local: other threads (a loader's, the web page's) may use the device meanwhile.
            with torch.cuda.graph(graph, self._pool, inner, capture_error_mode="thread_local"):
                out_BD = step(own_B)
        outer.wait_stream(inner)
        return graph, own_B, out_BD


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _warn_once(message: str) -> None:
    print(message, file=sys.stderr)
