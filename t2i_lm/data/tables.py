"""Rows of tables with an image and a caption column: of Hugging Face datasets, stored or streamed.

An image is bytes, or the path of a file: relative to the Parquet file that names it. Rows are pairs of their own; rows
with the same image are on one side of the split.
"""

import bisect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.captions import CAPTION_NAMES, captions_of, find_name, other_captions
from t2i_lm.data.digests import digests_of_files, file_digest, image_digest, image_digests, store_path
from t2i_lm.data.metadata import SPLIT_NAMES, image_path
from t2i_lm.data.pairs import Pair, RejectedPairError, Sample, decode_image
from t2i_lm.data.splits import (
    HELD_OUT_EVERY,
    choose,
    column_splits,
    in_split_of_stream,
    location,
    named_splits,
    split_by_content,
)
from t2i_lm.runtime.progress import Advance

# In order of preference.
IMAGE_COLUMNS = (
    *("image", "jpg", "png", "webp", "jpeg", "img"),
    *("image_path", "file_name", "filename", "image_file", "file_path", "filepath", "path", "file"),
)
TEXT_TYPES, BINARY_TYPES = ("string", "large_string"), ("binary", "large_binary")
BATCH = 256


@dataclass(frozen=True)
class Columns:
    """Names of the image and caption columns of a Hugging Face dataset."""

    image: str
    caption: str

    @classmethod
    def find(cls, features: Mapping[str, Any], origin: str) -> "Columns":
        """The first known name of each; an image column holds bytes or paths.

        Raises:
            ValueError: if there is none, listing the columns and their types.
        """
        images = [name for name, feature in features.items() if _holds_images(feature)]
        try:
            image, caption = find_name(IMAGE_COLUMNS, images), find_name(CAPTION_NAMES, features)
        except ValueError as error:
            raise ValueError(f"{origin}: columns {error}") from error
        if image is None or caption is None:
            expected = f"{' or '.join(IMAGE_COLUMNS[:8])} with bytes or paths" if image is None else None
            raise ValueError(
                f"{origin}: no column {expected or ' or '.join(CAPTION_NAMES)}; it has "
                f"{', '.join(f'{name} ({_type_name(feature)})' for name, feature in features.items())}"
            )
        return cls(image, caption)

    def notes(self, names: Sequence[str], origin: str) -> list[str]:
        """A line on columns that are not read, though their names are those of captions."""
        others = other_captions(names)
        return [f"{origin}: captions are column {self.caption}; not read: {', '.join(others)}"] if others else []

    def select(self, rows: Any) -> Any:
        """The two columns, the image undecoded, so that a bad one is a reject and not an exception in `datasets`."""
        import datasets

        return rows.select_columns([self.image, self.caption]).cast_column(self.image, datasets.Image(decode=False))

    def pair(self, row: dict[str, Any], name: str, where: str, folder: str) -> Pair:
        """The pair of a row; `name` is its id, `where` names it in messages, `folder` is where paths start."""
        captions = captions_of(row[self.caption], f"{where}, column {self.caption}")
        file = _file(row[self.image], where, folder)
        return Pair(name, decode_image(file, f"{where} ({file})" if isinstance(file, str) else where), captions, None)

    def digest(self, row: dict[str, Any], folder: str) -> str | None:
        """Digest of a row's image; None if it cannot be read."""
        try:
            file = _file(row[self.image], "", folder)
        except RejectedPairError:
            return None
        return file_digest(Path(file)) if isinstance(file, str) else image_digest(file.getvalue())


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, Mapping):
        return "bytes" in feature or "path" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in TEXT_TYPES + BINARY_TYPES


def _type_name(feature: Any) -> str:
    if isinstance(feature, Mapping):
        return f"struct of {', '.join(feature)}"
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _file(cell: dict[str, Any] | None, where: str, folder: str) -> io.BytesIO | str:
    """The bytes of an image cell, or else its path."""
    cell = cell or {}
    if cell.get("bytes") is not None:
        return io.BytesIO(cell["bytes"])
    return image_path(folder, cell.get("path"), where)


@dataclass(frozen=True)
class Origin:
    """Where rows come from, for paths and messages: the first row of each file, its folder, and its name."""

    starts: Sequence[int]
    folders: Sequence[str]
    names: Sequence[str]

    def of(self, row: int) -> tuple[str, str]:
        """The name of a row, and the folder that its path is relative to."""
        file = bisect.bisect_right(self.starts, row) - 1
        return f"{self.names[file]} row {row - self.starts[file]}".lstrip(), self.folders[file]


class Table:
    """Rows of a stored Hugging Face dataset."""

    def __init__(
        self, rows: Any, columns: Columns, origin: Origin, indices: Sequence[int], notes: Sequence[str] = ()
    ) -> None:
        """`rows` have the two columns alone; `indices` are those of the split."""
        self.rows, self.columns, self.origin = rows, columns, origin
        self.indices, self.notes = indices, list(notes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        row = self.indices[index]
        where, folder = self.origin.of(row)
        return self.columns.pair(self.rows[row], f"row {row}", where, folder)


def open_table(
    rows: Any, data: DataConfig, split: str, origin: Origin, automatic: bool, named: bool, notes: Sequence[str]
) -> Table:
    """The rows of a split: unless they are `named`, by a column `split`; else, where `automatic`, by their images."""
    key, path = location(data, split)
    name = f"{key}={path}"
    columns = Columns.find(rows.features, name)
    try:
        pairs = columns.select(rows)
    except (TypeError, ValueError, NotImplementedError) as error:  # Arrow raises subclasses of the last two
        raise ValueError(f"{name}: column {columns.image} holds no images: {error}") from error
    indices: Sequence[int] = range(len(rows))
    notes = [*notes, *columns.notes(rows.column_names, name)]
    if not named and (groups := _named_rows(rows, name)) is not None:
        names = {group: [f"row {row}" for row in members] for group, members in groups.items()}
        choice = choose(names, data, split)
        indices, automatic, notes = groups[choice.group], choice.automatic, [*notes, *choice.notes]
    if automatic:
        digests = _row_digests(pairs, columns, origin, store_path(data.cache_dir, "table", path))
        read = Table(pairs, columns, origin, indices).__getitem__
        chosen = split_by_content([digests[row] for row in indices], split, name, read)
        indices = [indices[index] for index in chosen]
    return Table(pairs, columns, origin, indices, notes)


def _named_rows(rows: Any, origin: str) -> dict[str | None, list[int]] | None:
    """Rows by the split that a column `split` names; None without such a column."""
    import datasets

    column = find_name(SPLIT_NAMES, rows.column_names)
    feature = None if column is None else rows.features[column]
    values = rows[column] if getattr(feature, "dtype", None) in TEXT_TYPES else None
    if isinstance(feature, datasets.ClassLabel):
        values = [value if value is None or value < 0 else feature.int2str(value) for value in rows[column]]
    if values is None:
        return None
    splits = column_splits(values, lambda row: f"{origin} row {row}")
    groups: dict[str | None, list[int]] = {}
    for row, found in enumerate(splits or ()):
        groups.setdefault(found, []).append(row)
    return groups or None


def _row_digests(rows: Any, columns: Columns, origin: Origin, store: Path) -> list[str | None]:
    """Digests of the images of all rows; those of bytes are kept for the files of the dataset's own cache."""
    cached = [Path(file["filename"]) for file in rows.cache_files]

    def compute(_: Path, advance: Advance) -> list[str | None]:
        return list(_digests_of_cells(rows, columns, advance))

    if cached:
        kept = digests_of_files(cached[:1], store, compute)[0]
        found = list(kept) if isinstance(kept, list) and len(kept) == len(rows) else compute(Path(), lambda _: None)
    else:
        found = compute(Path(), lambda _: None)
    paths = {}
    for row in (row for row, digest in enumerate(found) if digest == BY_PATH):
        where, folder = origin.of(row)
        try:
            paths[row] = image_path(folder, rows[row][columns.image]["path"], where)
        except RejectedPairError:
            found[row] = None
    if paths:
        files = list(dict.fromkeys(paths.values()))
        by_file = dict(zip(files, image_digests(files, store.with_suffix(".paths.json")), strict=True))
        for row, file in paths.items():
            found[row] = by_file[file]
    return found


# In place of a digest: the image is a file of its own, whose digest is kept with that file's state.
BY_PATH = "path"


def _digests_of_cells(rows: Any, columns: Columns, advance: Advance) -> Iterator[str | None]:
    images = rows.select_columns([columns.image]).with_format("arrow")
    for start in range(0, len(images), BATCH):
        for cell in images[start : start + BATCH].column(0).to_pylist():
            content = None if cell is None else cell.get("bytes")
            if content is None:
                yield BY_PATH if cell and cell.get("path") else None
            else:
                advance(len(content))
                yield image_digest(content)


@dataclass(frozen=True)
class HubParts:
    """A Hugging Face dataset's splits: training, validation if there is one, and what is left out."""

    train: Any
    val: Any | None
    notes: list[str]

    def part(self, split: str) -> tuple[Any, bool]:
        """The rows for a split, and whether they hold both."""
        if self.val is None:
            return self.train, True
        return (self.train if split == "train" else self.val), False


def hub(data: DataConfig, split: str, size: int) -> Table:
    """A Hugging Face dataset by name, with its own validation split if it has one."""
    parts = _load_dataset(data, streaming=False)
    rows, automatic = parts.part(split)
    return open_table(rows, data, split, Origin([0], [base_folder(data)], [""]), automatic, not automatic, parts.notes)


def base_folder(data: DataConfig) -> str:
    """The folder that paths of images are relative to; empty for a dataset's name or a file."""
    return str(data.path) if Path(str(data.path)).is_dir() else ""


class Stream:
    """A streamed Hugging Face dataset."""

    def __init__(
        self, rows: Any, origin: str, folder: str, keep: Callable[[Any], bool] | None, notes: Sequence[str] = ()
    ) -> None:
        """`keep` selects the split's samples by digest; None: all."""
        if rows.features is None:
            raise ValueError(f"{origin}: the stream does not declare its columns; use data.source=hub")
        self.columns = Columns.find(rows.features, origin)
        self.rows = self.columns.select(rows)
        self.notes = [*notes, *self.columns.notes(list(rows.features), origin)]
        self.origin, self.folder, self.keep = origin, folder, keep

    @property
    def shards(self) -> int:
        return int(self.rows.num_shards)

    def shard(self, number: int) -> Iterator[Sample]:
        """The samples of one shard, in order.

        Raises:
            ValueError: if the shard cannot be read on.
        """
        position = -1
        rows = iter(self.rows.shard(num_shards=self.shards, index=number))
        while True:
            position += 1
            name = f"shard {number} row {position}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of network, archive and Arrow readers
                raise ValueError(f"{self.origin} {name} cannot be read: {one_line(error)}") from error
            if self.keep is None or self.keep(self.columns.digest(row, self.folder)):
                yield partial(self.columns.pair, row, name, name, self.folder)


def hub_stream(data: DataConfig, split: str, size: int) -> Stream:
    """As `hub`, but read once, in order, and not stored: for data that does not fit on a disk."""
    limit = data.train_size if split == "train" else data.val_size
    if limit is not None:
        later = "; runs on its shards may set it" if split == "val" else ""
        raise ValueError(f"data.{split}_size={limit}: expected null, since a stream is read to its end{later}")
    parts = _load_dataset(data, streaming=True)
    rows, automatic = parts.part(split)
    keep = partial(in_split_of_stream, split=split) if automatic else None
    return Stream(rows, f"data.path={data.path}", base_folder(data), keep, parts.notes)


def _load_dataset(data: DataConfig, streaming: bool) -> HubParts:
    import datasets

    require_no_pattern(str(data.path), f"data.path={data.path}")
    try:
        parts = datasets.load_dataset(str(data.path), streaming=streaming)
    except Exception as error:  # of network, builders and Arrow readers
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise ValueError(
            f"data.path={data.path}: no such Hugging Face dataset, or it is unreachable or unreadable: "
            f"{one_line(cause or error)}"
        ) from error
    return hub_parts(parts, f"data.path={data.path}")


def require_no_pattern(path: str, origin: str) -> None:
    """Checks that `datasets` reads a local folder, and no others that its path matches as a pattern.

    Raises:
        ValueError: naming the characters.
    """
    place = str(Path(path).resolve())
    if Path(path).exists() and (found := [sign for sign in ("*", "?", "[", "::") if sign in place]):
        raise ValueError(
            f"{origin}: {' and '.join(found)} in {place} would match other folders; rename it, or use "
            "data.source=parquet for a folder of Parquet files"
        )


def hub_parts(parts: Mapping[str, Any], origin: str) -> HubParts:
    """Training and validation among splits by name, `train` and `validation` or others with those words.

    Raises:
        ValueError: if there is no training split, or several could be one of the two.
    """
    train, val = _part(parts, "train", "train", origin), _part(parts, "val", "validation", origin)
    if train is None:
        raise ValueError(f"{origin}: no split named train; it has {', '.join(parts)}")
    others = [name for name in parts if name not in (train, val)]
    notes = [f"{origin}: left out: split {', '.join(others)}"] if others else []
    if val is None:
        notes.append(f"{origin}: no validation split; one of {HELD_OUT_EVERY} images of {train} is held out")
    return HubParts(parts[train], None if val is None else parts[val], notes)


def _part(parts: Mapping[str, Any], split: str, usual: str, origin: str) -> str | None:
    if usual in parts:
        return usual
    named = [name for name in parts if named_splits(name) == {split}]
    if len(named) > 1:
        raise ValueError(f"{origin}: splits {' and '.join(named)} could all be {usual}, and none is called that")
    return named[0] if named else None


def one_line(error: BaseException) -> str:
    """The first line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
