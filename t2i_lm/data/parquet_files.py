"""Parquet files of captioned images: one, or those of a folder."""

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.captions import find_name
from t2i_lm.data.identity import content_of
from t2i_lm.data.metadata import SPLIT_NAMES
from t2i_lm.data.splits import files_below, location, named_below, split_files
from t2i_lm.data.tables import Columns, Origin, Table, one_line, open_table
from t2i_lm.storage.reading import require_lasting, require_regular

# Rows that are read at a time: the size of the first row group, the default of `datasets`, may be 0.
BATCH_ROWS = 1000


@dataclass(frozen=True)
class ParquetFile:
    """A file with rows.

    Attributes:
        path: the file.
        rows: their number.
        features: types of all columns, as `datasets` has them.
        columns: names of the columns that are used.
    """

    path: Path
    rows: int
    features: Mapping[str, Any]
    columns: list[str]


def parquet(data: DataConfig, split: str, size: int) -> Table:
    """Parquet files (one, or those of a folder) with an image and a caption column."""
    import datasets
    import pyarrow

    key, root = location(data, split)
    origin = f"{key}={root}"
    found = split_files(data, split, find_parquet)
    files = _with_rows(found.files, root, origin)
    # `datasets` identifies files by name and time alone.
    contents = [content_of(str(file)) for file in found.files]
    cache = str(Path(data.cache_dir) / "parquet" / hashlib.sha256(repr(contents).encode()).hexdigest()[:12])
    names = [glob.escape(str(file.path.resolve())) for file in files]
    columns = files[0].columns
    try:
        # `load_dataset` would count it over the network.
        rows = datasets.Dataset.from_parquet(names, cache_dir=cache, columns=columns, batch_size=BATCH_ROWS)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        name, reason = _first_unreadable(files, root, origin) or (origin, error.__cause__ or error)
        raise ValueError(f"{name} cannot be read as Parquet: {one_line(reason)}") from error
    *starts, expected = accumulate((file.rows for file in files), initial=0)
    if len(rows) != expected:
        raise ValueError(
            f"{origin}: {len(rows):,} rows were read where its files have {expected:,}; start again when they are no "
            f"longer written to, or delete {cache}"
        )
    notes = [*found.notes, *Columns.find(files[0].features, origin).notes(list(files[0].features), origin)]
    places = Origin(starts, [str(file.path.parent) for file in files], [file.path.name for file in files])
    return open_table(rows, data, split, places, found.automatic, found.named, notes)


def find_parquet(folder: Path) -> list[Path]:
    """The Parquet files of a folder and its subfolders.

    Raises:
        ValueError: if there is none.
    """
    files = files_below(folder, lambda name: name.lower().endswith((".parquet", ".pq")))
    if not files:
        raise ValueError(f"data.source=parquet: no Parquet file in {folder} or its subfolders; {named_below(folder)}")
    return files


def _with_rows(paths: Sequence[Path], root: Path, origin: str) -> list[ParquetFile]:
    """The files that have rows, by their footers.

    Raises:
        ValueError: if there is none, or naming the file that cannot be read or has other columns than the first.
    """
    files = list[ParquetFile]()
    for path in paths:
        file = _read_footer(path, _name(path, root, origin))
        if file is None:
            continue
        if files and file.columns != files[0].columns:
            raise ValueError(
                f"{_name(path, root, origin)}: columns {', '.join(file.columns)} would be read, but "
                f"{', '.join(files[0].columns)} of {files[0].path}; give them the same columns"
            )
        files.append(file)
    if not files:
        raise ValueError(f"{origin}: no rows in {', '.join(path.name for path in paths[:8])}")
    return files


def _read_footer(path: Path, name: str) -> ParquetFile | None:
    """A file by its footer; None if it has no rows."""
    import datasets
    import pyarrow.parquet

    if "::" in str(path.resolve()):
        raise ValueError(f"{name}: `datasets` cannot read {path.resolve()}, with :: in its path; rename it")
    try:
        require_regular(path)
        metadata = pyarrow.parquet.read_metadata(path)
        features = datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
    except Exception as error:  # of footers, and of the features that `datasets` keeps there
        require_lasting(error, name)
        raise ValueError(f"{name} cannot be read as Parquet: {one_line(error)}") from error
    if not metadata.num_rows:
        return None
    columns = Columns.find(features, name)
    try:
        split = find_name(SPLIT_NAMES, features)
    except ValueError as error:
        raise ValueError(f"{name}: columns {error}") from error
    used = [columns.image, columns.caption, *([] if split is None else [split])]
    return ParquetFile(path, metadata.num_rows, features, used)


def _first_unreadable(files: Sequence[ParquetFile], root: Path, origin: str) -> tuple[str, Exception] | None:
    """The name of the first file whose rows cannot be read as those of the first file, and why."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    columns = files[0].columns
    schema = datasets.Features({column: files[0].features[column] for column in columns}).arrow_schema
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file.path) as opened:
                for batch in opened.iter_batches(BATCH_ROWS, columns=columns):
                    datasets.table.table_cast(pyarrow.Table.from_batches([batch]), schema)
        except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
            return _name(file.path, root, origin), error
    return None


def _name(path: Path, root: Path, origin: str) -> str:
    """A file in messages."""
    return origin if path == root else f"{origin}: {path.relative_to(root)}"
