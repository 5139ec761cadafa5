"""Files and folders that a run reads, and which of them are not on this machine; needs no torch."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from t2i_lm.assets import find, resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.presets import PRESETS
from t2i_lm.config.sections import ASSET, OPENED_BY_PATH, is_plugin
from t2i_lm.data.text import is_dataset_name
from t2i_lm.storage import hub

MODELS = ("backbone.path", "text_tokenizer.path", "image_tokenizer.path")


def absent_files(config: ExperimentConfig) -> dict[str, str]:
    """What a run reads and this machine lacks, by config key: the path, or `null` where one is required and not set.

    A file of the Hugging Face hub that is not in the cache is among them; the name of a dataset there is not, nor a
    plug-in, nor `aligned_rows: latest`.

    Raises:
        ValueError: on the name of something that is not shipped, with those that are.
    """
    texts = {"forgetting.text", "forgetting.second_text", "data.replay_path"}
    texts |= {"data.path", "data.val_path"} if config.data.source == "text" else set()

    def is_here(key: str, path: str) -> bool:
        if path.startswith(ASSET):
            return resolve(path, key).exists()
        elsewhere = is_plugin(path) or (key in texts and is_dataset_name(path))
        return elsewhere or find(path) is not None

    return {key: path or "null" for key, path in _read(config) if path is None or not is_here(key, path)}


def to_fetch(absent: dict[str, str]) -> dict[str, str]:
    """Those of `absent_files` that a run fetches by itself where there is a network, with the command that does so."""
    return {key: hub.parse(path).command for key, path in absent.items() if hub.is_hub(path)}


def missing_paths(configs: Iterable[ExperimentConfig], made: Collection[str] = ()) -> list[str]:
    """A line for each path that runs to train read and that is neither on this machine nor fetched by them.

    Args:
        configs: of the runs.
        made: keys of files that other runs make before.

    Raises:
        ValueError: as `absent_files`.
    """
    counts: Counter[str] = Counter()
    for config in configs:
        absent = absent_files(config)
        counts.update(f"{key}={path}" for key, path in absent.items() if key not in (*to_fetch(absent), *made))
    return [f"missing path: {word}, of {count} run{'s' * (count > 1)} to train" for word, count in counts.items()]


def _read(config: ExperimentConfig) -> Iterator[tuple[str, str | None]]:
    data, forgetting, fid = config.data, config.forgetting, config.fid
    images = config.task not in ("text", "image_tokenizer")
    models = MODELS[: 3 if images else 2 if config.reads_rows else 0]
    if images and config.init == "random" and config.backbone.path is None and config.backbone.config is not None:
        models = models[1:]
    yield from ((key, config.value(key)) for key in models)
    if config.task == "text" and config.text_tokenizer.path is not None:
        yield "text_tokenizer.path", config.text_tokenizer.path
    if config.backbone.config not in (None, *PRESETS):
        yield "backbone.config", config.backbone.config
    if images and config.image_rows == "aligned" and config.aligned_rows != "latest":
        yield "aligned_rows", config.aligned_rows
    if data.reads_path and data.path is None:
        yield "data.path", None
    if data.source in OPENED_BY_PATH:
        yield from data.paths.items()
    if data.replayed:
        yield "data.replay_path", data.replay_path
    if config.measures_forgetting:
        yield from ((f"forgetting.{key}", path) for key, path in forgetting.texts.items())
        if forgetting.tasks is not None:
            yield "forgetting.tasks", forgetting.tasks
    if fid.interval is not None:
        yield from ((key, path) for key in ("fid.coco", "fid.weights") if (path := config.value(key)) is not None)
