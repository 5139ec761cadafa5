"""Sources of plain text: files of documents separated by form feeds, or a Hugging Face dataset."""

import gzip
import hashlib
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from t2i_lm.assets import resolve
from t2i_lm.config.sections import ASSET
from t2i_lm.data.captions import find_name
from t2i_lm.data.splits import NAMES, files_below, named_below, path_split
from t2i_lm.storage.reading import require_regular

DOCUMENT_SEPARATOR = "\f"
SUFFIXES = (".txt", ".txt.gz")
_DATASET = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(:[^/\\]+)?")
HUB_CHARACTERS = 2**24  # of a dataset on a hub that a model is measured on: some may be of terabytes
# Keys of paths that are trained on; others are held-out text.
TRAINED_ON = ("data.path", "data.replay_path")


def read_documents(path: str, key: str = "data.path") -> Iterator[str]:
    """Documents of a text file (`.txt`, `.txt.gz`), a folder of them, or a Hugging Face dataset.

    Args:
        path: file or folder, or `asset:NAME` (shipped); else the name of a dataset, `[OWNER/]NAME[:SPLIT]`, column
            `text`. Of a folder whose files are named after several splits, those of the key's split are read.
        key: config key of `path`.

    Raises:
        ValueError: if `path` cannot be read or holds no text file.
    """
    location = text_location(path, key)
    if location.exists() and not location.is_dir():
        if not location.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{key}={path}: expected plain text, a {' or '.join(SUFFIXES)} file or a folder of them")
        files = [location]
    elif location.is_dir():
        files = _files_of_split(location, key)
    elif not is_dataset_name(path):
        raise ValueError(f"{key}={path!r}: no such file or folder")
    else:
        yield from _hub_documents(path, key)
        return
    for file in files:
        opener = gzip.open if file.suffix.lower() == ".gz" else open
        try:
            require_regular(file)
            with opener(file, "rt", encoding="utf-8-sig") as stream:
                text = str(stream.read())
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise ValueError(f"{key}: {file} cannot be read as UTF-8 text: {error}") from error
        yield from (document for document in text.split(DOCUMENT_SEPARATOR) if document.strip())


def first_documents(path: str, key: str) -> Iterator[str]:
    """Documents to measure a model on: as `read_documents`, of a Hugging Face dataset the first `HUB_CHARACTERS`."""
    here, read = text_location(path, key).exists(), 0
    for document in read_documents(path, key):
        yield document if here else document[: HUB_CHARACTERS - read]
        read += len(document)
        if read >= HUB_CHARACTERS and not here:
            return


def is_dataset_name(path: str) -> bool:
    """Whether a text's path, where no file or folder has it, is the name of a Hugging Face dataset."""
    return _DATASET.fullmatch(path) is not None and not path.lower().endswith(SUFFIXES)


def is_on_hub(path: str) -> bool:
    """Whether a text is one of a Hugging Face dataset, and not on this machine."""
    return is_dataset_name(path) and not Path(path).exists()


def dataset_split(name: str) -> tuple[str, str]:
    """The repository and the split that the name of a Hugging Face dataset, `NAME[:SPLIT]`, stands for."""
    repository, _, split = name.partition(":")
    return repository, split or "train"


def same_dataset(one: str, other: str) -> bool:
    """Whether two texts are one split of one Hugging Face dataset."""
    return is_on_hub(one) and is_on_hub(other) and dataset_split(one) == dataset_split(other)


def text_location(path: str, key: str) -> Path:
    """The file or folder of a text, which is absent for a text on a hub.

    Raises:
        ValueError: if there is no such shipped text, naming those that exist.
    """
    return resolve(path, key) if path.startswith(ASSET) else Path(path)


def _files_of_split(folder: Path, key: str) -> list[Path]:
    files = files_below(folder, lambda name: name.lower().endswith(SUFFIXES))
    if not files:
        raise ValueError(f"{key}: no .txt or .txt.gz file in {folder} or its subfolders; {named_below(folder)}")
    groups: dict[str | None, list[Path]] = {}
    try:
        for file in files:
            groups.setdefault(path_split(PurePosixPath(file.relative_to(folder).as_posix())), []).append(file)
    except ValueError as error:
        raise ValueError(f"{key}={folder}: {error}") from error
    if len(groups) == 1:
        return files
    found = "; ".join(f"{NAMES[split] if split else 'no split'}: {names[0].name}" for split, names in groups.items())
    split = "train" if key in TRAINED_ON else "val"
    if None in groups or split not in groups:
        raise ValueError(f"{key}={folder}: unknown which files are {NAMES[split]} text ({found}); name one file")
    left_out = [NAMES[str(other)] for other in groups if other != split]
    print(f"{key}={folder}: left out: {' and '.join(left_out)} text", file=sys.stderr)
    return groups[split]


def _hub_documents(name: str, key: str) -> Iterator[str]:
    from datasets import load_dataset

    repository, split = dataset_split(name)
    try:
        rows = load_dataset(repository, split=split, streaming=True)
        iterator = iter(rows)
        row = next(iterator, None)
    except Exception as error:  # of network, builders and Arrow readers
        raise ValueError(
            f"{key}={name!r} is neither a file or folder nor a reachable Hugging Face dataset: "
            f"{str(error).strip().split(chr(10))[0]}"
        ) from error
    number = 0
    while row is not None:
        column = find_name(("text",), row)
        if column is None:
            raise ValueError(f"{key}={name!r}: no column text; it has {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str | None):
            raise ValueError(f"{key}={name!r} row {number}: text is of type {type(text).__name__}, not a string")
        if text and text.strip():
            yield text
        number += 1
        try:
            row = next(iterator, None)
        except Exception as error:
            raise ValueError(f"{key}={name!r} row {number} cannot be read: {error}") from error


def paragraphs(document: str) -> Iterator[str]:
    """Non-empty paragraphs of a document."""
    return (paragraph for paragraph in document.split("\n\n") if paragraph.strip())


def recurring_documents(held_out: str, key: str, trained: str) -> dict[str, Any]:
    """How many documents of a held-out text are also in `data.path`: their number, of how many, and the first's start.

    Of text on a hub nothing is read here, and excerpts are not found.
    """
    if not (text_location(held_out, key).exists() and text_location(trained, "data.path").exists()):
        return {"documents": 0, "of": 0, "first": ""}
    documents = list(read_documents(held_out, key))
    recurring = recurring_in(documents, read_documents(trained))
    return {"documents": len(recurring), "of": len(documents), "first": beginning(recurring[0]) if recurring else ""}


def recurring_in(documents: Sequence[str], others: Iterable[str]) -> list[str]:
    """The documents that are also among others, white space aside."""
    digests = [_digest(document) for document in documents]
    known = set(digests)
    found = {digest for other in others if (digest := _digest(other)) in known}
    return [document for document, digest in zip(documents, digests, strict=True) if digest in found]


def beginning(document: str) -> str:
    """What a message shows of a document."""
    return " ".join(document.split())[:60]


def _digest(document: str) -> bytes:
    return hashlib.blake2b(" ".join(document.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
