"""Checkpoint schedule and retention, and the checkpoint to resume from."""

import re
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint

from callbacks.base.interval_sums import distributed, host_group
from callbacks.files.checkpoint_io import (
    SUFFIX,
    CorruptCheckpointError,
    DurableCheckpointIO,
    await_visible,
    digest_of,
    forget_cached,
    leftovers,
    verify,
    write,
    write_part,
)
from callbacks.files.checkpoint_parts import PARTS, split
from callbacks.files.event_log import EventLog
from callbacks.files.metrics_file import MetricsFile
from callbacks.files.save_in_flight import SaveInFlight
from callbacks.files.staging import NoMemoryError, Staging

NOT_STARTED = "not-started"
# Profiler's name of the time that a save holds up training.
SAVE = "RunCheckpoints.save"


class RunCheckpoints(Checkpoint):
    """Saves every `every_n_steps` optimizer steps, at `keep_steps`, at the end and after an error.

    Keeps the newest `keep` and, whatever is newer, those of `keep_steps`.

    A step's checkpoint is saved when the next batch starts: only then are that step's validation and its lines in
    metrics.jsonl complete, so that a resumed run neither repeats nor misses any. A checkpoint saved inside a validation
    records that, and the resumed run restarts the validation.

    A scheduled save only copies the state in memory; a thread writes the copy, reads it back and deletes old
    checkpoints, and the next save waits for it. Without memory for the copy, training waits, which is logged. Saves at
    the end and before a stop wait for the one in flight and copy nothing.

    A scheduled save that fails (full disk) is logged before a later step and retried at the next interval, also
    repeatedly: a stop would save nothing either. One at the end or before a stop raises, and so does a failure that
    would recur. Nothing that an earlier session wrote is deleted before a new checkpoint has been verified; what cannot
    be deleted is logged and stays. A checkpoint without a digest was put there by somebody else, and stays too.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        keep: int = 2,
        metrics: MetricsFile | None = None,
        events: EventLog | None = None,
        background: bool = True,
        keep_steps: Collection[int] = (),
        timeout: timedelta | None = None,
    ) -> None:
        """`metrics` is truncated on resume to its size at the checkpoint; `background=False` lets training wait.

        `timeout` is that of the ranks' agreement, in which one may wait for the file of another; None: torch's.

        Raises:
            ValueError: if `every_n_steps`, `keep` or one of `keep_steps` is less than 1.
        """
        least = min(keep_steps, default=1)
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep), ("keep_steps", least)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self.keep_steps = frozenset(keep_steps)
        self.metrics, self.events, self.background, self.timeout = metrics, events, background, timeout
        self._staging = Staging()
        self._flight: SaveInFlight | None = None
        self._flight_step = 0
        self._told_synchronous = self._prepared = False
        self._group: Any = None
        self._saved_step = 0  # nothing to save before the first step
        self._in_validation = False
        self._marked = False  # on rank 0, until the first step of a run that was stopped before it
        # Between two optimizer steps; inside one, parameters and counters are inconsistent.
        self._consistent = False
        self._metrics_end: tuple[int, str] = (0, "")  # size and last digest after the last step, before its validation
        self._resume_size: int | None = None
        self._undeletable: set[Path] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets aside lines written after the checkpoint, until the next checkpoint."""
        self._first_step = trainer.global_step
        if distributed():
            self.folder = trainer.strategy.broadcast(self.folder)  # other ranks may not know the run's folder
            self._group = host_group(self.timeout)
        self._saved_step, self._consistent = trainer.global_step, True
        self.cut_metrics(trainer)
        if trainer.is_global_zero:
            self._metrics_end = self.metrics.end() if self.metrics else (0, "")
            self._marked = (self.folder / NOT_STARTED).exists()

    def cut_metrics(self, trainer: pl.Trainer) -> None:
        """Sets aside lines written after the checkpoint, once in a session; before the first line of that session."""
        size, self._resume_size = self._resume_size, None
        if self.metrics and size is not None and trainer.is_global_zero and not self.metrics.cut_to(size):
            removed = self.metrics.cut_after(self._saved_step)
            text = f"{self.metrics.path.name} changed since the checkpoint; {removed} lines of later steps removed"
            self._log("metrics-changed", text)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._settle(trainer, wait=False)
        if step and (step % self.every_n_steps == 0 or step in self.keep_steps):
            self._save(trainer, required=False, background=self.background)
        elif step > self._first_step and not self._prepared:
            self._prepare(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._consistent = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._consistent = True
        if self.metrics and trainer.is_global_zero:
            self._metrics_end = self.metrics.end()
        if self._marked and trainer.global_step > self._first_step:
            self._marked = False
            self._remove(self.folder / NOT_STARTED, Path.unlink)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)
        self._staging.release()
        if trainer.is_global_zero:  # also where the last checkpoint is the one that this session started from
            self._remove_old(trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._consistent and not distributed():  # other ranks would have to take part
            self._save(trainer, required=False, background=False)
        elif self._flight is not None:
            self._flight.wait()
        self._consistent = False

    def save(self, trainer: pl.Trainer) -> None:
        """Saves the current step once, then deletes checkpoints beyond `keep`; every rank must call it.

        Waits until the file is there. Before the first step there is nothing to save, which a file in the folder
        records.

        Raises:
            OSError: on every rank, if the checkpoint could not be written.
            TypeError: on every rank, if it holds an object that `weights_only=True` refuses.
        """
        self._save(trainer, required=True, background=False)

    def _save(self, trainer: pl.Trainer, required: bool, background: bool) -> None:
        with trainer.profiler.profile(SAVE):  # type: ignore[attr-defined]
            step = trainer.global_step
            if self._flight is not None and required and self._flight_step != step:
                self._flight.hurry.set()
            self._settle(trainer, wait=True)
            if step == self._saved_step:
                if step == 0 and trainer.is_global_zero:
                    mark_not_started(self.folder)
                return
            self._in_validation = trainer.validating
            self._flight, self._flight_step = SaveInFlight(checkpoint_path(self.folder, step)), step

            def take(checkpoint: dict[str, Any], path: Path) -> None:
                self._take(trainer, checkpoint, background)

            trainer.save_checkpoint(self._flight.path, weights_only=False, storage_options=take)
            if not background:
                self._settle(trainer, wait=True, required=required)

    def _take(self, trainer: pl.Trainer, checkpoint: dict[str, Any], background: bool) -> None:
        """Starts to write what the Trainer collected: on rank 0, or on every rank its share of a sharded state."""
        flight = self._flight
        assert flight is not None
        main, shares = split(checkpoint)
        rows = shares.rows if shares is not None and shares.writes else None
        content: tuple[Any, Any] = (main if trainer.is_global_zero else {}, rows)
        self._staging.sharers = trainer.num_devices if shares is not None else 1
        try:
            if self.metrics and trainer.is_global_zero:
                self.metrics.sync()
            content = self._staging.copy(content) if background else content
        except NoMemoryError as error:
            if not self._told_synchronous:
                self._told_synchronous = True
                if trainer.is_global_zero:
                    self._log("save-synchronous", f"{error}: training waits while checkpoints are written")
            background = False
        except OSError as error:
            flight.error = error
        main, rows = content
        if flight.error is not None or shares is None:
            if flight.error is None:
                flight.run(lambda: self._write(flight, main), background)
            return
        flight.main = main
        if rows is not None:
            mine, index, count = rows, shares.index, shares.count

            def write_rows() -> None:
                flight.part = write_part(mine, flight.path, index, count)

            flight.run(write_rows, background)

    def _write(self, flight: SaveInFlight, content: dict[str, Any]) -> None:
        """Writes, verifies and deletes, as one job of a save on rank 0."""
        missing = await_visible(*(flight.path.with_name(name) for name, _ in content.get(PARTS, ())))
        if missing:
            raise OSError(f"rank 0 does not see {missing[0]}: {self.folder} must be the same folder on all ranks")
        write(content, flight.path)
        try:
            forget_cached(flight.path)
            verify(flight.path, flight.hurry.is_set)
        except InterruptedError:
            return  # the save that waits verifies its own
        except (CorruptCheckpointError, OSError) as error:
            raise OSError(f"the checkpoint just written cannot be read back: {error}") from error
        self._remove_old(step_of(flight.path))

    def _settle(self, trainer: pl.Trainer, wait: bool, required: bool = False) -> None:
        """Takes note of the end of the save in flight once all ranks have ended it; every rank must call it."""
        while (flight := self._flight) is not None:
            if wait:
                flight.wait()
            outcomes = self._of_all((flight.done, flight.error, flight.part))
            if not all(done for done, _, _ in outcomes):
                return
            failures = [(rank, error) for rank, (_, error, _) in enumerate(outcomes) if error is not None]
            if flight.main is not None and not failures:
                main, flight.main = flight.main, None
                if trainer.is_global_zero:
                    # By the number of the shard, which is in the name.
                    main[PARTS] = sorted(list(part) for _, _, part in outcomes if part is not None)
                    flight.run(partial(self._write, flight, main), background=not wait)
                continue
            self._flight = None
            if not failures:
                self._saved_step = self._flight_step
                return
            flight.discard()
            rank, failure = failures[0]
            if rank > 0:
                failure = type(failure)(f"rank {rank}: {failure}")
            if required or not isinstance(failure, OSError):
                self._consistent = False  # so that `on_exception` does not try again
                raise failure
            if trainer.is_global_zero:
                step = self._flight_step
                lost = f"; step {step}, which was to be kept, has no checkpoint" if step in self.keep_steps else ""
                self._log("save-failed", f"{failure}; training continues{lost}")

    def _of_all(self, mine: Any) -> list[Any]:
        """A value of each rank."""
        values = [mine]
        if distributed():
            values = [None] * dist.get_world_size()
            dist.all_gather_object(values, mine, group=self._group)
        return values

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the memory of the copies early, where there will be some: now the optimizer has its state."""
        self._prepared = True
        step = trainer.global_step
        scheduled = (step // self.every_n_steps + 1) * self.every_n_steps
        following = min([scheduled, *(kept for kept in self.keep_steps if kept > step)])
        if not self.background or 0 < trainer.max_steps <= following:
            return
        states = [list(optimizer.state.values()) for optimizer in trainer.optimizers]
        held = {"tensors": [*pl_module.parameters(), *pl_module.buffers()], "states": states}
        main, shares = split(held)
        self._staging.sharers = trainer.num_devices if shares is not None else 1
        with suppress(NoMemoryError):  # told by the first save
            if shares is not None and shares.writes:
                self._staging.prepare([main, shares.rows])
            elif shares is None and trainer.is_global_zero:
                self._staging.prepare(main)

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint that was saved or resumed from; 0: none."""
        return self._saved_step

    def state_dict(self) -> dict[str, Any]:
        now = self.metrics.end() if self.metrics else (0, "")
        size, digest = self._metrics_end if self._in_validation else now
        return {
            "in_validation": self._in_validation,
            "metrics_size": size,
            "metrics_digest": digest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_size = int(state_dict["metrics_size"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_step = checkpoint["global_step"]  # also where that is the last step, after which nothing starts
        in_validation = checkpoint["callbacks"].get(self.state_key, {}).get("in_validation", False)
        whole_steps(trainer, checkpoint["loops"]["fit_loop"], checkpoint["global_step"], in_validation)

    def _remove_old(self, step: int) -> None:
        """Deletes what the checkpoint of `step` makes superfluous.

        All but the newest `keep` checkpoints and those of `keep_steps`, later ones from before a resume, which the run
        makes again, files of killed saves, and lines that were set aside.
        """
        complete = [path for path in checkpoints(self.folder) if digest_of(path).is_file()]
        past = [path for path in complete if step_of(path) <= step]
        kept = {*past[-self.keep :], *(path for path in past if step_of(path) in self.keep_steps)}
        for path in complete:
            if path not in kept:
                self._remove(path, DurableCheckpointIO().remove_checkpoint)
        others = [*leftovers(self.folder), self.folder / NOT_STARTED]
        for path in [*others, self.metrics.replaced] if self.metrics else others:
            self._remove(path, Path.unlink)

    def _remove(self, path: Path, remove: Callable[[Path], None]) -> None:
        try:
            remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # not permitted, or busy on a network file system
            if path not in self._undeletable:
                self._undeletable.add(path)
                self._log("delete-failed", f"{path} cannot be deleted ({error.strerror}); training continues")

    def _log(self, kind: str, text: str) -> None:
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
        if self.events:
            self.events.write(kind, text)


def whole_steps(trainer: pl.Trainer, loops: dict[str, Any], steps: int, in_validation: bool) -> None:
    """Rewrites a fit loop's saved counters as those after `steps` complete optimizer steps.

    Lightning counts a batch when it is fetched and on resume resets only half of its counters, which shifts every later
    validation by a batch. The whole run is one Lightning epoch here: the sampler continues from `steps`, and so do the
    counters. The names are those of Lightning 2.6's `_FitLoop.state_dict`.
    """
    batches = steps * trainer.accumulate_grad_batches
    epoch, batch, validation = (
        loops[name] for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    )
    for span in ("total", "current"):
        epoch[span] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        batch[span] |= dict.fromkeys(("ready", "started", "processed", "completed"), batches)
        # One batch started and none done makes Lightning restart the validation.
        begun = int(in_validation)
        validation[span] |= {"ready": begun, "started": begun, "processed": 0, "completed": 0}
    batch["is_last_batch"] = validation["is_last_batch"] = False
    interval = trainer.val_check_interval
    validated = isinstance(interval, int) and batches % interval == 0
    # Lightning counts the step again after the validation, which it runs or skips first.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - int(validated)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of a step's checkpoint."""
    return folder / f"step-{step:08d}{SUFFIX}"


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-").removesuffix(SUFFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a run, oldest first; a file of another name, such as a copy of one, is none."""
    own = re.compile(rf"step-\d+{re.escape(SUFFIX)}")
    return sorted((path for path in folder.glob(f"step-*{SUFFIX}") if own.fullmatch(path.name)), key=step_of)


def mark_not_started(folder: Path) -> None:
    """Records that a run was stopped before its first step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOT_STARTED).touch()


def was_not_started(folder: Path) -> bool:
    """Whether a run was stopped before its first step, so that it can begin again without a loss."""
    return (folder / NOT_STARTED).is_file() and not checkpoints(folder)


def require_same_metrics(metrics: MetricsFile, state: dict[str, Any]) -> None:
    """Checks the lines of metrics.jsonl up to a checkpoint with the state of its `RunCheckpoints`.

    A file that ends before is left to `RunCheckpoints`, which says that lines are missing and goes on.

    Raises:
        ValueError: if a line was changed, removed, doubled or moved.
    """
    size, digest = state.get("metrics_size", 0), state.get("metrics_digest")
    found = metrics.tip(size)
    if digest is not None and metrics.size() >= size and found != digest:
        raise ValueError(f"{metrics.path} has other lines than when its run's last checkpoint was saved")


def find_resumable(folder: Path, log: Callable[[str, str], None] | None = None) -> Path | None:
    """The newest intact checkpoint, or None; `log` receives an event (kind, text) per damaged one."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except (CorruptCheckpointError, OSError) as error:
            if log:
                log("corrupt-checkpoint", f"{error}; falling back to the previous one")
        else:
            return path
    return None
