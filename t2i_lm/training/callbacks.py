"""Callbacks of a run, in the order in which they run."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks import (
    BatchReading,
    CocoFID,
    Dashboard,
    EMASplitPerplexity,
    EventLog,
    Forgetting,
    NonFiniteGuard,
    Preemption,
    RankProgress,
    RngState,
    RunCheckpoints,
    RunProgress,
    RunRecord,
    RunScalars,
    SampleGrid,
    Throughput,
    WallTime,
)
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import flatten, to_yaml
from t2i_lm.evaluation.fid import training_fid
from t2i_lm.evaluation.forgetting import forgetting_probes
from t2i_lm.evaluation.report import sampler
from t2i_lm.experiment.build import Experiment
from t2i_lm.models.flops import flop_per_token, peak_flops
from t2i_lm.modules.base import DecoderModule
from t2i_lm.plots.live import live_figures
from t2i_lm.runtime.devices import device_name, precision
from t2i_lm.runtime.rank_watch import RankWatch
from t2i_lm.storage.run_folder import CHECKPOINTS, FID, METRICS, SAMPLES, logged_position
from t2i_lm.training.intervals import even_interval
from t2i_lm.training.ranks import collective_timeout

# Keys in TensorBoard's table of hyperparameters by column. TensorBoard sorts columns by name and shows the first five.
HYPERPARAMETERS = {
    "arm": "name",
    "backbone": "backbone.path",
    "init": "init",
    "lr": "optim.lr",
    "seed": "seed",
    "set: batch_size": "data.batch_size",
    "set: distil": "distil.weight",
    "set: l2_sp": "optim.l2_sp",
    "set: lora": "lora.rank",
    "set: new_rows": "new_rows",
    "set: positions": "backbone.positional",
    "set: replay": "data.replay_ratio",
    "set: steps": "trainer.max_steps",
    "set: text_weight": "loss.text_weight",
    "set: train_size": "data.train_size",
    "set: tune": "tune",
}


def callbacks_for(
    experiment: Experiment,
    folder: Path,
    events: EventLog,
    record: dict[str, Any] | None = None,
    watch: RankWatch | None = None,
) -> list[pl.Callback]:
    """All callbacks of a run in `folder`; `record` is written into every checkpoint, `watch` is over the ranks.

    Raises:
        ValueError: if the files of `fid` cannot be used.
    """
    config = experiment.config
    interval, metrics = config.log.interval, folder / METRICS
    throughput = Throughput(training_flop(experiment), peak(config))
    # Runs of text-to-image and of other tasks share a dashboard.
    prefix = "" if config.task == "text_to_image" else f"{config.task}/"
    # Modules with `modalities` split their loss (callbacks.base.contract); the others report scalars.
    has_split_loss = hasattr(experiment.module, "modalities")
    splits = experiment.data.validation_splits
    perplexity = None
    if has_split_loss:
        perplexity = EMASplitPerplexity(interval, config.log.ema, metrics, [throughput], splits, prefix)
    meter = perplexity or RunScalars(interval, metrics, splits)
    every, kept = config.trainer.checkpoint_interval, config.trainer.keep_steps
    timeout = None if watch is None else collective_timeout(watch.limits)
    saver = RunCheckpoints(
        folder / CHECKPOINTS, every, metrics=meter.file, events=events, keep_steps=kept, timeout=timeout
    )
    preemption = Preemption(saver, timeout)
    return [
        # First, as the next in the list may wait for other ranks.
        *([] if watch is None else [RankProgress(watch)]),
        # Before the meter, which records it.
        throughput,
        # Before callbacks that work long in `on_train_start`: a signal before is answered at the first step.
        preemption,
        # Before the meters: a step that it stops at is not measured.
        NonFiniteGuard(events=events, skip_above=config.trainer.skip_loss_above, samples=experiment.data.sample_names),
        meter,
        # After the meter, whose latest values it shows.
        RunProgress(meter, interval, throughput=throughput),
        WallTime(),
        # After the meter, whose lines it draws.
        _dashboard(experiment, folder),
        # After the meter, so that a step's training line comes first in metrics.jsonl.
        *(_measurements(experiment, folder, perplexity, preemption) if perplexity else ()),
        *([RunRecord(record)] if record is not None else []),
        # After all callbacks that use random numbers.
        RngState(config.seed, events),
        *([] if watch is None else [BatchReading(watch, lambda: experiment.data.train_set.announce is not None)]),
        # Last: a step can be saved once every callback has seen it.
        saver,
    ]


def _dashboard(experiment: Experiment, folder: Path) -> Dashboard:
    """The TensorBoard dashboard of a run."""
    config = experiment.config
    values = flatten(config)
    command = " \\\n    ".join(map(shlex.quote, ["python", *sys.orig_argv[1:]]))
    texts = {"command": command, "config": to_yaml(config)}
    row = {name: "none" if values[key] is None else values[key] for name, key in HYPERPARAMETERS.items()}
    splits, place = experiment.data.validation_splits, partial(logged_position, folder)
    return Dashboard(splits, row, texts, partial(live_figures, folder), place)


def _measurements(
    experiment: Experiment, folder: Path, meter: EMASplitPerplexity, preemption: Preemption
) -> list[pl.Callback]:
    """The measurements that the config requests: samples, FID, forgetting."""
    config = experiment.config
    samples, fid, probes = sampler(experiment), training_fid(experiment), forgetting_probes(experiment, folder)
    callbacks: list[pl.Callback] = []
    if config.samples.interval and samples:
        callbacks.append(SampleGrid(config.samples.interval, samples, folder / SAMPLES, meter))
    if config.fid.interval and fid:
        callbacks.append(CocoFID(config.fid.interval, *fid, folder / FID, meter, preemption))
    if config.forgetting.interval and probes:
        every = even_interval(config.forgetting.interval, config.trainer.max_steps)
        callbacks.append(Forgetting(every, probes, meter))
    return callbacks


def training_flop(experiment: Experiment) -> float | None:
    """FLOP per token of forward and backward; None without a language model."""
    module = experiment.module
    return flop_per_token(module.decoder, module.nominal_length) if isinstance(module, DecoderModule) else None


def peak(config: ExperimentConfig) -> float | None:
    """Peak FLOP/s of the run's GPU in the run's precision, for MFU; None if unknown."""
    name = device_name(config)
    return peak_flops(name) if name is not None and precision(config) == "bf16-mixed" else None
