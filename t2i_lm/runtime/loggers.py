"""The logger of a run, and Markdown texts beside its curves."""

from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.runtime.lasting_loggers import LastingCSVLogger, LastingTensorBoardLogger


def build_logger(config: ExperimentConfig, folder: Path, purge: int | None = None) -> Logger | bool:
    """The logger of `log.logger`; metrics.jsonl is written in any case.

    Args:
        config: the experiment.
        folder: its run folder.
        purge: place on the axis (`logged_position`) from which TensorBoard drops what an earlier session wrote.
    """
    name = config.log.logger
    if name == "tensorboard":
        return LastingTensorBoardLogger(
            save_dir=folder, name="", version="tb", default_hp_metric=False, purge_step=purge
        )
    if name == "csv":
        return LastingCSVLogger(save_dir=folder, name="", version="csv")
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="t2i_lm", name=folder.name, save_dir=folder)
    return False


def write_text(config: ExperimentConfig, folder: Path, tag: str, markdown: str) -> None:
    """Adds a text to a run's TensorBoard; does nothing under another logger."""
    logger = build_logger(config, folder)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, markdown)
        logger.finalize("success")
