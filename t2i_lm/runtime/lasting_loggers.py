"""TensorBoard and CSV loggers that no full disk ends: what cannot be written waits, and is written later."""

import csv
import itertools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from callbacks.files.appended_file import AppendedFile
from callbacks.files.disk import tell
from t2i_lm.storage.writing import atomic_file, problem, writing

# Bytes of points and images that may wait for space on the disk.
WAITING = 32 * 2**20
# An event is written by the next `flush`, as after every `log_metrics`; after this time or these bytes at once.
FLUSH_S, FLUSH_BYTES = 10.0, 2**20
VERSION = "brain.Event:2"
_numbers = itertools.count()


class EventFile:
    """An event file of TensorBoard, written by the calling thread; takes the place of tensorboard's EventFileWriter.

    That one writes in a thread, which ends at the first error of the disk, and everything after it fails. A record
    that was written in part, behind which no reader looks, is cut off before the next one.
    """

    def __init__(self, folder: Path, suffix: str = "") -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = AppendedFile(folder / f"{name}{suffix}", "TensorBoard's points", WAITING, True, makes_folder=True)
        self._flushed = time.monotonic()
        writer = SourceMetadata(writer="t2i_lm.runtime.lasting_loggers")
        self.add_event(Event(wall_time=time.time(), file_version=VERSION, source_metadata=writer))
        self.flush()

    def get_logdir(self) -> str:
        """The folder of the file."""
        return str(self._file.path.parent)

    def add_event(self, event: Event) -> None:
        """Adds an event; never raises an error of the disk."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        self._file.add(b"".join((length, next(checks), content, next(checks))))
        if self._file.waiting >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, if that is possible."""
        self._file.try_to_write()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what waits, if that is possible; says what is lost."""
        if not self._file.try_to_write():
            tell(f"{self._file.path}: {self._file.waiting:,} bytes are lost")
            self._file.forget()


class _FileWriter(FileWriter):
    def __init__(self, folder: Path, suffix: str) -> None:
        self.event_writer: Any = EventFile(folder, suffix)


class LastingSummaryWriter(SummaryWriter):
    """TensorBoard's writer with an `EventFile`."""

    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = _FileWriter(Path(self.log_dir), self.filename_suffix)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:  # as in torch
                session = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(step=self.purge_step, file_version=VERSION))
                self.file_writer.add_event(Event(step=self.purge_step, session_log=session))
                self.purge_step = None
        writer: FileWriter = self.file_writer
        return writer


class LastingTensorBoardLogger(TensorBoardLogger):
    """A TensorBoard logger with a `LastingSummaryWriter`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = LastingSummaryWriter(log_dir=self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Writes scalars."""
        super().log_metrics(metrics, step)
        self.experiment.flush()

    @rank_zero_only
    def save(self) -> None:
        """Writes what waits, if that is possible."""
        try:
            super().save()
        except OSError:  # of hparams.yaml, whose content is the dashboard's
            Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)


class _CsvWriter(ExperimentWriter):
    """Writes the whole file anew where its columns change, and else appends whole rows."""

    def __init__(self, log_dir: str, purge: int | None = None) -> None:
        super().__init__(log_dir)
        self._told = False
        file = Path(self.metrics_file_path)
        found = _rows(file)
        whole = [row for row in found if str(row.get("step")).isdigit() and None not in (*row, *row.values())]
        if whole and whole[-1] is found[-1] and not file.read_bytes().endswith(b"\n"):
            del whole[-1]  # its last number may be cut
        kept = [row for row in whole if purge is None or int(row["step"]) < purge]
        # Of the checkpoint's place, where a resumed run repeats a validation that an earlier session may have ended.
        self._known = {_kind(row) for row in kept if int(row["step"]) + 1 == purge}
        self.metrics_keys = sorted(kept[0]) if kept else []
        if len(kept) < len(found):  # torn by a kill, or after the checkpoint
            try:
                with atomic_file(file) as own:
                    _append(own, self.metrics_keys, kept, header=True)
            except OSError as error:
                tell(f"{problem(error)}; rows after the checkpoint stay in it, and the run goes on")

    def _check_log_dir_exists(self) -> None:
        """Keeps the file of an earlier session, which Lightning's writer deletes."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Adds a row, unless the file has it from an earlier session, and writes what waits."""
        super().log_metrics(metrics_dict, step)
        if _kind(self.metrics[-1]) in self._known:
            del self.metrics[-1]
        self.save()

    def save(self) -> None:
        """Writes the rows that wait, if that is possible; else says once why not."""
        file = Path(self.metrics_file_path)
        keys = sorted({*self.metrics_keys, *(key for row in self.metrics for key in row)})
        try:
            if keys != self.metrics_keys or not file.is_file():
                with atomic_file(file) as own:
                    _append(own, keys, [*_rows(file), *self.metrics], header=True)
            elif self.metrics:
                _append(file, keys, self.metrics)
        except OSError as error:
            if not self._told:
                tell(f"{problem(error)}; rows are written later, and the run goes on")
            self._told = True
        else:
            self.metrics_keys, self.metrics, self._told = keys, [], False


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _kind(row: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """The place of a row, and the columns that it fills."""
    return int(row["step"]), frozenset(key for key, value in row.items() if value != "")


def _append(file: Path, keys: list[str], rows: list[dict[str, Any]], header: bool = False) -> None:
    """Appends rows, all or none."""
    size = file.stat().st_size if file.is_file() else 0
    try:
        with writing(file), file.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, keys)
            if header:
                writer.writeheader()
            writer.writerows(rows)
    except OSError:
        os.truncate(file, size)
        raise


class LastingCSVLogger(CSVLogger):
    """A CSV logger whose file holds every row at once, and is continued by a resumed run.

    Args:
        purge: `step` from which rows of an earlier session are dropped; None for none.
        options: of `CSVLogger`.
    """

    def __init__(self, *, purge: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._purge = purge

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _CsvWriter(self.log_dir, self._purge)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment
