"""The checkpoint from which a run resumes, and what has changed since it was written. Writes nothing by itself."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LambdaLR

from callbacks import MetricsFile, find_resumable, read_record
from callbacks.checkpoints import checkpoints, require_same_metrics, step_of, was_not_started
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import cannot_change, may_move
from t2i_lm.config.load import changed_yaml, flatten, flatten_mapping, load_experiment, nested_yaml
from t2i_lm.config.presets import PRESETS
from t2i_lm.storage.reading import reading
from t2i_lm.storage.run_folder import (
    CHECKPOINTS,
    CONFIG,
    CONFIG_DIGEST,
    ENVIRONMENT,
    METRICS,
    config_digest,
    fits_digest,
    read_environment,
)
from t2i_lm.storage.sealed import sealed
from t2i_lm.storage.writing import write_atomic
from t2i_lm.storage.yaml_text import read_yaml

# Entry of a checkpoint's record: the values of config.yaml by dotted key.
VALUES = "config"


@dataclass(frozen=True)
class Change:
    """A value that differs from the checkpoint's record and was allowed to."""

    key: str
    before: Any
    now: Any


@dataclass
class Resumption:
    """A run to resume, as found in its folder.

    Attributes:
        folder: run folder.
        checkpoint: the newest intact one; on ranks other than 0 the folder of them, since rank 0 names it; None if the
            run was stopped before its first step.
        record: what it says about the run; empty if an older version wrote it.
        events: damaged checkpoints that were passed over, for the event log.
        allowed: keys that may differ from the record.
        changes: those that do.
    """

    folder: Path
    checkpoint: Path | None
    record: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    allowed: tuple[str, ...] = ()
    changes: list[Change] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The step after which the run goes on."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    def require_current(self) -> None:
        """Checks, as the owner of the folder, that no other process has continued the run since it was looked at.

        Raises:
            ValueError: if one has.
        """
        newest = next(reversed(checkpoints(self.folder / CHECKPOINTS)), None)
        if (
            newest is not None
            and step_of(newest) > self.step
            and not any(newest.name in text for _, text in self.events)
        ):
            raise ValueError(f"--resume {self.folder}: another process has just continued this run; try again")

    def write_changes(self, found: dict[str, Any], config: ExperimentConfig) -> None:
        """Brings config.yaml and env.json up to date with the values in force; the former ones stay beside them.

        Those in force may differ from config.yaml without a change: where a session that changed them saved nothing.

        Args:
            found: hashes of what the run goes on with, as in env.json.
            config: what it goes on with.
        """
        file, folder = self.folder / CONFIG, self.folder
        environment = read_environment(folder)
        written, now = _written(folder), config_values(config, folder)
        new = {key: value for key, value in now.items() if written.get(key, "missing") != value and not may_move(key)}
        stale = not fits_digest(written, environment)
        if not (self.changes or new or stale):
            return
        if new:
            former = self.record.get(VALUES, written)
            write_atomic(folder / f"config-to-step-{self.step:08d}.yaml", nested_yaml(former))
            write_atomic(file, changed_yaml(file, new))
        # Later ones were of sessions that saved nothing since.
        entries = [entry for entry in environment.get("changes", []) if entry["step"] < self.step]
        for change in self.changes:
            entries.append({"step": self.step, "key": change.key, "from": change.before, "to": change.now})
        content = environment | found | {"changes": entries}
        if CONFIG_DIGEST in environment:
            content = sealed(content | {CONFIG_DIGEST: config_entry(folder)})
        write_atomic(folder / ENVIRONMENT, json.dumps(content, indent=2) + "\n")


def find_resumption(folder: Path, allowed: Sequence[str] = ()) -> Resumption:
    """Looks for the checkpoint from which the run in `folder` resumes.

    Raises:
        ValueError: if none can be verified, with what was found and what would start anew.
    """
    events: list[tuple[str, str]] = []
    checkpoint = find_resumable(folder / CHECKPOINTS, lambda kind, text: events.append((kind, text)))
    if checkpoint is not None:
        for _, text in events:
            print(f"note: {text}", file=sys.stderr)
        with reading("--resume", checkpoint):
            record, state = read_record(checkpoint)
        require_whole_metrics(folder, state)
        return Resumption(folder, checkpoint, record, events, tuple(allowed))
    if _begins_again(folder):
        return Resumption(folder, None, allowed=tuple(allowed))
    raise ValueError(
        f"--resume {folder}: no checkpoint can be verified ({_found(folder, events)}). Nothing was changed. Restore "
        "the files; of a checkpoint that you trust, `sha256sum NAME > NAME.sha256` in its folder makes a lost digest "
        "again. Without --resume, the same command starts a new run at step 0 in a folder of its own"
    )


def can_resume(folder: Path) -> bool:
    """Whether a run has a checkpoint, or was stopped before its first step: the rest of a killed save is neither.

    Raises:
        ValueError: if metrics.jsonl is damaged.
    """
    return bool(checkpoints(folder / CHECKPOINTS)) or _begins_again(folder)


def _begins_again(folder: Path) -> bool:
    """Whether a run was stopped before its first step, and has measured none since."""
    if not was_not_started(folder / CHECKPOINTS):
        return False
    return not any(record.get("step", 0) for record in MetricsFile(folder / METRICS).read())


def require_whole_metrics(folder: Path, state: dict[str, Any]) -> None:
    """Checks metrics.jsonl up to a checkpoint, with the state of its `RunCheckpoints`.

    Raises:
        ValueError: naming the line, and what to do.
    """
    try:
        require_same_metrics(MetricsFile(folder / METRICS), state)
    except ValueError as error:
        raise ValueError(
            f"--resume {folder}: {error}. Restore {METRICS}, or cut it before that line, which loses the later ones"
        ) from error


def resumption_of_rank_0(folder: Path, allowed: Sequence[str] = ()) -> Resumption:
    """The run to resume on the other ranks, which load the checkpoint that rank 0 names (`DurableCheckpointIO`)."""
    checkpoints_folder = folder / CHECKPOINTS
    return Resumption(
        folder, None if was_not_started(checkpoints_folder) else checkpoints_folder, allowed=tuple(allowed)
    )


def _found(folder: Path, events: Sequence[tuple[str, str]]) -> str:
    if events:
        found = "; ".join(text.removesuffix("; falling back to the previous one") for _, text in events)
    elif not (folder / CHECKPOINTS).is_dir():
        found = f"{folder / CHECKPOINTS} does not exist"
    else:
        found = f"{folder / CHECKPOINTS} has none"
    try:
        reached = max((record.get("step", 0) for record in MetricsFile(folder / METRICS).read()), default=None)
    except ValueError as error:
        return f"{found}; {error}"
    return found if reached is None else f"{found}; {METRICS} reaches step {reached}"


def config_entry(folder: Path) -> dict[str, Any]:
    """The entry of env.json for a run's config.yaml: a digest of the values that may not change unseen."""
    values = read_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    return config_digest(values, filter(may_move, flatten_mapping(values)))


def config_values(config: ExperimentConfig, folder: Path) -> dict[str, Any]:
    """The values of a run's config.yaml by dotted key, with those that `config` changes for this session."""
    values = _written(folder)
    saved = flatten(load_experiment(folder / CONFIG))
    changed = {key: value for key, value in flatten(config).items() if value != saved[key] and not may_move(key)}
    return values | changed


def _written(folder: Path) -> dict[str, Any]:
    """The values of a run's config.yaml by dotted key."""
    with reading("--resume", folder / CONFIG):
        return flatten_mapping(read_yaml((folder / CONFIG).read_text(encoding="utf-8")))


def require_same_config(config: ExperimentConfig, found: Resumption) -> None:
    """Compares every value of config.yaml, with overrides, with the record in the checkpoint.

    Without a record, as of a run that was stopped before its first step, config.yaml itself is what they differ from.

    Raises:
        ValueError: naming each difference that was not allowed, or cannot be.
    """
    recorded = found.record.get(VALUES)
    written = _written(found.folder)
    if recorded is None and not fits_digest(written, read_environment(found.folder)):
        raise ValueError(
            f"--resume {found.folder}: {CONFIG} has other values than when the run was started, and no checkpoint says "
            "which; restore it, or start a new run"
        )
    source = CONFIG if found.checkpoint is None or recorded is None else found.checkpoint.name
    if recorded is None:
        recorded = written
    now = config_values(config, found.folder)
    if {config.backbone.config, now.get("backbone.config")} & PRESETS.keys():
        now["backbone.config"] = config.backbone.config  # a name and no path, which an override may change
    refused, fixed, moved = [], [], []
    for key in sorted({*recorded, *now}):
        before, value = recorded.get(key, "missing"), now.get(key, "missing")
        if before == value:
            continue
        text = f"{key} is {before} in {source}, now {value}"
        if key == "backbone.config" and {before, value} & PRESETS.keys():  # a name, which no hash covers
            fixed.append(text)
        elif may_move(key):
            moved.append(text)
        elif cannot_change(key, before, value):
            fixed.append(text)
        elif key not in found.allowed or value == "missing":
            refused.append(text)
        else:
            found.changes.append(Change(key, before, value))
    if refused or fixed:
        differences, kept = "; ".join([*refused, *fixed]), ", ".join(text.split()[0] for text in fixed)
        raise ValueError(
            f"--resume {found.folder}: {CONFIG} and overrides differ from what the run was trained with: "
            f"{differences}. Restore them, or start a new run"
            + (f"; {kept} cannot change within a run" if fixed else "")
            + ("; or accept a difference by --allow-mismatch KEY" if refused else "")
        )
    if config.trainer.max_steps < found.step:
        raise ValueError(
            f"--resume {found.folder}: trainer.max_steps={config.trainer.max_steps}: expected at least {found.step}, "
            "the steps done"
        )
    for text in moved:
        print(f"note: {found.folder / CONFIG}: {text}", file=sys.stderr)


class ChangedOptimizer(pl.Callback):
    """Gives the restored optimizer the config's hyperparameters and schedule, which may have changed on resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fresh: Any = pl_module.configure_optimizers()
        (optimizer,), schedule = trainer.optimizers, trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, LambdaLR)
        schedule.base_lrs = fresh["lr_scheduler"]["scheduler"].base_lrs
        for group, new in zip(optimizer.param_groups, fresh["optimizer"].param_groups, strict=True):
            group |= {name: value for name, value in new.items() if name != "params"}
        steps = schedule.last_epoch
        rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
