"""Sources of captioned images by name: scenes, image folders, Parquet, tar files, Hugging Face datasets, plug-ins.

A source is a sized sequence of `Pair`s, or a stream of them. An unusable sample raises `RejectedPairError` with a
reason, which `prepare` counts; every other error stops it. A source may have `notes`, lines on what it leaves out.
"""

import sys
from collections.abc import Callable

from t2i_lm.config.sections import DataConfig, is_plugin
from t2i_lm.data.digests import digests_of_files, store_path
from t2i_lm.data.image_folder import image_folder
from t2i_lm.data.pairs import CaptionedSource, StreamedSource
from t2i_lm.data.parquet_files import parquet
from t2i_lm.data.scenes.source import SceneSource, paraphrases
from t2i_lm.data.splits import SPLITS, location, split_by_content, split_files
from t2i_lm.data.tables import hub, hub_stream
from t2i_lm.data.tars import TarFolder, find_tars, open_tars, require_pairs, tar_digests
from t2i_lm.runtime.launch import global_rank
from t2i_lm.runtime.plugins import SOURCE, find_plugin

__all__ = ["SOURCES", "SPLITS", "open_sized", "open_source", "print_notes"]


def webdataset(data: DataConfig, split: str, size: int) -> TarFolder:
    """Tar files (one, or those of a folder) in the format of img2dataset."""
    key, path = location(data, split)
    files = split_files(data, split, find_tars)
    tars = open_tars(files.files, files.notes)
    require_pairs(tars, f"{key}={path}")
    if not files.automatic:
        return tars
    digests: list[str | None] = []
    store = store_path(data.cache_dir, "webdataset", path)
    for entry in digests_of_files(files.files, store, tar_digests(tars.samples)):
        assert isinstance(entry, list)
        digests += entry
    chosen = split_by_content(digests, split, f"{key}={path}", tars.__getitem__)
    return TarFolder([tars.samples[index] for index in chosen], tars.notes)


# Split of the scene generator by `data.hold_out_pairs` and split of the shards.
SCENE_SPLITS = {
    (True, "train"): "train",
    (True, "val/iid"): "iid",
    (True, "val/compositional"): "compositional",
    (False, "train"): "every_pair",
    (False, "val"): "every_pair_val",
}


def scenes(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """Procedural scenes, as many as the config's `train_size`, or `val_size` for each validation split."""
    key = "train_size" if split == "train" else "val_size"
    count = data.train_size if split == "train" else data.val_size
    if count is None:
        raise ValueError(f"data.{key}=null: expected a number, since scenes are generated")
    captions = paraphrases(data.text_ratio) if split == "train" else 1
    return SceneSource(count, SCENE_SPLITS[data.hold_out_pairs, split], data.seed, size, captions)


def shards(data: DataConfig, split: str, size: int) -> CaptionedSource:
    """Token shards, which `data/shards/stored.py` opens: they have ids, not images."""
    raise ValueError("data.source=shards: images are required, of which token shards hold only the ids")


SOURCES: dict[str, Callable[[DataConfig, str, int], CaptionedSource | StreamedSource]] = {
    "scenes": scenes,
    "image_folder": image_folder,
    "parquet": parquet,
    "webdataset": webdataset,
    "hub": hub,
    "hub_stream": hub_stream,
    "shards": shards,
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


_printed: set[str] = set()


def print_notes(source: CaptionedSource | StreamedSource) -> None:
    """Prints a source's notes on stderr, if it has some: each once in a process, by the first rank."""
    for note in getattr(source, "notes", ()):
        if note not in _printed and global_rank() == 0:
            print(note, file=sys.stderr)
        _printed.add(note)
