"""Sources of plain text: files of documents separated by form feeds, or a Hugging Face dataset."""

import gzip
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_SEPARATOR = "\f"


def read_documents(path: str, key: str = "data.path") -> Iterator[str]:
    """Documents of a text file (`.txt`, `.txt.gz`), a folder of them, or a Hugging Face dataset.

    Args:
        path: file or folder; anything else is `hub-name[:split]`, column `text`.
        key: config key of `path`, for error messages.

    Raises:
        ValueError: if `path` cannot be read or holds no text file.
    """
    location = Path(path)
    if location.is_dir():
        files = sorted(file for pattern in ("*.txt", "*.txt.gz") for file in location.glob(pattern))
    elif location.is_file():
        files = [location]
    elif path.endswith((".txt", ".txt.gz")):
        raise ValueError(f"{key}={path!r}: no such file")
    else:
        yield from _hub_documents(path, key)
        return
    if not files:
        raise ValueError(f"{key}: no .txt or .txt.gz file in {location}")
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rt", encoding="utf-8") as stream:
                text = str(stream.read())
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise ValueError(f"{key}: {file} cannot be read as UTF-8 text: {error}") from error
        yield from (document for document in text.split(DOCUMENT_SEPARATOR) if document.strip())


def _hub_documents(name: str, key: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError

    repository, _, split = name.partition(":")
    try:
        rows = load_dataset(repository, split=split or "train", streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, HFValidationError) as error:
        raise ValueError(
            f"{key}={name!r} is neither a file or folder nor a reachable Hugging Face dataset: {error}"
        ) from error
    for row in rows:
        yield row["text"]


def paragraphs(document: str) -> Iterator[str]:
    """Non-empty paragraphs of a document."""
    return (paragraph for paragraph in document.split("\n\n") if paragraph.strip())
