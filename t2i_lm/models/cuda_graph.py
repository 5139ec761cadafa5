"""CUDA graphs of a decoder's step: its hundreds of launches become one.

Shapes: `B` sequences, `D` width.
"""

import sys
from collections.abc import Callable, Hashable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

# Steps before a capture: what compiles, loads or tunes itself at its first calls must not do so during it.
WARM_UP = 3
_CAPTURING = Lock()  # a stream takes part in one capture at a time


class StepGraphs:
    """The graphs of one cache, each captured when its key is first met.

    A replay reads and writes the memory of its capture: the cache's, a copy of the ids, and a pool that these graphs
    share, as one step is over before the next. So a result is gone with the next step. Caches share no pool:
    guidance reads the results of two together.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._refused = False

    def run(self, key: Hashable, step: Callable[[Tensor], Tensor], ids_B: Tensor) -> Tensor:
        """Hidden states (B, D): `step(ids_B)`, which must depend on nothing but the key and values of tensors.

        A capture repeats the step: it must write the same each time.
        """
        if key not in self._graphs and not self._refused:
            try:
                self._graphs[key] = self._capture(step, ids_B)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refused = True
                cause = error.__context__ or error  # what went wrong, not that the capture could not end well
                _say("drawing goes on without CUDA graphs, slower: " + str(cause).partition("\n")[0])
        if key not in self._graphs:
            return step(ids_B)
        graph, own_B, out_BD = self._graphs[key]
        own_B.copy_(ids_B)
        graph.replay()
        return out_BD

    def _capture(self, step: Callable[[Tensor], Tensor], ids_B: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        graph, own_B = torch.cuda.CUDAGraph(), ids_B.clone()
        outer, inner = torch.cuda.current_stream(ids_B.device), _side_stream(ids_B.device)
        with _CAPTURING, torch.cuda.stream(inner):
            inner.wait_stream(outer)
            for _ in range(WARM_UP):
                step(own_B)
            # Other threads (a loader's, the demo's page) may use the device meanwhile: their work is not captured.
            with torch.cuda.graph(graph, self._pool, inner, capture_error_mode="thread_local"):
                out_BD = step(own_B)
        outer.wait_stream(inner)
        return graph, own_B, out_BD


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _say(message: str) -> None:
    """Once, however many caches there are."""
    print(message, file=sys.stderr)
