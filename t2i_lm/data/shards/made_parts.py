"""Parts that are made while training: row groups of a streamed dataset, tokenized and kept in a bounded folder.

A part has a row for each row of its row group. A row that cannot be used, or whose image is a validation image, is
replaced by another one of its part, whichever process makes it; a part without a usable row has those of the next.
"""

import hashlib
import json
import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from filelock import FileLock

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.order import Indices
from t2i_lm.data.pairs import Pair, Sample
from t2i_lm.data.shards.cache import say
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.format import STREAM, pair_features, read_index, validations_in
from t2i_lm.data.shards.held_out import ids_digest
from t2i_lm.data.shards.parts import PartError, Parts, shared_zeros
from t2i_lm.data.shards.rejects import NOTE_AFTER, Rejects
from t2i_lm.data.shards.remote import RESUMES, RemoteError, make_room, touch
from t2i_lm.data.shards.row_groups import StoredFile, pixel_digest, read_digests, samples_of
from t2i_lm.data.shards.tokenize import PairRows
from t2i_lm.runtime.devices import uses_gpu
from t2i_lm.runtime.launch import local_rank
from t2i_lm.storage.writing import atomic_file, problem, writing
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer

# Threads that make parts ahead of training: they read at the same time, and tokenize one after the other.
MAKERS, MAKER = 4, "maker of parts"
# Bytes of sha256 at the end of a file that is kept, of all before it.
TRAILER = 32
# Row groups without a usable row, one after the other, after which a dataset counts as broken.
MOST_UNUSABLE = 100
# Reason of a row that is replaced though it can be used.
HELD_OUT = "a validation image"
Row = dict[str, Any]


class StreamedParts(Parts):
    """The training rows of a dataset that is streamed: a part is made when it is first read."""

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        """Reads the index, and opens the tokenizers.

        Raises:
            ValueError: if the tokenizers are not those of the index.
        """
        index = read_index(folder)
        assert index is not None
        entry, stream = index["splits"]["train"], index[STREAM]
        self.folder, self.split, self.captions = folder, "train", None
        self._files_of = [
            StoredFile(name, size, mark, footer, tuple(rows), url)
            for (name, size, mark, footer, rows), url in zip(entry["files"], stream["urls"], strict=True)
        ]
        held_out = {(file, group) for file, group in entry["held_out"]}
        sizes = [len(file.rows) for file in self._files_of]
        groups = ((file, group) for file, count in enumerate(sizes) for group in range(count))
        self._groups = np.array([place for place in groups if place not in held_out], dtype=np.int64).reshape(-1, 2)
        self.rows: Indices = np.array([self._files_of[file].rows[group] for file, group in self._groups.tolist()])
        if not len(self):
            raise ValueError(f"{folder}: no training rows beside those that are held out")
        self._columns, self._base = (stream["columns"][0], stream["columns"][1]), stream["base"]
        # By pixels and by ids: images of other bytes may have equal ids, and on a GPU equal images other ids.
        self._held_out: set[str | bytes] = set(read_digests(folder))
        for split in validations_in(index):
            self._held_out |= {ids_digest(ids_N) for ids_N in PairColumns(Parts(folder, split)).image_rows()}
        device = "cuda" if uses_gpu(config.trainer.accelerator) and config.data.workers == 0 else "cpu"
        self._kept = folder / f"made-{device}"  # ids may differ between devices
        self._kept.mkdir(exist_ok=True)
        self._limit, self._share = int(config.data.remote_cache_gib * 2**30), config.data.max_reject_share
        self._encoder = _Encoder(config, device, index["tokenizers"])
        self._encoder.tokenizers()
        self._made = _Made(self._kept.with_suffix(".jsonl"))
        self._paths, self._mapped = {}, {}
        self._verified = shared_zeros(len(self.rows))
        self._ahead: _Ahead | None = None
        if line := self._made.summary():
            say(line)

    @property
    def is_remote(self) -> bool:
        return True

    def table(self, number: int) -> pa.Table:
        for _ in range(3):  # another process may delete a file between its opening and its mapping
            with suppress(FileNotFoundError):
                return super().table(number)
        return super().table(number)

    def files(self, number: int) -> list[Path]:
        """The file of a part, made where it is not kept or is damaged.

        Raises:
            PartError: if it cannot be made.
        """
        path = self._path(number)
        try:
            if self._is_verified(number) and touch(path):
                return [path]
            with FileLock(self._kept / f"{number % 256:02x}.lock"):  # other processes wait for the one that makes it
                if not (touch(path) and _is_intact(path)):
                    self._make(number, path)
                    make_room(self._kept, self._limit)
                state = self.state(number)
        except OSError as error:
            raise PartError(f"{problem(error)}; {RESUMES}") from error
        except ValueError as error:
            raise PartError(str(error)) from error
        self._verified[number] = state or 0
        return [path]

    def fetch_later(self, numbers: Iterable[int]) -> None:
        """Begins to make parts. One that cannot be made is tried again, and named, when it is read."""
        self._ahead = self._ahead or _Ahead(self)
        self._ahead.add(numbers)

    def close(self) -> None:
        """Ends the making of parts ahead; says how many rows were tokenized and replaced."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None
            if line := self._made.summary():
                say(line)

    def _places(self, number: int) -> Iterator[str]:
        yield str(self._path(number))

    def _path(self, number: int) -> Path:
        return self._kept / f"{number:07d}.arrow"

    def _is_here(self, number: int) -> bool:
        return self._path(number).exists()

    def _make(self, number: int, path: Path) -> None:
        """Writes a part: the ids of its row group, with unusable rows replaced."""
        rows = self._usable(number)
        usable = [place for place, row in enumerate(rows) if row is not None]
        if usable:
            made = [rows[place] for place in replaced(len(rows), usable)]
        else:
            made = self._rows_of_next(number, len(rows))
        _write(path, pa.Table.from_pylist(made, schema=self._encoder.schema))

    def _rows_of_next(self, number: int, size: int) -> list[Row | None]:
        """Usable rows of the next row group that has some, in place of one that has none."""
        for step in range(1, min(MOST_UNUSABLE, len(self.rows))):
            if found := [row for row in self._usable((number + step) % len(self.rows)) if row is not None]:
                return [found[place * len(found) // size] for place in range(size)]
        raise ValueError(
            f"{self._where(number)}: neither it nor the {min(MOST_UNUSABLE, len(self.rows)) - 1:,} row groups after it "
            f"have a usable row: {self._made.summary()}"
        )

    def _where(self, number: int) -> str:
        file, group = self._groups[number].tolist()
        return f"{self._files_of[file].url} row group {group}"

    def _usable(self, number: int) -> list[Row | None]:
        """The rows of a row group, None in place of those that cannot be used; records what was read."""
        at, group = self._groups[number].tolist()
        file, where = self._files_of[at], self._where(number)
        try:
            samples = list(samples_of(file, group, self._columns, self._base))
        except RemoteError as error:
            raise ValueError(f"{where} {error}; {RESUMES}") from error
        content, digests = hashlib.sha256(), dict[str, str]()
        found, rejects, examples = self._encoder.rows([_hashed(read, content, digests) for read in samples], where)
        names = [file.row_name(group, place) for place in range(len(samples))]
        rows = [found.get(name) for name in names]
        for place, row in enumerate(rows):
            if row is not None and {digests[row["id"]], ids_digest(row["image_ids"])} & self._held_out:
                rows[place] = None
                rejects[HELD_OUT] += 1
                examples.setdefault(HELD_OUT, names[place])
        self._made.add(number, len(rows), rejects, examples, content.hexdigest()[:16], where)
        self._judge(where)
        return rows

    def _judge(self, where: str) -> None:
        """Stops a run whose dataset has too many unusable rows, once enough of it has been read."""
        rejects, read = self._made.rejects, self._made.rows
        unusable = rejects.total() - rejects[HELD_OUT]
        if read >= min(NOTE_AFTER, len(self)) and unusable > self._share * read:
            raise ValueError(
                f"{where}: {self._made.summary()}. data.max_reject_share={self._share} allows fewer. Raise it, or "
                "repair the samples"
            )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ahead": None}


def replaced(size: int, usable: Sequence[int]) -> list[int]:
    """For each of `size` places, itself if it is usable, else a usable one; those are evenly spaced."""
    places, others = list(range(size)), sorted(set(range(size)) - set(usable))
    for number, place in enumerate(others):
        places[place] = usable[number * len(usable) // len(others)]
    return places


def _hashed(read: Sample, content: Any, digests: dict[str, str]) -> Sample:
    """A sample that is added to a hash when it is read, and the digest of its pixels to `digests` by its id."""

    def sample() -> Pair:
        pair = read()
        digests[pair.id] = pixel_digest(pair.image)
        content.update(json.dumps([digests[pair.id], pair.captions]).encode())
        return pair

    return sample


def _write(path: Path, table: pa.Table) -> None:
    """Writes a table and the sha256 of its bytes, atomically."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    with atomic_file(path) as own, own.open("wb") as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def _is_intact(path: Path) -> bool:
    content = memoryview(path.read_bytes())
    return hashlib.sha256(content[:-TRAILER]).digest() == content[-TRAILER:]


class _Encoder:
    """The tokenizers of a run, opened again in each process that makes parts."""

    def __init__(self, config: ExperimentConfig, device: str, tokenizers: dict[str, str]) -> None:
        self._config, self._device, self._expected = config, device, tokenizers
        self._text: TextTokenizer | None = None
        self._image: ImageTokenizer | None = None
        self._lock = threading.Lock()
        _ENCODERS.add(self)

    def tokenizers(self) -> tuple[TextTokenizer, ImageTokenizer]:
        """The two tokenizers.

        Raises:
            ValueError: if they are not those of the index.
        """
        if self._text is None or self._image is None:
            of_text, of_image = self._config.text_tokenizer, self._config.image_tokenizer
            assert of_text.path is not None
            assert of_image.path is not None
            with torch.random.fork_rng(devices=[]):  # libraries draw initial weights
                text = open_text_tokenizer(of_text.path, of_text.document_start, of_text.document_end)
                image = open_image_tokenizer(of_image.path, of_image.size, of_image.expect, of_image.pixel_range)
            for name, found in (("text", text.sha256), ("image", image.sha256)):
                if found != self._expected[name]:
                    raise ValueError(f"{name}_tokenizer.path has changed since the run was started")
            if self._device == "cuda":
                image.to(torch.device("cuda", local_rank()))
            self._text, self._image = text, image
        return self._text, self._image

    @property
    def schema(self) -> pa.Schema:
        """Of the rows of a part."""
        text, image = self.tokenizers()
        return pair_features(text.vocab_size, image.grid[0] * image.grid[1], image.vocab_size).arrow_schema

    def rows(self, samples: Iterable[Sample], origin: str) -> tuple[dict[str, Row], Counter[str], dict[str, str]]:
        """Rows by id, rejects by reason, and the first message of each; images are decoded by any number of threads."""
        with self._lock:
            tokenizers = self.tokenizers()
        text, image = (cast("Any", _OneAtATime(tokenizer, self._lock)) for tokenizer in tokenizers)
        rows = PairRows(_while_running(samples), text, image, _silent, Rejects(1.0, "train", None, origin))
        return {row["id"]: row for row in rows()}, rows.rejects, rows.examples

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_text": None, "_image": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()


class _OneAtATime:
    """A tokenizer that one thread uses at a time."""

    def __init__(self, tokenizer: Any, lock: threading.Lock) -> None:
        self._tokenizer, self._lock = tokenizer, lock

    def encode(self, content: Any) -> Any:
        with self._lock:
            return self._tokenizer.encode(content)

    def encode_batch(self, texts: list[str]) -> Any:
        with self._lock:
            return self._tokenizer.encode_batch(texts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


_ENCODERS = weakref.WeakSet[_Encoder]()


def _renew_locks() -> None:
    for encoder in _ENCODERS:
        encoder._lock = threading.Lock()


# A thread of the parent may hold one.
os.register_at_fork(after_in_child=_renew_locks)


def _silent(_: int) -> None:
    return None


class _StoppedError(Exception):
    """The process ends while a thread makes a part."""


def _while_running(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        if not threading.main_thread().is_alive():
            raise _StoppedError
        yield sample


class _Made:
    """The record of the parts that were made on this machine: rows, rejects, and a hash of each part's content.

    Attributes:
        rows: rows of all parts in it.
        rejects: their rejects by reason.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0
        self._contents: dict[int, str] = {}
        self._examples: dict[str, str] = {}
        self.rows, self.rejects = 0, Counter[str]()

    def add(
        self, number: int, rows: int, rejects: Counter[str], examples: dict[str, str], content: str, where: str
    ) -> None:
        """Adds a part, unless it is recorded.

        Raises:
            ValueError: if it was recorded with other content.
        """
        with FileLock(self._file.with_suffix(".lock")):
            self._read_on()
            if number not in self._contents:
                entry = {"part": number, "rows": rows, "rejects": rejects, "examples": examples, "content": content}
                with writing(self._file), self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                self._read_on()
        if self._contents[number] != content:
            raise ValueError(f"{where} has changed since it was first read; restore it, or start a new run")

    def summary(self) -> str:
        """How many rows were replaced, and why; empty if nothing was made."""
        with FileLock(self._file.with_suffix(".lock")):
            self._read_on()
        if not self.rows:
            return ""
        reasons = "; ".join(
            f"{count:,} {reason} (first: {self._examples[reason]})" for reason, count in self.rejects.most_common()
        )
        replaced = f"{self.rejects.total():,} of {self.rows:,} rows read so far were replaced by others"
        return f"{replaced}: {reasons}" if reasons else f"{self.rows:,} rows read so far, none of them replaced"

    def _read_on(self) -> None:
        """Reads the lines that it, or another process, has added."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._contents[entry["part"]] = entry["content"]
            self.rows += entry["rows"]
            self.rejects.update(entry["rejects"])
            self._examples = entry["examples"] | self._examples


class _Ahead:
    """Threads that make parts before they are needed; they end with the parts, or with the process."""

    def __init__(self, parts: StreamedParts) -> None:
        self._parts, self._asked = weakref.ref(parts), set[int]()
        self._queue: queue.Queue[int] = queue.Queue()
        self._stopped = threading.Event()
        for _ in range(MAKERS):
            # No daemons, which the end of the interpreter would freeze inside a kernel.
            threading.Thread(target=self._work, name=MAKER).start()

    def add(self, numbers: Iterable[int]) -> None:
        """Asks for parts that have not been asked for, or have been deleted since.

        Each rank begins elsewhere, since all ranks read from the same parts and one would wait for the other.
        """
        fresh = [number for number in dict.fromkeys(numbers) if number not in self._asked]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        start = len(fresh) * rank // world
        for number in fresh[start:] + fresh[:start]:
            self._asked.add(number)
            self._queue.put(number)

    def stop(self) -> None:
        """Ends the threads, after the parts that they are making."""
        self._stopped.set()

    def _work(self) -> None:
        while not self._stopped.is_set() and threading.main_thread().is_alive():
            try:
                number = self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._parts() is None:
                    return
                continue
            parts = self._parts()
            if parts is None:
                return
            if not parts._is_here(number):
                with suppress(PartError, _StoppedError):
                    parts.files(number)
            self._asked.discard(number)
            del parts
