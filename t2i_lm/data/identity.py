"""Identity of data: a digest of the content at a path, by which prepared data and finished runs are found again.

It covers name and size of every file and, where that is cheap, its bytes; else its modification time. Images elsewhere
that tables name count too. Where the data lies is no part of it.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2i_lm.assets import find
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.metadata import METADATA, SUFFIXES, image_name, image_path, read_rows
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.data.splits import LOST_AND_FOUND
from t2i_lm.data.text import dataset_split
from t2i_lm.runtime.progress import going_on
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.reading import require_lasting, require_regular

# Keys of data in a config.
DATA_KEYS = (
    "data.path",
    "data.val_path",
    "data.second_val_path",
    "data.replay_path",
    "forgetting.text",
    "forgetting.second_text",
)
# Files that hold captions or text are hashed whole before others: at most so many bytes and files of each kind.
CAPTIONED = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".gz")
CAPTIONED_BYTES, OTHER_BYTES, FILES = 2**30, 2**26, 2000
# Tables, in which names of images are looked for.
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PATH_COLUMN = re.compile(r"(^|[._])(image|jpg|jpeg|png|webp|img|path|file|filepath|filename|name)$", re.IGNORECASE)
_IMAGE_NAME = re.compile(rb"""[^"',;\t\r\n]+\.(?:jpe?g|png|webp|bmp|gif|tiff?)(?=["',;\t\r\n]|$)""", re.IGNORECASE)


def local_content(path: str, apart: tuple[str, ...]) -> str | None:
    """`content_of` a path on this machine, else None. A copy is equal: times of files do not count.

    In a large folder, images that were replaced by others of equal name and size are therefore not noticed.
    """
    place = find(path)
    return None if place is None else content_of(str(place), apart, times=False)


def data_contents(
    config: ExperimentConfig, content: Callable[[str, tuple[str, ...]], str | None] = local_content
) -> dict[str, str]:
    """What identifies the data on this machine that a config names, by key."""
    apart = (config.data.cache_dir, config.run.dir)
    paths = {key: path for key in DATA_KEYS if (path := config.value(key)) is not None}
    found = {key: content(path, apart) for key, path in paths.items()}
    return {key: value for key, value in found.items() if value is not None}


def changed_data(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Keys of data with other content than before; data that is not at hand now is none of them."""
    return [key for key, content in then.items() if now.get(key, content) != content]


def content_of(path: str, apart: Sequence[str | Path] = (), hub: bool = False, times: bool = True) -> str | None:
    """What identifies the data at a path.

    Args:
        path: file, folder, or with `hub` also `NAME[:SPLIT]` of a Hugging Face dataset.
        apart: folders inside it that hold other things, such as caches and runs. Hidden files are left out, too.
        hub: whether a name that is no file or folder is a dataset's.
        times: whether files that are not hashed are identified by their modification times, too.

    Returns:
        A digest of the file or folder; the commit of a dataset, with the split unless that is `train`. None if it is
        unknown without the network, or if there is nothing at the path.
    """
    location = Path(path)
    if location.is_file():
        files = {location.name: location}
    elif location.is_dir():
        files = _members(location, {Path(folder).resolve() for folder in apart})
    elif hub:
        repository, split = dataset_split(path)
        commit = _commit(repository)
        return commit if commit is None or split == "train" else f"{commit}:{split}"
    else:
        return None
    tables = [file for file in files.values() if file.suffix.lower() in TABLES]
    known = {os.path.realpath(file) for file in files.values()}
    for table in tables if len(tables) <= FILES else []:
        for name in _images_named_in(table, table == location or table.name in METADATA):
            image = table.parent / name
            if os.path.isfile(image) and os.path.realpath(image) not in known:
                files.setdefault(name, image)
    names = sorted(files, key=lambda name: (Path(name).suffix.lower() not in CAPTIONED, name))
    left = {True: [CAPTIONED_BYTES, FILES], False: [OTHER_BYTES, FILES]}
    digest = hashlib.sha256()
    for name in names:
        going_on()
        budget = left[Path(name).suffix.lower() in CAPTIONED]
        try:
            status = files[name].stat()
            budget[0], budget[1] = budget[0] - status.st_size, budget[1] - 1
            whole = min(budget) >= 0
            mark = file_sha256(files[name]) if whole else f"modified {status.st_mtime_ns}" if times else ""
            entry = [status.st_size, mark]
        except OSError as error:  # a link to nothing, or unreadable: so it will be for the reader
            require_lasting(error, str(files[name]))
            entry = ["unreadable"]
        # A file is named by its place in a folder; on its own, only its content counts.
        digest.update(repr(["" if files[name] == location else name, *entry]).encode())
    return f"content {digest.hexdigest()[:16]}"


def _members(folder: Path, apart: set[Path]) -> dict[str, Path]:
    """Every file below a folder by its relative name, and every subfolder that cannot be listed (its reader says so).

    Links are followed, but no folder is entered twice.
    """
    files, entered = {}, set[str]()

    def add_unlisted(error: OSError) -> None:
        place = Path(error.filename)
        require_lasting(error, str(place))
        if place.name != LOST_AND_FOUND and place.resolve() not in apart:
            files[f"{place.relative_to(folder).as_posix()}/"] = place  # an entry that no file has

    for root, folders, names in os.walk(folder, onerror=add_unlisted, followlinks=True):
        real = os.path.realpath(root)
        if real in entered or (root != str(folder) and Path(real) in apart):
            folders.clear()
            continue
        entered.add(real)
        going_on()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                file = Path(root, name)
                files[file.relative_to(folder).as_posix()] = file
    return files


def _images_named_in(table: Path, is_metadata: bool) -> Iterator[str]:
    """Names of images in a table: of metadata those that its reader finds, of others what looks like one."""
    try:
        require_regular(table)
        if table.suffix.lower() == ".parquet":
            yield from _paths_in_parquet(table)
        elif table.stat().st_size <= CAPTIONED_BYTES:
            yield from (_listed_in(table) if is_metadata else []) or _look_alikes(table)
    except (OSError, ValueError):  # as the reader will say
        return


def _listed_in(table: Path) -> list[str]:
    """The image files that a metadata file lists; none of a file that is no metadata."""
    if table.suffix.lower() not in SUFFIXES:
        return []
    found = set()
    with suppress(ValueError):
        for row in read_rows(table):
            with suppress(RejectedPairError):
                path = image_path(str(table.parent), image_name(row), row.where)
                found.add(path.removeprefix(f"{table.parent}/"))
    return sorted(found)


def _look_alikes(table: Path) -> list[str]:
    found = {name.strip().replace(b"\\/", b"/") for name in _IMAGE_NAME.findall(table.read_bytes())}
    return [name.decode("utf-8", "replace") for name in sorted(found)]


def _paths_in_parquet(table: Path) -> Iterator[str]:
    """Text in a column of paths, unless the bytes of every image are beside it."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        numbers = {file.schema.column(number).path: number for number in range(len(file.schema))}
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        for names in _text_leaves(file.schema_arrow):
            path = ".".join(names)
            if not _PATH_COLUMN.search(path):
                continue
            beside = numbers.get(".".join((*names[:-1], "bytes"))) if len(names) > 1 else None
            if beside is not None and not any(_nulls(group, beside) for group in groups):
                continue
            for batch in file.iter_batches(columns=[path]):
                column = batch.column(names[0])
                for name in names[1:]:
                    column = column.field(name)
                yield from (name for name in column.to_pylist() if isinstance(name, str) and "\0" not in name)


def _text_leaves(fields: Iterable[Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Columns of text, and fields of text in columns of structs, by their names; lists hold no image's name."""
    import pyarrow

    for field in fields:
        names = (*parents, field.name)
        if pyarrow.types.is_struct(field.type):
            yield from _text_leaves([field.type.field(number) for number in range(field.type.num_fields)], names)
        elif pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type):
            yield names


def _nulls(group: Any, column: int) -> bool:
    """Whether a column may have missing values in a row group."""
    statistics = group.column(column).statistics
    return statistics is None or not statistics.has_null_count or statistics.null_count > 0


def _commit(name: str) -> str | None:
    """The commit of a Hugging Face dataset: the hub's, or without a network the newest in its cache."""
    from huggingface_hub import HfApi, constants

    try:
        return f"commit {HfApi().dataset_info(name, timeout=10).sha}"
    except Exception:  # whatever its client raises without a network, or for a name that it does not have
        reference = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", "main")
        return f"commit {reference.read_text(encoding='utf-8').strip()}" if reference.is_file() else None
