"""How long a run has trained, over all its sessions."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class WallTime(Callback):
    """Seconds since training was set up, and those of earlier sessions up to the checkpoint that this one continues.

    What a killed session did after its last checkpoint is done again, and counts once.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Up to now; validations and what callbacks measure are in it."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts the clock; a validation after the last step goes on with it."""
        if self._started is None:
            self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The seconds up to this checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts on."""
        self._before = float(state_dict["seconds"])
