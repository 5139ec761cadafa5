"""One run from its config to its report: folder, training, checkpoints, summary."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch

from callbacks import EventLog, MetricsFile, Preempted, find_resumable
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import save_experiment
from t2i_lm.config.sections import SHARDED
from t2i_lm.data.datamodules import make_sampler
from t2i_lm.evaluation.fid import training_fid
from t2i_lm.evaluation.forgetting import BASELINE, forgetting_probes
from t2i_lm.evaluation.report import sampler, write_report
from t2i_lm.experiment.build import Experiment, ImageExperiment, build
from t2i_lm.experiment.restore import load_trained
from t2i_lm.models.aligned_rows import resolve_aligned_rows
from t2i_lm.models.cross_entropy import loss_backend
from t2i_lm.models.factory import weights_hashes
from t2i_lm.models.flops import flop_per_token, formula
from t2i_lm.models.freeze import group_table, overlaps
from t2i_lm.modules.base import DecoderModule
from t2i_lm.runtime.devices import device_name, global_rank, is_out_of_memory, memory_advice, precision, require_device
from t2i_lm.runtime.plugins import plugin_identities
from t2i_lm.runtime.seeds import generator
from t2i_lm.storage.run_folder import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    EVENTS,
    GROUPS,
    METRICS,
    environment,
    new_run_folder,
    read_run,
)
from t2i_lm.training.trainer import build_trainer, seconds_trained

# A launched rank finds the folder that rank 0 made here.
FOLDER_VARIABLE = "T2I_LM_RUN_FOLDER"
# Steps whose draws are hashed into env.json, to show that two arms see one stream.
STREAM_STEPS = 1000


def run(config: ExperimentConfig, folder: Path | None, resume: bool) -> int:
    """Trains an experiment; returns the exit code."""
    require_device(config.trainer)
    loss_backend(config.loss.backend)
    config = resolve_aligned_rows(config)
    experiment = build(config)
    inherited = os.environ.get(FOLDER_VARIABLE)
    main_rank = inherited is None and global_rank() == 0
    if folder is None:
        if main_rank:
            folder = new_run_folder(Path(config.run.dir), config.name, config.scale)
        else:  # only rank 0 writes; under torchrun and srun the others never need the folder's name
            folder = Path(inherited or config.run.dir)
    events = EventLog(folder / EVENTS)
    checkpoint = find_resumable(folder / CHECKPOINTS, events.write if main_rank else None) if resume else None
    if main_rank:
        _open_folder(experiment, folder, events, checkpoint)
    trainer = build_trainer(
        config,
        folder,
        events,
        resumed=checkpoint is not None,
        draw=sampler(experiment),
        fid=training_fid(experiment),
        measure=forgetting_probes(experiment, folder),
        flop_per_token=_flop_per_token(experiment),
    )
    try:
        with _told_to_ranks(folder, main_rank):
            trainer.fit(experiment.module, experiment.data, ckpt_path=checkpoint, weights_only=True)
        _finish(experiment, folder, trainer)
    except Preempted as order:
        if trainer.is_global_zero:
            events.write("preempted", str(order))
            print(f"{order}; saved. Continue with --resume {folder}")
        return order.exit_code
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(memory_advice(config)) from error
    return 0


@contextmanager
def _told_to_ranks(folder: Path, main_rank: bool) -> Iterator[None]:
    """While ranks may be launched."""
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if main_rank:
            del os.environ[FOLDER_VARIABLE]


def _finish(experiment: Experiment, folder: Path, trainer: pl.Trainer) -> None:
    """Validates after the last step, where that was not done, and writes the report."""
    config, trained = experiment.config, int(trainer.global_step)
    validated = trainer.is_global_zero and any(r["step"] == trained for r in read_run(folder).records("val"))
    if not trainer.strategy.broadcast(validated):
        trainer.validate(experiment.module, experiment.data, verbose=False)
    if trainer.is_global_zero:
        if (config.trainer.strategy in SHARDED or config.trainer.fp8) and isinstance(experiment, ImageExperiment):
            # Whole, where what was trained lies in parts on all processes; and without the roundings of float8.
            experiment.module = load_trained(folder).module
        write_report(experiment, folder, trained, wall_s=seconds_trained(trainer))


def _open_folder(experiment: Experiment, folder: Path, events: EventLog, checkpoint: Path | None) -> None:
    """Writes what the run uses, or cuts the metrics back to the checkpoint it continues from."""
    config = experiment.config
    if checkpoint is not None:
        step = int(checkpoint.stem.removeprefix("step-"))
        events.write("resumed", f"from {checkpoint.name}")
        print(f"resuming {folder} from step {step}", flush=True)
        _print_formula(experiment)
        return
    MetricsFile(folder / METRICS).cut_after(-1)
    (folder / BASELINE).unlink(missing_ok=True)  # of a run that never reached a checkpoint
    save_experiment(config, folder / CONFIG)
    experiment.data.setup("fit")
    size = len(experiment.data.train_set)
    samples = min(STREAM_STEPS, config.trainer.max_steps) * config.data.batch_size
    details = environment(
        data_hash=experiment.index.get("data_hash"),
        tokenizers=experiment.index.get("tokenizers"),
        backbone=weights_hashes(config),
        stream_hash=make_sampler(config, size).stream_hash(samples),
        precision=precision(config),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=config.trainer.threads or torch.get_num_threads(),
        new_rows_seed=generator(config.seed, "new rows").initial_seed(),
        train_samples=size,
        parameters=sum(parameter.numel() for parameter in experiment.module.parameters()),
        flop_per_token=_flop_per_token(experiment),
        **({"plugins": plugins} if (plugins := plugin_identities(config)) else {}),
    )
    (folder / ENVIRONMENT).write_text(json.dumps(details, indent=2) + "\n")
    if isinstance(experiment.module, DecoderModule):
        decoder = experiment.module.decoder
        table = "\n".join([group_table(decoder), *overlaps(decoder, config.freeze)])
        _print_formula(experiment)
        (folder / GROUPS).write_text(f"{table}\n")
        if any(not parameter.requires_grad for parameter in experiment.module.parameters()):
            print(table, flush=True)
    print(f"run folder: {folder}", flush=True)


def _print_formula(experiment: Experiment) -> None:
    module = experiment.module
    if isinstance(module, DecoderModule):
        print(formula(module.decoder, module.nominal_length, device_name(experiment.config)), flush=True)


def _flop_per_token(experiment: Experiment) -> float | None:
    module = experiment.module
    return flop_per_token(module.decoder, module.nominal_length) if isinstance(module, DecoderModule) else None
