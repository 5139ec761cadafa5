"""Runs that stand for a job: finished or interrupted ones of an equal config, of the files and the code of today."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from t2i_lm.assets import find
from t2i_lm.comparison.comparability import changes_of
from t2i_lm.comparison.portable import portable_config
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import is_compared
from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.config.sections import is_plugin
from t2i_lm.data.identity import changed_data, data_contents, local_content
from t2i_lm.data.scenes.version import IMAGES_FORMAT, SCENES_FORMAT, scenes_version
from t2i_lm.storage.run_folder import (
    CHECKPOINTS,
    CONFIG,
    CONTENTS,
    REPORT,
    THINNED,
    folders_below,
    is_collected,
    read_environment,
    run_folders,
)
from t2i_lm.training.resume import NUMERICS


def find_equal_run(
    config: ExperimentConfig, folders: Sequence[Path] | None = None, apart: tuple[str, ...] = ()
) -> tuple[Path | None, bool]:
    """The newest run folder of an equal config to resume, and whether it is finished; finished ones first.

    Collected results of a finished run count as it. Not equal are runs of an older version of generated scenes, of code
    that computes other numbers, and of data, a backbone or a tokenizer with other content at the same path.

    Args:
        config: with today's default of every key.
        folders: run folders to look among, oldest first; None for those of the experiment in `run.dir`.
        apart: beginnings of keys that may differ.
    """
    if folders is None:
        folders = run_folders(Path(config.run.dir), config.name)
    results = [folder for folder in folders if is_collected(folder) and _equal_results(config, folder, apart)]
    if results:
        return results[-1], True
    if config.aligned_rows is not None:  # the others need no torch
        from t2i_lm.models.aligned_rows import resolve_aligned_rows

        config = resolve_aligned_rows(config)  # as in a run's config.yaml
    computed = _without(compared_values(config), apart)
    equal = []
    for folder in folders:
        found = _computed_in(folder / CONFIG)
        same = found is not None and _without(found, apart) == computed
        if same and not _lacks_steps(config, folder) and _same_start(config, folder):
            equal.append(folder)
    finished = [folder for folder in equal if (folder / REPORT).is_file()]
    if finished:
        return finished[-1], True
    return next(filter(_can_resume, reversed(equal)), None), False


def _can_resume(folder: Path) -> bool:
    """Whether a run has something to resume from; one that was killed before its first checkpoint has nothing."""
    if not any((folder / CHECKPOINTS).glob("*")):
        return False
    from t2i_lm.training.resumption import can_resume  # imports torch

    try:
        return can_resume(folder)
    except ValueError as error:
        print(f"note: not resumed: {error}", file=sys.stderr)
        return False


def require_no_results(folders: Iterable[Path]) -> None:
    """Checks that no folder in which runs are to be trained holds collected results.

    Raises:
        ValueError: naming the first that does.
    """
    for folder in folders:
        if folders_below(folder, file=THINNED):
            raise ValueError(
                f"{folder} holds collected results, and runs that it lacks are not trained there: set another run.dir"
            )


def _lacks_steps(config: ExperimentConfig, folder: Path) -> bool:
    """Whether a run has passed a step of `trainer.keep_steps` and has no checkpoint of it."""
    if not config.trainer.keep_steps:
        return False
    from callbacks.checkpoints import checkpoints, step_of

    steps = {step_of(path) for path in checkpoints(folder / CHECKPOINTS)}
    reached = config.trainer.max_steps if (folder / REPORT).is_file() else max(steps, default=0)
    return any(step <= reached and step not in steps for step in config.trainer.keep_steps)


def _equal_results(config: ExperimentConfig, folder: Path, apart: tuple[str, ...]) -> bool:
    """Whether collected results are of a run of an equal config; their paths are shorter, and `latest` is resolved."""
    own, theirs = portable_config(compared_values(config), [Path.cwd()]), _computed_in(folder / CONFIG)
    if theirs is None or not (folder / REPORT).is_file():
        return False
    if config.aligned_rows == "latest":
        own["aligned_rows"] = theirs["aligned_rows"]
    return _without(own, apart) == _without(theirs, apart) and _same_start(config, folder)


def _same_start(config: ExperimentConfig, folder: Path) -> bool:
    """Whether a run has one config from its start, scenes and numerics of this code, and today's data and models."""
    try:
        recorded = read_environment(folder)  # empty in a run that ended before it wrote one
    except ValueError as error:
        print(f"note: not taken for an equal run: {error}", file=sys.stderr)
        return False
    if changes_of(recorded):
        return False
    oldest = IMAGES_FORMAT if config.task == "image_tokenizer" else SCENES_FORMAT
    scenes = config.data.source != "scenes" or not recorded or scenes_version(recorded) >= oldest
    numerics = recorded.get("numerics", NUMERICS) == NUMERICS
    return scenes and numerics and _same_data(config, recorded) and _same_files(config, recorded)


def _same_data(config: ExperimentConfig, recorded: Mapping[str, Any]) -> bool:
    """Whether data is what env.json records; what is not recorded or not at hand is."""
    then = recorded.get(CONTENTS) or {}
    return not (then and changed_data(then, data_contents(config, _content)))


def _same_files(config: ExperimentConfig, recorded: Mapping[str, Any]) -> bool:
    """Whether backbone and tokenizers are those that env.json records; one that is not recorded or not at hand is."""
    tokenizers, shape = recorded.get("tokenizers") or {}, (recorded.get("configs") or {}).get("backbone")
    backbone = config.backbone
    text, image = config.text_tokenizer, config.image_tokenizer
    pixels = None if image.pixel_range is None else tuple(image.pixel_range)
    parts: list[tuple[Any, str | None, Callable[[str], Any]]] = [
        (recorded.get("backbone"), backbone.path, lambda _: _weights(config)),
        (shape, backbone.config or backbone.path, lambda _: _architecture(config).get("backbone")),
        (tokenizers.get("text"), text.path, lambda path: _text_sha256(path, text.document_start, text.document_end)),
        (tokenizers.get("image"), image.path, lambda path: _image_sha256(path, image.size, image.expect, pixels)),
    ]
    return all(then is None or not _at_hand(path) or then == now(str(path)) for then, path, now in parts)


_content = cache(local_content)


def _at_hand(path: str | None) -> bool:
    """Whether a file can be read without the network; a plug-in is code, of which env.json records the revision."""
    return path is not None and not is_plugin(path) and find(path) is not None


def _weights(config: ExperimentConfig) -> dict[str, str] | None:
    from t2i_lm.models.factory import weights_hashes  # imports torch

    return weights_hashes(config)


def _architecture(config: ExperimentConfig) -> dict[str, str]:
    from t2i_lm.models.factory import architecture_hashes  # imports torch

    # The image tokenizer is compared as a whole.
    return architecture_hashes(replace(config, image_tokenizer=replace(config.image_tokenizer, path=None)))


@cache
def _text_sha256(path: str, start: str | None, end: str | None) -> str:
    from t2i_lm.tokenizers.text import open_text_tokenizer

    return open_text_tokenizer(path, start, end).sha256


@cache
def _image_sha256(path: str, size: int, expect: str | None, pixel_range: tuple[float, ...] | None) -> str:
    from t2i_lm.tokenizers.image import open_image_tokenizer

    return open_image_tokenizer(path, size, expect, pixel_range).sha256


def _without(values: dict[str, object], apart: tuple[str, ...]) -> dict[str, object]:
    return {key: value for key, value in values.items() if not key.startswith(apart)} if apart else values


@cache
def _computed_in(file: Path) -> dict[str, object] | None:
    """Those of a run's config.yaml, cached since the file never changes; None, with a line, if it cannot be read."""
    try:
        return compared_values(load_experiment(file))
    except ValueError as error:
        print(f"note: not taken for an equal run: {error}", file=sys.stderr)
        return None


def compared_values(config: ExperimentConfig) -> dict[str, object]:
    """The values by which runs are told apart, by dotted key."""
    return {key: value for key, value in flatten(config).items() if is_compared(key)}
