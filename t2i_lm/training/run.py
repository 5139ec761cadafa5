"""The life of one run: device checks, build, folder, trainer, fit, validation, report."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks import EventLog, MetricsFile, Preempted
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import save_experiment
from t2i_lm.config.sections import SHARDED
from t2i_lm.data.datamodules import make_sampler
from t2i_lm.evaluation.forgetting import BASELINE, require_texts
from t2i_lm.evaluation.report import write_report
from t2i_lm.experiment.build import Experiment, ImageExperiment, build, conventions
from t2i_lm.experiment.restore import load_trained
from t2i_lm.experiment.shards import data_counts, describe_data, require_whole_captions
from t2i_lm.models.aligned_rows import resolve_aligned_rows
from t2i_lm.models.cross_entropy import loss_backend
from t2i_lm.models.flops import formula
from t2i_lm.models.freeze import group_table, overlaps
from t2i_lm.modules.base import DecoderModule
from t2i_lm.runtime.devices import device_name, is_out_of_memory, memory_advice, require_device
from t2i_lm.runtime.launch import is_first_process, local_rank
from t2i_lm.runtime.loggers import require_logger
from t2i_lm.runtime.rank_watch import RankWatch
from t2i_lm.runtime.seeds import generator
from t2i_lm.runtime.slurm import requeue
from t2i_lm.runtime.threads import threads_of, use_threads
from t2i_lm.storage.owner import Ownership, own, require_free
from t2i_lm.storage.run_folder import (
    CONFIG,
    CONFIG_DIGEST,
    ENVIRONMENT,
    EVENTS,
    GROUPS,
    METRICS,
    OWNER,
    environment,
    logged_position,
    new_run_folder,
    read_environment,
    read_run,
    require_no_links,
)
from t2i_lm.storage.sealed import sealed
from t2i_lm.storage.writing import write_atomic
from t2i_lm.training.callbacks import training_flop
from t2i_lm.training.continuity import require_same_files, require_same_start, started_from
from t2i_lm.training.ranks import prepare_last_words, watch_ranks
from t2i_lm.training.resume import LATEST, require_unfinished
from t2i_lm.training.resumption import (
    VALUES,
    Resumption,
    config_entry,
    config_values,
    find_resumption,
    require_same_config,
    resumption_of_rank_0,
)
from t2i_lm.training.trainer import build_trainer, metrics_files, seconds_trained

# Environment variable with the run folder, for the ranks that Lightning launches from this process.
FOLDER_VARIABLE = "T2I_LM_RUN_FOLDER"
# Steps whose samples are hashed into env.json, as evidence that two arms see the same stream.
STREAM_STEPS = 1000


def run(config: ExperimentConfig, resume: Path | None = None, allowed: Sequence[str] = ()) -> int:
    """Trains an experiment in a new run folder, or continues the run in the folder `resume`.

    `allowed` names config keys and hashes that may differ from those of the run to continue.

    Returns:
        0; after a signal, 128 plus its number.

    Raises:
        ValueError: if this machine, the files or the data do not fit the config, or no checkpoint can be verified.
        MemoryError: if the memory of a GPU or of this machine is exhausted, with the keys that lower its use.
        FloatingPointError: if the gradient stays non-finite.
    """
    with use_threads(threads_of(config.trainer)), watch_ranks(config.trainer) or nullcontext() as watch:
        return _run(config, resume, allowed, watch)


def _run(config: ExperimentConfig, resume: Path | None, allowed: Sequence[str], watch: RankWatch | None) -> int:
    require_device(config.trainer)
    require_logger(config.log.logger)
    loss_backend(config.loss.backend)
    require_texts(config)
    is_main = is_first_process(config.trainer.processes) and FOLDER_VARIABLE not in os.environ
    if is_main:
        for line in config.notes:
            print(line, file=sys.stderr)
    config = resolve_aligned_rows(config)
    resumption = None
    if resume is not None:
        if is_main:
            require_free(resume / OWNER)
            require_no_links(resume)
            resumption = find_resumption(resume, allowed)
            require_same_config(config, resumption)
        else:
            resumption = resumption_of_rank_0(resume, allowed)
        if local_rank() == 0:
            require_same_files(config, resumption)
    experiment = build(config, None if resume is None else read_environment(resume))
    start = started_from(experiment) if is_main or (resume is not None and local_rank() == 0) else {}
    if resumption is not None and local_rank() == 0:
        require_same_start(experiment, start, resumption)
    if is_main:
        for line in describe_data(experiment):
            print(line, flush=True)
    require_whole_captions(experiment)
    folder = resume or _new_folder(config, is_main)
    with own(folder / OWNER) if is_main else nullcontext() as owner:
        return _train(experiment, start, folder, resumption, owner, watch)


def _train(
    experiment: Experiment,
    start: dict[str, Any],
    folder: Path,
    resumption: Resumption | None,
    owner: Ownership | None,
    watch: RankWatch | None,
) -> int:
    is_main = owner is not None
    events = EventLog(folder / EVENTS)
    record: dict[str, Any] = {}
    if is_main and resumption is None:
        _open_folder(experiment, start, folder)
    elif is_main and resumption is not None:
        require_unfinished(folder)  # since this process looked at it first
        resumption.require_current()
        _reopen_folder(experiment, start, resumption, events)
    if is_main:
        record = {VALUES: config_values(experiment.config, folder), **start}
    checkpoint, allowed = (resumption.checkpoint, resumption.allowed) if resumption else (None, ())

    purge = None
    if is_main and resumption is not None:
        purge = logged_position(folder, resumption.step) + 1 if checkpoint else 0
    trainer = build_trainer(experiment, folder, events, checkpoint is not None, record, allowed, purge, watch)
    if watch is not None:
        knows_folder = is_main or resumption is not None or FOLDER_VARIABLE in os.environ
        continued = folder if knows_folder else LATEST
        prepare_last_words(watch, continued, events, trainer.callbacks, owner)  # type: ignore[attr-defined]
    try:
        with _folder_for_launched_ranks(folder):
            trainer.fit(experiment.module, experiment.data, ckpt_path=checkpoint, weights_only=True)
        _validate(experiment, folder, trainer)
        if watch is not None:
            watch.stop()  # rank 0 alone writes the report
        _report(experiment, folder, trainer)
    except Preempted as stop:
        if trainer.is_global_zero:
            events.write("preempted", str(stop))
            print(f"{stop}; {'saved' if stop.step else 'nothing to save'}. Continue with --resume {folder}")
            # Of runs in processes of their own, the first must not requeue the job before the others have saved.
            alone = stop.signal == signal.SIGUSR1 and multiprocessing.parent_process() is None
            if alone and (line := requeue()):
                print(line, flush=True)
        return stop.exit_code
    except SystemExit as stop:  # by Lightning
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(memory_advice(experiment.config)) from error
    finally:
        events.catch_up()
    return 0


def _new_folder(config: ExperimentConfig, is_main: bool) -> Path:
    if is_main:
        return new_run_folder(Path(config.run.dir), config.name, config.scale)
    # Only rank 0 writes: under torchrun and srun, the other ranks do not need the folder's name.
    return Path(os.environ.get(FOLDER_VARIABLE, config.run.dir))


def _open_folder(experiment: Experiment, start: dict[str, Any], folder: Path) -> None:
    """Writes config, environment and parameter groups."""
    config, module = experiment.config, experiment.module
    save_experiment(config, folder / CONFIG)
    experiment.data.setup("fit")
    write_atomic(folder / ENVIRONMENT, json.dumps(sealed(_environment(experiment, start, folder)), indent=2) + "\n")
    if isinstance(module, DecoderModule):
        groups = "\n".join([group_table(module.decoder), *overlaps(module.decoder, config.freeze)])
        _print_model(experiment)
        write_atomic(folder / GROUPS, f"{groups}\n")
        if any(not parameter.requires_grad for parameter in module.parameters()):
            print(groups, flush=True)
    print(f"run folder: {folder}", flush=True)


def _environment(experiment: Experiment, start: dict[str, Any], folder: Path) -> dict[str, object]:
    """Content of env.json: code, versions, hardware, and hashes of everything the run starts from."""
    config = experiment.config
    size = len(experiment.data.train_set)
    samples = min(STREAM_STEPS, config.trainer.max_steps) * config.data.batch_size
    return environment(
        **start,
        stream_hash=make_sampler(config, experiment.data.train_set.part_sizes).stream_hash(samples),
        device=device_name(config) or "cpu",
        threads=torch.get_num_threads(),
        new_rows_seed=generator(config.seed, "new rows").initial_seed(),
        train_samples=size,
        parameters=sum(parameter.numel() for parameter in experiment.module.parameters()),
        flop_per_token=training_flop(experiment),
        conventions=conventions(experiment),
        **{CONFIG_DIGEST: config_entry(folder)},
        **({"data": counts} if (counts := data_counts(experiment)) else {}),
    )


def _reopen_folder(experiment: Experiment, start: dict[str, Any], resumption: Resumption, events: EventLog) -> None:
    for event in resumption.events:
        events.write(*event)
    for change in resumption.changes:
        events.write(
            "mismatch-allowed", f"{change.key}: {change.before} until step {resumption.step}, then {change.now}"
        )
    resumption.write_changes(start, experiment.config)
    if resumption.checkpoint is None:  # step 0 is measured again
        MetricsFile(resumption.folder / METRICS).cut_after(-1)
        (resumption.folder / BASELINE).unlink(missing_ok=True)
    name = resumption.checkpoint.name if resumption.checkpoint else "its start"
    events.write("resumed", f"from {name}")
    print(f"resuming {resumption.folder} from step {resumption.step}", flush=True)
    _print_model(experiment)


def _print_model(experiment: Experiment) -> None:
    module = experiment.module
    for line in conventions(experiment):
        print(line, flush=True)
    if isinstance(module, DecoderModule):
        print(formula(module.decoder, module.nominal_length, device_name(experiment.config)), flush=True)


@contextmanager
def _folder_for_launched_ranks(folder: Path) -> Iterator[None]:
    known = FOLDER_VARIABLE in os.environ  # by a rank that was launched so
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if not known:
            del os.environ[FOLDER_VARIABLE]


def _validate(experiment: Experiment, folder: Path, trainer: pl.Trainer) -> None:
    """Validates the last step, unless the training loop or an earlier session did."""
    last = trainer.global_step
    done = trainer.is_global_zero and any(record["step"] == last for record in read_run(folder).validations())
    if not trainer.strategy.broadcast(done):
        trainer.validate(experiment.module, experiment.data, verbose=False)
    for file in metrics_files(trainer):
        file.sync()  # lines that wait for space on the disk would be missing from the report


def _report(experiment: Experiment, folder: Path, trainer: pl.Trainer) -> None:
    if not trainer.is_global_zero:
        return
    config = experiment.config.trainer
    if (config.strategy in SHARDED or config.fp8) and isinstance(experiment, ImageExperiment):
        # The trained module is sharded over processes, or rounds to float8: the checkpoint has the whole weights.
        experiment = replace(experiment, module=load_trained(folder).module)
    write_report(experiment, folder, int(trainer.global_step), wall_s=seconds_trained(trainer))
