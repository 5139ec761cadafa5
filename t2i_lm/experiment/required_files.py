"""Files and folders that a run reads, and which of them are not on this machine; needs no torch."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from t2i_lm.assets import find, resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.presets import PRESETS
from t2i_lm.config.sections import ASSET, OPENED_BY_PATH, is_plugin
from t2i_lm.data.text import is_dataset_name
from t2i_lm.storage import hub

MODELS = ("backbone.path", "text_tokenizer.path", "image_tokenizer.path")
# Files that may be shipped or on the Hugging Face hub, from which a run fetches them.
FETCHED = (*MODELS, "backbone.config", "fid.weights")
# Text: a file, a folder, shipped, or the name of a Hugging Face dataset.
TEXTS = ("forgetting.text", "forgetting.second_text", "data.replay_path")


def absent_files(config: ExperimentConfig) -> dict[str, str]:
    """What a run reads and this machine lacks, by config key: the path, or `null` where one is required and not set.

    A file of the Hugging Face hub that is not in the cache is among them; the name of a dataset there is not, nor a
    plug-in, a URL, or `aligned_rows: latest`.

    Raises:
        ValueError: on the name of something that is not shipped, with those that are, or no name of the hub's.
    """
    texts = (*TEXTS, *(("data.path", "data.val_path") if config.data.source == "text" else ()))

    def is_here(key: str, path: str) -> bool:
        if path.startswith(ASSET) and key in (*FETCHED, *texts):
            return resolve(path, key).exists()
        if key in FETCHED:
            try:
                return is_plugin(path) or find(path) is not None
            except ValueError as error:
                raise ValueError(f"{key}={error}") from error
        return Path(path).exists() or (key in texts and is_dataset_name(path))

    return {key: path or "null" for key, path in _read(config) if path is None or not is_here(key, path)}


def to_fetch(absent: dict[str, str]) -> dict[str, str]:
    """Those of `absent_files` that a run fetches by itself where there is a network, with the command that does so."""
    return {key: hub.parse(path).command for key, path in absent.items() if key in FETCHED and hub.is_hub(path)}


def missing_paths(configs: Iterable[ExperimentConfig]) -> list[str]:
    """A line for each path that runs to train read and that is neither on this machine nor fetched by them.

    Raises:
        ValueError: as `absent_files`.
    """
    counts: Counter[str] = Counter()
    for config in configs:
        absent = absent_files(config)
        fetched = to_fetch(absent)
        counts.update(f"{key}={path}" for key, path in absent.items() if key not in fetched)
    return [f"missing path: {word} ({count} run{'s' * (count > 1)} to train)" for word, count in counts.items()]


def print_missing(configs: Iterable[ExperimentConfig]) -> int:
    """Prints `missing_paths` on stderr; 2 if there are any, else 0."""
    lines = missing_paths(configs)
    print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr, flush=True)
    return 2 if lines else 0


def _read(config: ExperimentConfig) -> Iterator[tuple[str, str | None]]:
    """Keys and values of paths; None where one is required."""
    data, forgetting, fid, backbone = config.data, config.forgetting, config.fid, config.backbone
    images = config.task not in ("text", "image_tokenizer")
    required = MODELS[: 3 if images else 2 if config.reads_rows else 0]
    if images and config.init == "random" and backbone.config is not None:
        required = required[1:]
    yield from ((key, config.value(key)) for key in required)
    optional = []
    if config.task != "image_tokenizer" or config.reads_rows:
        optional += ["backbone.config"] if backbone.config not in PRESETS else []
    if config.task == "text":
        optional += ["text_tokenizer.path", *(["backbone.path"] if backbone.config is None else [])]
    if config.measures_forgetting:
        optional += [*(f"forgetting.{key}" for key in forgetting.texts), "forgetting.tasks"]
    if fid.interval is not None:
        optional += ["fid.coco", "fid.weights"]
    yield from ((key, config.value(key)) for key in optional if config.value(key) is not None)
    if images and config.image_rows == "aligned" and config.aligned_rows != "latest":
        yield "aligned_rows", config.aligned_rows
    if data.reads_path and data.path is None:
        yield "data.path", None
    if data.source in OPENED_BY_PATH or (data.source == "shards" and "://" not in str(data.path)):
        yield from data.paths.items()
    if data.replayed:
        yield "data.replay_path", data.replay_path
