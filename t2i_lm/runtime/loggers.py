"""The logger of a run, and Markdown texts beside its curves."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import flatten
from t2i_lm.runtime.lasting_loggers import LastingCSVLogger, LastingTensorBoardLogger
from t2i_lm.storage.run_folder import logged_position


def build_logger(config: ExperimentConfig, folder: Path, purge: int | None = None) -> Logger | bool:
    """The logger of `log.logger`; metrics.jsonl is written in any case.

    Args:
        config: the experiment.
        folder: its run folder.
        purge: place on the axis (`logged_position`) from which the logger drops what an earlier session wrote.
    """
    name = config.log.logger
    if name == "tensorboard":
        return LastingTensorBoardLogger(
            save_dir=folder, name="", version="tb", default_hp_metric=False, purge_step=purge
        )
    if name == "csv":
        return LastingCSVLogger(save_dir=folder, name="", version="csv", purge=purge)
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        label = f"{config.name}/{folder.name}"
        # A resumed run continues its own curves; the path tells runs of equal names apart.
        unique = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        return WandbLogger(
            project="t2i_lm",
            name=label,
            save_dir=folder,
            id=f"{label.replace('/', '-')}-{unique}",
            resume="allow",
            config=flatten(config),
        )
    return False


def require_logger(name: str) -> None:
    """Checks that the package of a logger is installed.

    Raises:
        ValueError: if it is not.
    """
    if name == "wandb" and find_spec("wandb") is None:
        raise ValueError("log.logger=wandb: requires wandb, which is not installed: pip install wandb")


def add_text(config: ExperimentConfig, folder: Path, tag: str, markdown: str) -> None:
    """Adds a text to a run's TensorBoard at its last step, unless there is one; does nothing under another logger."""
    if config.log.logger != "tensorboard":
        return
    logger = build_logger(config, folder)
    assert isinstance(logger, TensorBoardLogger)
    step = logged_position(folder, config.trainer.max_steps)
    if step not in _steps(Path(logger.log_dir), f"{tag}/text_summary"):
        logger.experiment.add_text(tag, markdown, step)
        logger.finalize("success")


def _steps(folder: Path, tag: str) -> set[int]:
    """Steps at which a TensorBoard folder has a text; those of a resumed run's earlier session remain."""
    if not folder.is_dir():
        return set()
    events: Any = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {event.step for event in events.Tensors(tag)} if tag in events.Tags()["tensors"] else set()
