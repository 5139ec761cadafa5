"""Folders of images that metadata files list: `metadata.jsonl`, `.json`, `.csv` or `.parquet`.

All rows of one image file are one pair with several captions.
"""

import os
import posixpath
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.captions import CAPTION_NAMES, caption_value, find_name, joined_captions, other_captions
from t2i_lm.data.digests import image_digests, store_path
from t2i_lm.data.metadata import (
    METADATA,
    SPLIT_NAMES,
    SUFFIXES,
    Row,
    image_name,
    image_path,
    read_rows,
    require_image_names,
)
from t2i_lm.data.pairs import Pair, RejectedPairError, decode_image
from t2i_lm.data.splits import (
    choose,
    column_splits,
    files_below,
    is_divided,
    location,
    named_below,
    named_splits,
    split_by_content,
)

SIDECARS = "list their captions in the metadata, or pack both into tar files (data.source=webdataset)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class ListedImage:
    """An image file and its rows.

    Attributes:
        name: as in its first row.
        folder: of the metadata, relative to the source.
        path: None where `name` cannot be the name of a file.
        rows: all rows that name the file.
        id: set when the images of a split are known: `name`, below `folder` if several folders have metadata.
    """

    name: str
    folder: str
    path: str | None
    rows: list[Row] = field(default_factory=list)
    id: str = ""

    @property
    def full_name(self) -> str:
        return posixpath.normpath(posixpath.join(self.folder, self.name))


class ImageFolder:
    """The listed images of a folder, in order of their first rows."""

    def __init__(self, images: Sequence[ListedImage], notes: Sequence[str] = ()) -> None:
        self.images, self.notes = images, list(notes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        image = self.images[index]
        first = image.rows[0]
        if image.path is None:
            image_path("", image_name(first), first.where)
            raise AssertionError(f"{first.where}: expected a reject")
        name = f"{image.path} ({first.where})"
        captions = joined_captions([caption_value(row.fields, row.where) for row in image.rows], name)
        return Pair(image.id, decode_image(image.path, name), captions, None)


def image_folder(data: DataConfig, split: str, size: int) -> ImageFolder:
    """The images of a split that the metadata of a folder, and of its subfolders, list."""
    key, root = location(data, split)
    tables, pictures = _tables(key, root)
    divided = is_divided(data, split)
    groups: dict[str | None, dict[str, ListedImage]] = {}
    listed: set[str] = set()
    for table in tables:
        rows = read_rows(table)
        _require_captions(rows, table)
        require_image_names(rows)
        folder = "" if root.is_file() else os.path.relpath(table.parent, root)
        for row, group in zip(rows, _row_splits(rows, table, root, divided), strict=True):
            image = _image(row, str(table.parent), folder)
            where = os.path.abspath(image.path) if image.path else row.where
            listed.add(where)
            groups.setdefault(group, {}).setdefault(where, image).rows.append(row)
    names = {group: [image.full_name for image in images.values()] for group, images in groups.items()}
    choice = choose(names, data, split)
    images, notes = list(groups[choice.group].values()), list(choice.notes)
    if others := other_captions(images[0].rows[0].fields):
        notes.append(f"{key}={root}: captions are {_caption_name(images[0])}; not read: {', '.join(others)}")
    several = len({image.folder for image in images}) > 1
    for image in images:
        name = image.full_name if several else image.name
        image.id = name.encode("utf-8", "backslashreplace").decode()
    if unlisted := sorted(file for path, file in pictures.items() if path not in listed):
        words = f"{len(unlisted):,} image files are listed by no metadata, so left out (first: {unlisted[0]})"
        notes.append(f"{key}={root}: {words}{_beside(unlisted)}")
    if choice.automatic:
        paths = [image.path or "" for image in images]
        digests = image_digests(paths, store_path(data.cache_dir, "image_folder", root))
        chosen = split_by_content(digests, split, f"{key}={root}", ImageFolder(images).__getitem__)
        images = [images[index] for index in chosen]
    return ImageFolder(images, notes)


def _tables(key: str, root: Path) -> tuple[list[Path], dict[str, str]]:
    """The metadata files at `root`, and the image files beside and below them, by absolute path."""
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise ValueError(f"{key}={root}: expected a folder, or a metadata file ({', '.join(SUFFIXES)})")
        return [root], {}
    if not root.is_dir():
        raise ValueError(f"{key}={root}: no such folder")
    files = files_below(root, lambda name: name in METADATA or name.lower().endswith(IMAGE_SUFFIXES))
    tables = [file for file in files if file.name in METADATA]
    if not tables:
        raise ValueError(
            f"{key}={root}: no metadata.jsonl (or .json, .csv, .parquet) in it or its subfolders; {named_below(root)}. "
            f'Each line is {{"file_name": "x.jpg", "captions": ["a caption"]}}{_beside(files)}'
        )
    for table in tables:
        if twin := next((other for other in tables if other.parent == table.parent and other != table), None):
            raise ValueError(f"{key}={root}: {table} and {twin.name} are both there; keep one")
    return tables, {os.path.abspath(file): os.path.normpath(file) for file in files if file.name not in METADATA}


def _beside(images: Iterable[str | Path]) -> str:
    """A sentence on the caption files that stand beside images, as `x.txt` beside `x.jpg`, or nothing."""
    texts = [text for text in (Path(image).with_suffix(".txt") for image in images) if text.is_file()]
    if not texts:
        return ""
    return f"; {len(texts):,} of them have a file of their name (first: {texts[0].name}), which is not read: {SIDECARS}"


def _image(row: Row, beside: str, folder: str) -> ListedImage:
    """The image of a row of a metadata file in the folder `beside`, which is `folder` relative to the source."""
    try:
        value = image_name(row)
        return ListedImage(str(value), folder, image_path(beside, value, row.where))
    except RejectedPairError:
        return ListedImage(row.where, folder, None)


def _caption_name(image: ListedImage) -> str | None:
    return find_name(CAPTION_NAMES, image.rows[0].fields)


def _require_captions(rows: Sequence[Row], table: Path) -> None:
    if not any(_has_caption(row.fields) for row in rows):
        raise ValueError(
            f"{table}: no caption ({', '.join(CAPTION_NAMES)}) in any row; the first has "
            f"{', '.join(map(str, next(row.fields for row in rows if row.problem is None)))}"
        )


def _has_caption(fields: dict[str, Any]) -> bool:
    try:
        return find_name(CAPTION_NAMES, fields) is not None
    except ValueError:
        return True  # ambiguous: a reject


def _row_splits(rows: Sequence[Row], table: Path, root: Path, divided: bool) -> list[str | None]:
    """The split that each row names: by the folder of the metadata, a column `split`, or the folders of its image.

    A metadata file that a key names itself is of one split whatever its images' folders are called, unless it holds
    training and validation (`divided`) and the folders name both.

    Raises:
        ValueError: if a folder names several splits, or the column has other values too.
    """
    if not root.is_file():
        folders = table.parent.relative_to(root)
        if found := _one_split(folders.parts, f"{table}"):
            return [found] * len(rows)
    named: dict[int, Any] = {}  # a row that names no image is a reject, and has no folder
    for number, row in enumerate(rows):
        with suppress(RejectedPairError):
            named[number] = image_name(row)
    places = list(named)
    splits: Sequence[str | None] | None = column_splits(
        [_split_value(rows[number]) for number in places], lambda place: rows[places[place]].where
    )
    if splits is None:
        base = os.path.abspath(root.parent if root.is_file() else root)
        splits = [_one_split(_folders(named[number], base), rows[number].where) for number in places]
        if root.is_file() and not (divided and {"train", "val"} <= {*splits}):
            splits = [None] * len(places)
    split_of = dict(zip(places, splits, strict=True))
    others = "train" if "train" in splits else splits[0]  # where the rejects are counted
    return [split_of.get(number, others) for number in range(len(rows))]


def _split_value(row: Row) -> Any:
    try:
        column = find_name(SPLIT_NAMES, row.fields)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    return None if column is None else row.fields[column]


def _folders(name: Any, base: str) -> list[str]:
    """Folders in the name of an image: all of a relative name, those below `base` of an absolute one."""
    if not isinstance(name, str):
        return []
    path = name.replace("\\", "/")
    if path.startswith("/"):
        if not path.startswith(f"{base}/"):
            return []
        path = path[len(base) + 1 :]
    return path.split("/")[:-1]


def _one_split(folders: Sequence[str], where: str) -> str | None:
    found = set[str]().union(*map(named_splits, folders))
    if len(found) > 1:
        raise ValueError(f"{where}: {'/'.join(folders)} names several splits: {' and '.join(sorted(found))}")
    return next(iter(found), None)
