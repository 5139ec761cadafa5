"""What a checkpoint says about the run that wrote it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

RECORD, STATE = "run", "RunCheckpoints"


class RunRecord(Callback):
    """Writes a record of the run, such as digests of its config and data, into every checkpoint.

    A run that resumes is compared with it: files beside a checkpoint can change, the checkpoint itself is verified.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        """`record` holds text, numbers, None, lists and dicts."""
        self.record = record

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RECORD] = self.record


def read_record(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record in a verified checkpoint, and the state of its `RunCheckpoints`, without reading tensors.

    Both are empty in a checkpoint of an older version.
    """
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    return dict(content.get(RECORD, {})), dict(content.get("callbacks", {}).get(STATE, {}))
