"""Wall time of a run over all its sessions."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class WallTime(Callback):
    """Seconds since setup, plus those of earlier sessions up to the checkpoint that this one resumes.

    Work that a killed session did after its last checkpoint is repeated and counts once.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds until now, including validations and measurements of callbacks."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._started is None:  # a validation after the last step sets up again
            self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = float(state_dict["seconds"])
