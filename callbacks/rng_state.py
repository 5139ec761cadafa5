"""State of the random generators in the checkpoint, per rank."""

import hashlib
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from callbacks.base.interval_sums import distributed
from callbacks.files.event_log import EventLog


class RngState(Callback):
    """Saves Python's, NumPy's and torch's generators of every rank, and restores them before the first step.

    Lightning saves none. The saved state is that at the end of the last step and its validation, not at the moment
    of saving: by then the next batch may have been loaded, and a resumed run loads it again. With another number of
    ranks each rank is seeded from (seed, step, rank) instead, which is logged in `events`. Generators in loader workers
    always restart: a dataset's random choices must be a function of (seed, epoch, index). In a new run, ranks after the
    first are seeded likewise: equal until training starts, so that they build equal models.

    List it last, so that the state includes what other callbacks sample at the end of a step.
    """

    def __init__(self, seed: int = 0, events: EventLog | None = None) -> None:
        self.seed, self.events = seed, events
        self._restored: list[dict[str, Any]] | None = None
        self._trainer: pl.Trainer | None = None
        self._after_step: dict[str, Any] | None = None
        self._after_validation: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """States of all ranks; every rank must call it."""
        # Resuming a checkpoint from inside a validation repeats the whole validation.
        validating = self._trainer is not None and self._trainer.validating
        latest = self._after_step if validating else self._after_validation or self._after_step
        mine = _plain(latest or _collect())
        states: list[Any] = [mine]
        if distributed():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, mine)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["ranks"]  # applied when training starts: setup uses the generators

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        states, self._restored = self._restored, None
        if states is not None and len(states) == trainer.world_size:
            _restore(states[trainer.global_rank])
        elif states is not None:
            _reseed(self.seed, trainer.global_step, trainer.global_rank)
            if self.events and trainer.is_global_zero:
                text = f"{len(states)} -> {trainer.world_size} ranks at step {trainer.global_step}"
                self.events.write("reseeded", f"{text}: random generators restart from the seed")
        elif trainer.global_rank:
            _reseed(self.seed, trainer.global_step, trainer.global_rank)
        self._after_step, self._after_validation = _collect(), None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._after_step, self._after_validation = _collect(), None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._after_validation = _collect()


def _collect() -> dict[str, Any]:
    """The raw states, not yet converted because it is called every step."""
    # Not `is_available`, which queries the driver each time.
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu else None,
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The states in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    return state | {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def _restore(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _reseed(seed: int, step: int, rank: int) -> None:
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    random.seed(digest)
    np.random.seed(list(digest))
    torch.manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
