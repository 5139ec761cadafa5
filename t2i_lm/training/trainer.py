"""The Trainer of an experiment with all its callbacks. Alone imports `callbacks`."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from callbacks import (
    CocoFID,
    DurableCheckpointIO,
    EMASplitPerplexity,
    EventLog,
    FidTask,
    Forgetting,
    Inception,
    NonFiniteGuard,
    Preemption,
    RngState,
    RunCheckpoints,
    RunProgress,
    RunScalars,
    SampleBatch,
    SampleGrid,
    Throughput,
    WallTime,
)
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SHARDED
from t2i_lm.models.flops import peak_flops
from t2i_lm.runtime.devices import device_name, precision
from t2i_lm.runtime.loggers import build_logger
from t2i_lm.storage.run_folder import CHECKPOINTS, FID, METRICS, SAMPLES
from t2i_lm.training.sharded_strategy import ShardedStrategy

# Warnings of Lightning that do not hold here: loading is no bottleneck, the data module resumes exactly, and it is the
# module that completes a batch.
QUIET = (
    ".*does not have many workers.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    "The number of training batches.*",
    ".*isinstance.treespec, LeafSpec.*",
    "You have overridden .on_before_batch_transfer. in .LightningModule.*",
)


def peak(config: ExperimentConfig) -> float | None:
    """Operations a second that the device at hand does at most in the run's precision, where this is known."""
    name = device_name(config)
    return peak_flops(name) if name is not None and precision(config) == "bf16-mixed" else None


def build_strategy(config: ExperimentConfig) -> Strategy | str:
    """How processes share a run, by `trainer.strategy`; several processes are `ddp` where it does not say."""
    trainer = config.trainer
    if trainer.strategy in SHARDED:
        return ShardedStrategy()
    if trainer.strategy == "ddp" or trainer.devices * trainer.num_nodes > 1:
        # Buffers are tables, or counts that the module adds up itself: broadcasting them in every forward would also
        # hang a validation in which ranks have different numbers of batches.
        return DDPStrategy(broadcast_buffers=False)
    return "auto"


def build_trainer(
    config: ExperimentConfig,
    folder: Path,
    events: EventLog,
    resumed: bool,
    draw: Callable[[], SampleBatch] | None = None,
    fid: tuple[FidTask, Inception] | None = None,
    measure: Callable[[pl.LightningModule], dict[str, Any]] | None = None,
    flop_per_token: float | None = None,
) -> pl.Trainer:
    """The Trainer of a run, with all callbacks. A new run is validated once before its first step.

    `draw` gives the samples of `samples.interval`, `fid` what `fid.interval` compares, `measure` the probes of
    `forgetting.interval`; `flop_per_token` is what MFU is reckoned by.

    Order matters: throughput before the meter that asks it; the guard before the meters; progress
    after the meter that it shows; random state after all that draw; the saver last, when all have seen the step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    trainer = config.trainer
    metrics = folder / METRICS
    throughput = Throughput(flop_per_token, peak(config))
    meter: EMASplitPerplexity | RunScalars
    if config.task == "image_tokenizer":
        meter = RunScalars(config.log.interval, metrics)
    else:
        meter = EMASplitPerplexity(config.log.interval, config.log.ema, metrics, extras=[throughput])
    saver = RunCheckpoints(folder / CHECKPOINTS, trainer.checkpoint_interval, metrics=meter.file, events=events)
    preemption = Preemption(saver)
    callbacks: list[pl.Callback] = [
        throughput,
        preemption,
        NonFiniteGuard(events=events),
        meter,
        RunProgress(meter, config.log.interval, throughput=throughput),
        WallTime(),
        RngState(config.seed, events),
        saver,
    ]
    if draw is not None and config.samples.interval and isinstance(meter, EMASplitPerplexity):
        callbacks.insert(-2, SampleGrid(config.samples.interval, draw, folder / SAMPLES, meter))
    if fid is not None and config.fid.interval and isinstance(meter, EMASplitPerplexity):
        callbacks.insert(-2, CocoFID(config.fid.interval, *fid, folder / FID, meter, preemption))
    if measure is not None and config.forgetting.interval and isinstance(meter, EMASplitPerplexity):
        callbacks.insert(-2, Forgetting(config.forgetting.interval, measure, meter))
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    return pl.Trainer(
        max_steps=trainer.max_steps,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=build_strategy(config),
        precision=precision(config),  # type: ignore[arg-type]
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=min(trainer.val_check_interval, trainer.max_steps) * trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        logger=build_logger(config, folder),
        callbacks=callbacks,
        plugins=[DurableCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0 if resumed else -1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def seconds_trained(trainer: pl.Trainer) -> float:
    """How long a run has trained, over all its sessions; of one that was killed, up to its last checkpoint."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback.seconds for callback in callbacks if isinstance(callback, WallTime))
