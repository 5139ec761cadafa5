"""Rows of metadata files: JSON lines, a JSON array, CSV or Parquet; and the image files that they name."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_lm.data.captions import CAPTION_NAMES, find_name, parse_json
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.storage.reading import require_regular

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Of `datasets`' image folders; JSON is read as well.
METADATA = tuple(f"metadata{suffix}" for suffix in SUFFIXES)
# Names of the field that names an image file, in order of preference.
IMAGE_NAMES = ("file_name", "filename", "image", "image_path", "image_file", "file_path", "filepath", "path", "file")
SPLIT_NAMES = ("split",)
# Columns that are read of a Parquet file.
READ = (*IMAGE_NAMES, *CAPTION_NAMES, *SPLIT_NAMES)
# Longer text is not the name of a file: Linux allows no longer path.
MAX_PATH = 4096


@dataclass(frozen=True)
class Row:
    """A row of a metadata file.

    Attributes:
        where: its file and line, for messages.
        fields: empty where it cannot be read.
        problem: why it cannot be read.
    """

    where: str
    fields: dict[str, Any]
    problem: str | None = None


def read_rows(path: Path) -> list[Row]:
    """All rows of a metadata file, of the kind that its suffix says.

    Raises:
        ValueError: naming file and line, if the file cannot be read, or none of its rows.
    """
    try:
        require_regular(path)
        if path.suffix == ".parquet":
            rows = list(_parquet_rows(path))
        else:
            text = _decoded(path)
            if path.suffix == ".csv":
                rows = list(_csv_rows(path, text))
            elif text.lstrip()[:1] == "[":
                rows = list(_array_rows(path, text))
            else:
                rows = list(_line_rows(path, text))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise ValueError(f"{path}: no row in it")
    if all(row.problem for row in rows):
        raise ValueError(f"{rows[0].where}: {rows[0].problem}")
    return rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    # At line feeds alone: JSON strings may hold other separators of lines, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.lstrip("\ufeff").strip()
        if not content:
            continue
        where = f"{path} line {number}"
        try:
            yield _object(parse_json(content), where)
        except ValueError as error:
            yield Row(where, {}, f"no JSON object: {error}")


def _array_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        items = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON array of objects: {error}") from error
    for number, fields in enumerate(items):
        yield _object(fields, f"{path} item {number}")


def _object(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        return Row(where, {}, f"expected a JSON object, not {str(fields)[:60]}")
    return Row(where, fields)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{path} line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = cells
                if len(set(names)) < len(names):
                    raise ValueError(f"{where}: a column name occurs twice: {', '.join(names)}")
            elif len(cells) != len(names):
                yield Row(where, {}, f"{len(cells)} cells, but {len(names)} columns: {', '.join(names)}")
            else:
                yield Row(where, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path} line {start}: no CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Other columns may be large, or hold what Python has no value for.
            read = [name for name in names if name.strip().casefold() in READ]
            rows = file.read(columns=read).to_pylist() if read else [{}] * file.metadata.num_rows
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    unread = dict.fromkeys(names)
    return (Row(f"{path} row {number}", unread | fields) for number, fields in enumerate(rows))


def image_name(row: Row) -> Any:
    """The value of the field that names a row's image.

    Raises:
        RejectedPairError: if there is no such field, listing the fields, or the row cannot be read.
    """
    if row.problem is not None:
        raise RejectedPairError("unreadable row", f"{row.where} ({row.problem})")
    try:
        key = find_name(IMAGE_NAMES, row.fields)
    except ValueError as error:
        raise RejectedPairError("ambiguous image name", f"{row.where} ({error})") from error
    if key is None:
        raise RejectedPairError("no image name", f"{row.where} (it has {', '.join(map(str, row.fields)) or 'no keys'})")
    return row.fields[key]


def require_image_names(rows: Sequence[Row]) -> None:
    """Raises a ValueError if no row names an image, listing the fields of the first."""
    for row in rows:
        with suppress(RejectedPairError):
            image_name(row)
            return
    first = next(row for row in rows if row.problem is None)
    raise ValueError(
        f"{first.where}: no {' or '.join(IMAGE_NAMES[:4])}, which names the image; it has "
        f"{', '.join(map(str, first.fields)) or 'no keys'}"
    )


def image_path(folder: str, name: Any, where: str) -> str:
    """The file that a field names: relative to `folder`, or absolute; backslashes may separate folders.

    Raises:
        RejectedPairError: if `name` cannot be the name of a file.
    """
    if name is None or name == "":
        raise RejectedPairError("no image", where)
    if not isinstance(name, str):
        raise RejectedPairError(f"image name is of type {type(name).__name__}, not a string", where)
    if "://" in name[:12]:
        raise RejectedPairError("image is a URL, which is not downloaded", f"{where} ({name[:80]})")
    if len(name) > MAX_PATH or "\0" in name or "\n" in name:
        raise RejectedPairError("image is text that is no file name", f"{where} ({name[:40]!r}...)")
    path = os.path.join(folder, name)
    if "\\" in name and not os.path.exists(path):
        path = os.path.join(folder, name.replace("\\", "/"))
    return path
