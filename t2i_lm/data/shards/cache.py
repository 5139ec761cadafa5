"""Folders of prepared data, named by a hash of everything that determines their content.

A folder has `key.json`, a file one beside it: what its name is a hash of, and where the data lay. Data that has changed
at the same place has another folder; older folders stay.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from t2i_lm.assets import resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import ASSET, is_plugin
from t2i_lm.data.identity import content_of
from t2i_lm.data.scenes.source import paraphrases
from t2i_lm.data.scenes.version import IMAGES_FORMAT, SCENES_FORMAT, scenes_version
from t2i_lm.data.shards.format import data_hash, read_index
from t2i_lm.runtime.launch import global_rank, local_rank
from t2i_lm.runtime.plugins import SOURCE, find_plugin
from t2i_lm.runtime.progress import going_on
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.owner import OwnedError, own
from t2i_lm.storage.run_folder import OWNER
from t2i_lm.storage.sealed import read_sealed, sealed
from t2i_lm.storage.writing import DiskError, write_atomic

# Increment when the content of shards changes, so that older caches are not reused. Scenes are generated: their format
# is their version, `SCENES_FORMAT`.
FORMAT = 3
KEY, SHA256 = "key.json", "sha256"
# Seconds between checks of what other processes are writing, and until a line says who they are.
POLL_S, PATIENCE_S = 0.5, 10.0
# Share of the time that checks of the data may take while parts are written.
CHECK_SHARE = 0.05


@dataclass(frozen=True)
class Prepared:
    """Where something prepared from data lies.

    Attributes:
        root: `data.cache_dir`.
        stem: what the name of the folder or file starts with.
        settings: everything else that its content depends on.
        paths: of the data, by config key.
        apart: folders inside `paths` that are not data.
        suffix: of a file; empty for a folder.
        hub: whether `paths` may be names of Hugging Face datasets.
    """

    root: Path
    stem: str
    settings: dict[str, Any]
    paths: dict[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    suffix: str = ""
    hub: bool = True

    @cached_property
    def contents(self) -> dict[str, str | None]:
        """The content at each of `paths`."""
        return {key: self._content(key, path) for key, path in self.paths.items()}

    @property
    def key(self) -> dict[str, Any]:
        """What the name is a hash of. Scenes, and names of data sets, have no content on this machine."""
        return {**self.settings, "content": self.contents} if self.paths else self.settings

    @property
    def folder(self) -> Path:
        """The folder, or file."""
        return self.root / f"{self.stem}-{short_hash(self.key)}{self.suffix}"

    def of_scenes(self, version: int) -> Path:
        """The folder that scenes of another version have."""
        return self.root / f"{self.stem}-{short_hash({**self.settings, 'format': version})}"

    def write_key(self) -> None:
        """Creates the folder, if absent, with its `key.json`; that of a file lies beside it.

        Raises:
            ValueError: if it cannot be created.
        """
        try:
            (self.root if self.suffix else self.folder).mkdir(parents=True, exist_ok=True)
            if self.paths and not self._key_file.is_file():
                self._write_key({})
        except OSError as error:
            raise ValueError(f"data.cache_dir: cannot create {DiskError.of(error, self.folder)}") from error

    @property
    def _key_file(self) -> Path:
        return self.root / f"{self.folder.name}.{KEY}" if self.suffix else self.folder / KEY

    def _write_key(self, more: dict[str, Any]) -> None:
        places = {key: absolute_path(path) for key, path in self.paths.items()}
        content = sealed({"key": self.key, "paths": places, **more})
        write_atomic(self._key_file, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def record_file(self) -> None:
        """Adds the hash of a file that was written to the key beside it."""
        self._write_key({SHA256: file_sha256(self.folder)})

    def require_recorded_file(self) -> None:
        """Checks a file against the hash beside it, which older versions did not write.

        Raises:
            ValueError: if either is damaged.
        """
        remedy = f"delete {self.folder} to make it again"
        known = read_sealed(self._key_file, remedy).get(SHA256) if self._key_file.is_file() else None
        if known is not None and file_sha256(self.folder) != known:
            raise ValueError(f"{self.folder} is damaged: its sha256 differs from {self._key_file.name}; {remedy}")

    def require_unchanged(self, hub: bool = True) -> None:
        """Checks that the data is still what it was before it was read; on a hub only with `hub`, and with a network.

        Raises:
            ValueError: naming the key of data that has changed.
        """
        for key, path in self.paths.items():
            known = self.contents[key] or ""
            if not hub and not known.startswith("content "):
                continue
            found = self._content(key, path) or ""
            if found != known and not (known.startswith("commit ") and found.startswith("name ")):
                raise ValueError(f"{key}={path}: its files have changed while they were read; prepare it again")

    def find(self) -> Path | None:
        """The complete folder for this data; says on stderr what is reused, or why older ones are not.

        Of a dataset whose commit is unknown without a network, the newest folder.
        """
        folder = self.folder
        if read_index(folder) is None:
            folder = self._newest_of_unknown_commit() or folder
        index = read_index(folder)
        if index is not None:
            rows = ", ".join(f"{entry['rows']:,} {split}" for split, entry in sorted(index["splits"].items()))
            say(f"reusing {folder}: {rows} rows, data hash {data_hash(index)}, prepared {when(folder / 'index.json')}")
            return folder
        if parts := sorted(folder.rglob("part-?????/part.json")):
            say(f"continuing {folder}: {len(parts)} complete parts, the first of {when(min(parts, key=_modified))}")
        else:
            self.say_why_anew()
        return None

    def say_why_anew(self) -> None:
        """Says on stderr why an older folder or file of data at the same place is not reused, if there is one."""
        for older, key, file in self._kin():
            if key["format"] != self.key["format"]:
                say(f"preparing anew: {older} is of an older format")
                return
            changed = [name for name, content in self.contents.items() if key["content"].get(name) != content]
            if changed:
                places = ", ".join(f"{name}={self.paths[name]}" for name in changed)
                say(f"preparing anew: {places} has changed since {older} was prepared ({when(file)})")
                return

    def _content(self, key: str, path: str) -> str | None:
        place = str(resolve(path, key)) if path.startswith(ASSET) else path
        unknown = self.hub and not Path(place).is_absolute() and not Path(place).exists()
        return content_of(place, self.apart, self.hub) or (f"name {path}" if unknown else None)

    def _newest_of_unknown_commit(self) -> Path | None:
        if not any((content or "").startswith("name ") for content in self.contents.values()):
            return None
        for older, key, _ in self._kin():
            if key["format"] == self.key["format"] and read_index(older) is not None:
                say(f"{', '.join(self.paths.values())}: without a network it is unknown whether it has changed")
                return older
        return None

    def _kin(self) -> Iterator[tuple[Path, dict[str, Any], Path]]:
        """What was prepared from data at the same place with the same settings, newest first: it, its key, key file."""
        places = {key: absolute_path(path) for key, path in self.paths.items()}
        pattern = f"{self.stem}-*.{KEY}" if self.suffix else f"{self.stem}-*/{KEY}"
        for file in sorted(self.root.glob(pattern), key=_modified, reverse=True):
            try:
                kept = json.loads(file.read_text(encoding="utf-8"))
                same = kept["paths"] == places and _settings(kept["key"]) == _settings(self.key)
            except (ValueError, KeyError, OSError):  # damaged
                continue
            if same:
                yield (
                    file.with_name(file.name.removesuffix(f".{KEY}")) if self.suffix else file.parent,
                    kept["key"],
                    file,
                )


def short_hash(key: Any) -> str:
    """The hash of JSON values that folders are named by."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def absolute_path(path: str | None) -> str | None:
    """The absolute path of an existing file or folder; other names, as of Hugging Face datasets, are unchanged."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def shards_of(config: ExperimentConfig, tokenizers: dict[str, str], wide_codes: bool = False) -> Prepared:
    """Where an experiment's shards lie; `wide_codes` if the image tokenizer has more codes than uint16 holds."""
    data = config.data
    scenes = data.source == "scenes"
    settings = {
        "format": SCENES_FORMAT if scenes else FORMAT,
        "source": data.source,
        "hold_out_pairs": data.hold_out_pairs,
        "sizes": [data.train_size, data.val_size],
        "part_size": data.part_size,
        "seed": data.seed,
        "image_size": config.image_tokenizer.size if config.task != "text" else None,
        "precision": config.image_tokenizer.precision if config.task != "text" else None,
        "length": data.length if config.task == "text" else None,
        "tokenizers": tokenizers,
    }
    if wide_codes:
        settings["codes"] = "uint32"
    if scenes and (captions := paraphrases(data.text_ratio)) > 1:
        settings["captions"] = captions
    if data.control is not None:
        settings["control"] = data.control
    if is_plugin(data.source):
        settings["plugin"] = find_plugin(SOURCE, data.source).identity
    stem = re.sub(r"[^a-zA-Z0-9_.]", "-", data.source)
    if scenes:
        by_path = {**settings, "path": str(absolute_path(data.path)), "val_path": absolute_path(data.val_path)}
        return Prepared(Path(data.cache_dir), stem, by_path)
    return Prepared(
        Path(data.cache_dir),
        stem,
        settings,
        data.paths,
        (data.cache_dir, config.run.dir),
        hub=data.source in ("hub", "hub_stream", "text") or is_plugin(data.source),
    )


def former_scenes(config: ExperimentConfig, prepared: Prepared | None, run: Mapping[str, Any] | None) -> Path | None:
    """The shards of a run on an older version of scenes, which are never made anew; None for other runs.

    Args:
        config: the experiment.
        prepared: where its shards lie; None if it reads images.
        run: env.json of the run that continues; None for a new run, empty for one that wrote none.

    Raises:
        ValueError: if the shards are gone.
    """
    if config.data.source != "scenes" or not run or scenes_version(run) == SCENES_FORMAT:
        return None
    if prepared is None and scenes_version(run) >= IMAGES_FORMAT:
        return None
    folder = None if prepared is None else prepared.of_scenes(scenes_version(run))
    index = None if folder is None else read_index(folder)
    if index is None or index["data_hash"] != run.get("data_hash"):
        gone = "" if folder is None else f", and its shards are not in data.cache_dir={config.data.cache_dir}"
        raise ValueError(
            f"data.source=scenes: the run was trained on version {scenes_version(run)} of the scenes, this "
            f"code generates version {SCENES_FORMAT}{gone}; start a new run"
        )
    return folder


def write_once(prepared: Prepared, write: Callable[[Path], None]) -> Path:
    """Calls `write` unless the folder is complete; other processes (ranks, a second arm) wait for the first one.

    Raises:
        ValueError: if the folder cannot be created.
    """
    prepared.write_key()
    folder, waited = prepared.folder, Waiting()
    while read_index(folder) is None:
        try:
            with own(folder.with_name(f"{folder.name}.{OWNER}")):
                if read_index(folder) is None:
                    write(folder)
        except OwnedError as error:
            waited.sleep(error)
    return folder


class PartsGuard:
    """Checks before a part is complete that the data is unchanged.

    Parts that were completed since the last check are deleted if it has changed, whichever process wrote them. A check
    may take `CHECK_SHARE` of the time: of many files, parts between two checks are complete without one.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._good, self._due = self._parts(), time.monotonic()

    def before_part(self, part: Path) -> None:
        """If one is due, `check`, of data on this machine alone; all samples of `part` have been read."""
        if (started := time.monotonic()) >= self._due:
            self.check(hub=False)
            self._good.add(part)
            self._due = time.monotonic() + (time.monotonic() - started) / CHECK_SHARE

    def check(self, hub: bool = True) -> None:
        """`Prepared.require_unchanged`.

        Raises:
            ValueError: naming the key of data that has changed.
        """
        complete = self._parts()
        try:
            self.prepared.require_unchanged(hub)
        except ValueError:
            for part in self._parts() - self._good:
                removed = part.with_name(f"{part.name}.changed")
                with suppress(OSError):  # another process has removed it
                    part.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)
            raise
        self._good |= complete

    def _parts(self) -> set[Path]:
        return set(self.prepared.folder.rglob("part-?????"))


class Waiting:
    """The wait for other processes; after a while it says whom it waits for."""

    def __init__(self) -> None:
        self._started: float | None = time.monotonic()

    def sleep(self, error: OwnedError) -> None:
        """Waits for `POLL_S`."""
        if self._started is not None and time.monotonic() - self._started > PATIENCE_S:
            print(f"waiting: {error}", file=sys.stderr, flush=True)
            self._started = None
        going_on()  # the other process is alive
        time.sleep(POLL_S)


def _settings(key: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in key.items() if name not in ("content", "format")}


def _modified(file: Path) -> float:
    return file.stat().st_mtime


def when(file: Path) -> str:
    """When a file was written."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(_modified(file)))


def say(text: str) -> None:
    """Prints a line about prepared data on stderr, by one process."""
    if global_rank() == 0 and local_rank() == 0:  # Lightning's own launcher numbers ranks by node only
        print(f"data: {text}", file=sys.stderr, flush=True)
