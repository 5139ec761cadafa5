"""Which samples are training and which are validation: by words in names, or else by content of the images.

Words in names follow the rules of `datasets`: a keyword between the ends of a name and its delimiters, in any case; a
folder's name counts more than a file's. Samples of a test split are left out.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.storage.reading import SpecialFileError, require_regular

SPLITS = ("train", "val")
# Generated scenes: new images of the color-shape pairs of training (the primary split), and of held-out pairs.
SCENE_VALIDATIONS = ("val/iid", "val/compositional")
# With data.second_val_path: the held-out images of other runs, and those of that path.
FIRST, SECOND = "val/first", "val/second"
WORDS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NAMES = {"train": "training", "val": "validation", "test": "test"}
# One distinct image of so many is validation where a source has no validation split.
HELD_OUT_EVERY = 20
SHOWN = 8  # names of a folder in an error message
LEAVE_OUT = "repair it, or begin its name with a dot, with which it is left out"
LOST_AND_FOUND = "lost+found"  # of a disk's root, never readable for users
_FILE_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,5}$", re.IGNORECASE)
_WORD = re.compile(
    rf"(?:^|[-._ 0-9])({'|'.join(word for words in WORDS.values() for word in words)})(?=$|[-._ 0-9])", re.IGNORECASE
)
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}


def validations_of(data: DataConfig) -> tuple[str, ...]:
    """Names of the validation splits of a source, the primary one first."""
    if data.source == "scenes" and data.hold_out_pairs:
        return SCENE_VALIDATIONS
    return ("val",) if data.second_val_path is None else (FIRST, SECOND)


# Values of a column `split`; Karpathy's split of COCO trains on the rest of the validation images.
COLUMN_VALUES = _SPLIT_OF | {"restval": "train"}


def column_splits(values: Sequence[object], where: Callable[[int], str]) -> list[str] | None:
    """The splits that a column `split` names; None if no value is the name of a split.

    Raises:
        ValueError: if only some values are, naming the row by `where`.
    """
    found = [COLUMN_VALUES.get(str(value).lower()) for value in values]
    if not any(found):
        return None
    if None in found:
        row = found.index(None)
        raise ValueError(
            f"{where(row)}: split={values[row]!r}; expected a split in every row or in none, one of "
            f"{', '.join(COLUMN_VALUES)}"
        )
    return [split for split in found if split is not None]


@functools.lru_cache(maxsize=4096)
def named_splits(name: str) -> frozenset[str]:
    """The splits (`train`, `val`, `test`) whose words a file or folder name has."""
    return frozenset(_SPLIT_OF[word.lower()] for word in _WORD.findall(name))


def path_split(path: PurePosixPath) -> str | None:
    """The split that a relative path names, by its folders or else by its file name; None if it names none.

    Raises:
        ValueError: if it names several.
    """
    found = set[str]().union(*map(named_splits, path.parts[:-1])) or named_splits(path.name)
    if len(found) > 1:
        raise ValueError(f"{path} names several splits: {' and '.join(sorted(found))}")
    return next(iter(found), None)


@dataclass(frozen=True)
class Choice:
    """The samples of a split, among samples grouped by the split that they are named after.

    Attributes:
        group: the group that they belong to.
        automatic: whether the group is divided by content of the images.
        notes: what is left out, and why.
    """

    group: str | None
    automatic: bool
    notes: list[str]


def choose(groups: dict[str | None, list[str]], data: DataConfig, split: str) -> Choice:
    """The group of a split; `groups` holds the names of files (or rows) by the split that they are named after.

    Raises:
        ValueError: if the split of some is not known, or there is none for `split`, with names of each group.
    """
    key, path = location(data, split)
    validates, divided = split != "train", is_divided(data, split)
    ordered: list[str | None] = [group for group in (*WORDS, None) if group in groups]
    found = "; ".join(f"{NAMES[group] if group else 'no split'}: {_some(groups[group])}" for group in ordered)
    # A folder given as held out is validation whatever its files are called, unless several splits are named.
    if validates and not divided and len(groups) == 1:
        return Choice(next(iter(groups)), False, [])
    if None in groups and len(groups) > 1:
        raise ValueError(
            f"{key}={path}: some names say the split and others do not, so that it is not known what is held out "
            f"({found}). Rename them, or name a file or folder of one split by data.path and another by data.val_path"
        )
    if None in groups:
        return Choice(None, divided, [])
    used = "val" if validates and ("val" in groups or not divided) else "train"
    if used not in groups or (validates and divided and "train" not in groups):
        missing = used if used not in groups else "train"
        raise ValueError(
            f"{key}={path}: no {NAMES[missing]} data by name ({found}). To use a file whatever its name, name the file "
            f"itself by {key}"
        )
    automatic = divided and "val" not in groups
    left_out = [group for group in groups if group not in (SPLITS if divided else (used,))]
    notes = [f"{key}={path}: left out: {NAMES[str(group)]} data ({_some(groups[group])})" for group in left_out]
    if automatic:
        notes.append(
            f"{key}={path}: no validation data by name ({found}); one of {HELD_OUT_EVERY} training images is held out"
        )
    return Choice(used, automatic, notes)


def is_divided(data: DataConfig, split: str) -> bool:
    """Whether a split is a part of `data.path`, which holds both training and the primary validation split."""
    return data.val_path is None and split != SECOND


def location(data: DataConfig, split: str) -> tuple[str, Path]:
    """The config key of a split's samples, and its value.

    Raises:
        ValueError: if it is a FIFO, device or socket.
    """
    name = "path" if split == "train" or is_divided(data, split) else "val_path"
    name = "second_val_path" if split == SECOND else name
    key, path = f"data.{name}", Path(str(getattr(data, name)))
    try:
        require_regular(path)
    except SpecialFileError as error:
        raise ValueError(f"{key}={path}: {error}") from error
    return key, path


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1:,} more" if len(names) > 3 else ", ".join(names)


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split.

    Attributes:
        root: folder that they are in, or the file itself.
        files: in order of their paths.
        automatic: whether they hold both splits, divided by content of the images.
        named: whether the split is that of names of files or folders.
        notes: what is left out, and why.
    """

    root: Path
    files: list[Path]
    automatic: bool
    named: bool
    notes: list[str]


def split_files(data: DataConfig, split: str, find: Callable[[Path], list[Path]]) -> SplitFiles:
    """The files of `split` below `data.path` or `data.val_path`, which may name a file.

    Args:
        data: with the two paths.
        split: name of the split.
        find: lists the files of a folder.

    Raises:
        ValueError: if there is none, or their splits are not known.
    """
    key, root = location(data, split)
    if root.is_file():
        return SplitFiles(root, [root], is_divided(data, split), False, [])
    if not root.is_dir():
        raise ValueError(f"{key}={root}: no such file or folder")
    files = find(root)
    groups: dict[str | None, list[Path]] = {}
    try:
        for file in files:
            groups.setdefault(path_split(PurePosixPath(file.relative_to(root).as_posix())), []).append(file)
    except ValueError as error:
        raise ValueError(f"{key}={root}: {error}") from error
    names = {group: [file.relative_to(root).as_posix() for file in files] for group, files in groups.items()}
    choice = choose(names, data, split)
    return SplitFiles(root, groups[choice.group], choice.automatic, choice.group is not None, choice.notes)


def files_below(root: Path, matches: Callable[[str], bool]) -> list[Path]:
    """Files of a folder and its subfolders by name, in order of their paths.

    As `datasets` does, those whose name, or a folder's, starts with a dot or two underscores are left out.

    Raises:
        ValueError: if a folder cannot be listed, or a link leads nowhere, unless its suffix is of another kind of file.
    """
    found, visited = list[Path](), set[str]()
    for folder, folders, files in os.walk(root, onerror=_refuse_unlisted, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in (name for name in files if not name.startswith((".", "__"))):
            path = Path(folder, name)
            if matches(name):
                found.append(path)
            elif not _FILE_SUFFIX.search(name) and path.is_symlink() and not path.exists():
                raise ValueError(f"{path}: a link to {os.readlink(path)}, which cannot be reached; {LEAVE_OUT}")
    return sorted(found)


def _refuse_unlisted(error: OSError) -> None:
    if Path(error.filename).name != LOST_AND_FOUND:
        raise ValueError(f"{error.filename}: a folder that cannot be listed ({error.strerror}); {LEAVE_OUT}") from error


def named_below(root: Path) -> str:
    """Names in a folder, for error messages."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"it holds {', '.join(names[:SHOWN])}{more}" if names else "it is empty"


def held_out(digests: Sequence[str | None]) -> set[str]:
    """Digests of the images that are validation: the first twentieth in order of digest, at least one."""
    distinct = sorted({digest for digest in digests if digest is not None})
    return set(distinct[: max(1, len(distinct) // HELD_OUT_EVERY)]) if len(distinct) > 1 else set()


def split_by_content(
    digests: Sequence[str | None], split: str, origin: str, read: Callable[[int], object] | None = None
) -> list[int]:
    """Indices of a split's samples, by digests of their images; None, an unreadable image, is training.

    It does not depend on the order of samples, and all samples with the same image are on one side.

    Args:
        digests: of each sample.
        split: `train`, or a validation split.
        origin: key and path, for error messages.
        read: reads a sample, to say why it cannot be used.

    Raises:
        ValueError: if there are fewer than two distinct images.
    """
    held = held_out(digests)
    if held:
        return [index for index, digest in enumerate(digests) if (digest in held) == (split != "train")]
    distinct = len({digest for digest in digests if digest is not None})
    found = f"{distinct} distinct readable image{'' if distinct == 1 else 's'} in {len(digests)} samples"
    if read is not None and None in digests:
        try:
            read(digests.index(None))
        except RejectedPairError as error:
            found += f" (first reject: {error})"
    raise ValueError(f"{origin}: {found}; two or more are required, since one is held out where data.val_path=null")


def in_split_of_stream(digest: str | None, split: str) -> bool:
    """Whether a sample of a stream without a validation split belongs to `split`: by its image's digest alone."""
    return (digest is not None and int(digest, 16) % HELD_OUT_EVERY == 0) == (split != "train")


def evenly_spaced_indices(size: int, count: int) -> list[int]:
    """At most `count` of the indices below `size`, evenly spaced."""
    count = min(size, count)
    return [number * size // count for number in range(count)]
