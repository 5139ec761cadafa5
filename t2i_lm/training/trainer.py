"""Lightning's Trainer of a run."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy

from callbacks import DurableCheckpointIO, EventLog, MetricsFile, RunCheckpoints, WallTime
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SHARDED
from t2i_lm.experiment.build import Experiment
from t2i_lm.runtime.devices import precision, uses_gpu
from t2i_lm.runtime.loggers import build_logger
from t2i_lm.runtime.rank_watch import RankWatch
from t2i_lm.storage.run_folder import CHECKPOINTS
from t2i_lm.training.callbacks import callbacks_for
from t2i_lm.training.intervals import validation_interval
from t2i_lm.training.ranks import WatchedDDP, WatchedShards, cluster
from t2i_lm.training.resumption import ChangedOptimizer
from t2i_lm.training.sharded_strategy import ShardedStrategy

# Warnings that do not apply: loading is no bottleneck, the data module resumes exactly, the module itself adds the
# targets to a batch, and the newer option of DDP synchronizes buffers at the start.
QUIET = (
    ".*does not have many workers.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    "The number of training batches.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`broadcast_buffers` is deprecated.*",
    "You have overridden .on_before_batch_transfer. in .LightningModule.*",
)


def build_strategy(config: ExperimentConfig, watch: RankWatch | None) -> Strategy | str:
    """The strategy of `trainer.strategy`, with a watch over several processes; `auto` is DDP for these."""
    trainer = config.trainer
    if trainer.strategy in SHARDED:
        return ShardedStrategy() if watch is None else WatchedShards(watch)
    if trainer.strategy == "ddp" or trainer.processes > 1:
        # Buffers are constant tables, or counts that the module reduces itself. Broadcasting them in every forward
        # would also hang a validation in which ranks have different numbers of batches.
        # An image tokenizer does not use its codebook at first.
        unused = config.task == "image_tokenizer"
        if watch is None:
            return DDPStrategy(broadcast_buffers=False, find_unused_parameters=unused)
        return WatchedDDP(watch, broadcast_buffers=False, find_unused_parameters=unused)
    return "auto"


def build_trainer(
    experiment: Experiment,
    folder: Path,
    events: EventLog,
    resumed: bool,
    record: dict[str, Any] | None = None,
    allowed: Sequence[str] = (),
    purge: int | None = None,
    watch: RankWatch | None = None,
) -> pl.Trainer:
    """The Trainer of a run with its callbacks. A new run is validated before its first step, a resumed one is not.

    Args:
        experiment: what to train.
        folder: run folder.
        events: its log.
        resumed: whether a checkpoint will be loaded.
        record: is written into every checkpoint.
        allowed: keys that may differ from the checkpoint's.
        purge: as in `build_logger`.
        watch: over the ranks, if there are several.

    Raises:
        ValueError: if the files of a measurement cannot be used.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    config = experiment.config
    trainer = config.trainer
    changed = [ChangedOptimizer()] if any(key.startswith(("optim.", "trainer.max_steps")) for key in allowed) else []
    return pl.Trainer(
        max_steps=trainer.max_steps,
        accelerator="cuda" if uses_gpu(trainer.accelerator) else "cpu",
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=build_strategy(config, watch),
        precision=precision(config),  # type: ignore[arg-type]
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=validation_interval(trainer) * trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        logger=build_logger(config, folder, purge),
        callbacks=[*changed, *callbacks_for(experiment, folder, events, record, watch)],
        default_root_dir=folder / CHECKPOINTS,  # where Lightning looks for its own checkpoints of Slurm, and finds none
        plugins=[DurableCheckpointIO(), cluster(trainer.processes)],
        use_distributed_sampler=False,
        num_sanity_val_steps=0 if resumed else -1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def seconds_trained(trainer: pl.Trainer) -> float:
    """Training time over all sessions of a run; of a killed session, up to its last checkpoint."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback.seconds for callback in callbacks if isinstance(callback, WallTime))


def metrics_files(trainer: pl.Trainer) -> list[MetricsFile]:
    """metrics.jsonl as this process writes it; empty on ranks that do not."""
    if not trainer.is_global_zero:
        return []
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one.metrics for one in callbacks if isinstance(one, RunCheckpoints) and one.metrics is not None]
