"""Sources of captioned images by name: scenes, image folders, Parquet, tar files, Hugging Face datasets, plug-ins.

A source is a sized sequence of `Pair`s. An unusable sample raises `RejectedPairError` with a reason, which `prepare`
counts; every other error stops it.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from t2i_lm.config.sections import DataConfig, is_plugin
from t2i_lm.data.pairs import (
    CaptionedSource,
    Pair,
    RejectedPairError,
    Sample,
    StreamedSource,
    captions_of,
    decode_image,
)
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.tars import TarFolder, open_tars
from t2i_lm.runtime.plugins import SOURCE, find_plugin

# Every 20th sample, by position, is validation where a source has no validation split.
HELD_OUT_EVERY = 20
SPLITS = ("train", "val")
METADATA = "metadata.jsonl"


class ImageFolder:
    """A folder with `metadata.jsonl`: one `{"file_name": ..., "captions": [...]}` per line."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        self.folder, self.rows = folder, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        name = str(row["file_name"])
        captions = captions_of(row.get("captions", row.get("caption")), name)
        return Pair(name, decode_image(self.folder / name, name), captions, None)


@dataclass(frozen=True)
class Columns:
    """Names of the image and caption columns of a Hugging Face dataset."""

    IMAGES = ("image", "jpg", "png", "webp")
    CAPTIONS = ("captions", "caption", "text", "txt")
    image: str
    caption: str

    @classmethod
    def find(cls, names: Sequence[str], origin: str) -> "Columns":
        """The first known name of each.

        Raises:
            ValueError: if there is none.
        """

        def first(known: tuple[str, ...]) -> str:
            for name in known:
                if name in names:
                    return name
            raise ValueError(f"{origin}: no column {' or '.join(known)}; it has {', '.join(names)}")

        return cls(first(cls.IMAGES), first(cls.CAPTIONS))

    def pair(self, row: dict[str, Any], name: str) -> Pair:
        """The pair of a row with an undecoded image: bytes, or else a path."""
        cell = row[self.image] or {}
        if cell.get("bytes") is None and cell.get("path") is None:
            raise RejectedPairError("no image", name)
        file = io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
        return Pair(name, decode_image(file, name), captions_of(row[self.caption], name), None)


class Table:
    """Rows of a Hugging Face dataset with an image column and a caption column."""

    def __init__(self, rows: Any, origin: str, indices: Sequence[int]) -> None:
        import datasets

        self.columns, self.indices = Columns.find(rows.column_names, origin), indices
        # Undecoded, so that a bad image is a reject and not an exception inside `datasets`.
        self.rows = rows.cast_column(self.columns.image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        row = self.indices[index]
        return self.columns.pair(self.rows[row], f"row {row}")


class Stream:
    """A streamed Hugging Face dataset."""

    def __init__(self, rows: Any, origin: str, keep: Callable[[int], bool]) -> None:
        """`keep` selects the split's samples by their position in a shard."""
        import datasets

        if rows.column_names is None:
            raise ValueError(f"{origin}: the stream does not declare its columns; use data.source=hub")
        self.columns, self.keep = Columns.find(rows.column_names, origin), keep
        self.rows = rows.cast_column(self.columns.image, datasets.Image(decode=False))

    @property
    def shards(self) -> int:
        return int(self.rows.num_shards)

    def shard(self, number: int) -> Iterator[Sample]:
        """The samples of one shard, in order."""
        for position, row in enumerate(self.rows.shard(num_shards=self.shards, index=number)):
            if self.keep(position):
                yield partial(self.columns.pair, row, f"shard {number} row {position}")


def in_split(position: int, split: str) -> bool:
    """Whether a sample of a source without a validation split belongs to `split`."""
    return (position % HELD_OUT_EVERY == 0) == (split == "val")


def split_indices(size: int, split: str) -> list[int]:
    """Indices of a split's samples in a source without a validation split."""
    return [index for index in range(size) if in_split(index, split)]


@dataclass(frozen=True)
class SplitPath:
    """Location of a split.

    Attributes:
        path: file or folder.
        key: config key of the path, for error messages.
        split: `train` or `val`; None if all samples at `path` belong to the split.
    """

    path: Path
    key: str
    split: str | None

    @classmethod
    def from_config(cls, data: DataConfig, split: str, files: str) -> "SplitPath":
        """`data.path` and `data.val_path`; or PATH/train and PATH/val; or PATH with every 20th sample held out.

        PATH/train and PATH/val count if both have files of the pattern `files`.
        """
        root = Path(str(data.path))
        if data.val_path is not None:
            key = "path" if split == "train" else "val_path"
            return cls(Path(str(getattr(data, key))), f"data.{key}", None)
        parts = [root / name for name in SPLITS]
        if all(part.is_dir() and any(part.glob(files)) for part in parts):
            return cls(root / split, "data.path", None)
        return cls(root, "data.path", split)

    def indices(self, size: int) -> Sequence[int]:
        """Indices of the split's samples among all `size` at `path`."""
        return range(size) if self.split is None else split_indices(size, self.split)


def image_folder(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """A folder of images with `metadata.jsonl`."""
    location = SplitPath.from_config(data, split, METADATA)
    table = location.path / METADATA
    if not table.is_file():
        beside = "" if data.val_path else " or in its folders train and val"
        raise ValueError(
            f"{location.key}={location.path}: no {METADATA} in {location.path}{beside}; each line is "
            '{"file_name": "x.jpg", "captions": ["a caption"]}'
        )
    rows = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{table} line {number}: no JSON object with file_name ({error})") from error
        rows.append(row)
    return ImageFolder(location.path, [rows[index] for index in location.indices(len(rows))])


def parquet(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """Parquet files (one, or a folder of them) with an image and a caption column."""
    import datasets

    location = SplitPath.from_config(data, split, "*.parquet")
    files = [location.path] if location.path.is_file() else sorted(location.path.glob("*.parquet"))
    if not files:
        raise ValueError(f"{location.key}={location.path}: no Parquet file there")
    cache = str(Path(data.cache_dir) / "parquet")
    try:
        rows = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", cache_dir=cache
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        raise ValueError(
            f"{location.key}={location.path} cannot be read as Parquet: {error.__cause__ or error}"
        ) from error
    return Table(rows, str(location.path), location.indices(len(rows)))


def webdataset(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """Tar files (one, or a folder of them) in the format of img2dataset."""
    location = SplitPath.from_config(data, split, "*.tar")
    tars = open_tars(location.path, location.key)
    return TarFolder([tars.samples[index] for index in location.indices(len(tars))])


def hub(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """A Hugging Face dataset by name, with its own validation split if it has one."""
    parts = _load_dataset(data, streaming=False)
    if "validation" in parts:
        rows = parts["train" if split == "train" else "validation"]
        return Table(rows, str(data.path), range(len(rows)))
    return Table(parts["train"], str(data.path), split_indices(len(parts["train"]), split))


def hub_stream(data: DataConfig, split: str, size: int) -> StreamedSource:
    """As `hub`, but read once, in order, and not stored: for data that does not fit on a disk."""
    limit = data.train_size if split == "train" else data.val_size
    if limit is not None:
        raise ValueError(f"data.{split}_size={limit}: expected null, since a stream is read to its end")
    parts = _load_dataset(data, streaming=True)
    if "validation" in parts:
        return Stream(parts["train" if split == "train" else "validation"], str(data.path), lambda position: True)
    return Stream(parts["train"], str(data.path), partial(in_split, split=split))


def _load_dataset(data: DataConfig, streaming: bool) -> Any:
    import datasets

    try:
        parts = datasets.load_dataset(str(data.path), streaming=streaming)
        if "train" not in parts:
            raise ValueError(f"data.path={data.path}: no split named train; it has {', '.join(parts)}")
        return parts
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"data.path={data.path}: no such Hugging Face dataset, or it is unreachable: {error}"
        ) from error


def scenes(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """Procedural scenes, as many as the config's `train_size` and `val_size`."""
    count = data.train_size if split == "train" else data.val_size
    if count is None:
        raise ValueError(f"data.{split}_size=null: expected a number, since scenes are generated")
    scene_split = "every_pair" if split == "train" and not data.hold_out_pairs else split
    return SceneSource(count, scene_split, data.seed, size)


SOURCES: dict[str, Callable[[DataConfig, str, int], CaptionedSource | StreamedSource]] = {
    "scenes": scenes,
    "image_folder": image_folder,
    "parquet": parquet,
    "webdataset": webdataset,
    "hub": hub,
    "hub_stream": hub_stream,
}


def open_source(data: DataConfig, split: str, image_size: int) -> CaptionedSource | StreamedSource:
    """The captioned images of a split.

    Raises:
        ValueError: if there is nothing to read, naming the key, or a plug-in cannot be used.
    """
    if not is_plugin(data.source):
        return SOURCES[data.source](data, split, image_size)
    plugin = find_plugin(SOURCE, data.source, SOURCES)
    source: CaptionedSource | StreamedSource = plugin.function(data, split, image_size)
    if not isinstance(source, StreamedSource):
        plugin.require(source, ("__len__", "__getitem__"))
    return source


def open_sized(data: DataConfig, split: str, image_size: int) -> CaptionedSource:
    """As `open_source`, with random access.

    Raises:
        ValueError: also if the source is a stream.
    """
    source = open_source(data, split, image_size)
    if isinstance(source, StreamedSource):
        raise ValueError(
            f"data.source={data.source}: random access to images is required, which a stream does not have"
        )
    return source
