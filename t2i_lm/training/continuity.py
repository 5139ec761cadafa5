"""What a resumed run must find as it was: data, tokenizers, backbone and plug-ins by their hashes, and the code."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from callbacks.files.checkpoint_parts import SHAPE
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import is_plugin
from t2i_lm.data.identity import changed_data, data_contents
from t2i_lm.data.scenes.version import SCENES, SCENES_FORMAT
from t2i_lm.experiment.build import Experiment, ImageTokenizerExperiment, open_image, open_text
from t2i_lm.models.factory import architecture_hashes, weights_hashes
from t2i_lm.runtime.devices import precision
from t2i_lm.runtime.launch import local_rank
from t2i_lm.runtime.plugins import plugin_identities
from t2i_lm.storage.run_folder import CONTENTS, ENVIRONMENT, read_environment
from t2i_lm.training.resume import HASHES, NUMERICS
from t2i_lm.training.resumption import Change, Resumption


def started_from(experiment: Experiment) -> dict[str, Any]:
    """Hashes of everything that a run starts from, as env.json records them."""
    config, index = experiment.config, experiment.index
    tokenizers = index.get("tokenizers")
    if isinstance(experiment, ImageTokenizerExperiment) and experiment.text is not None:
        tokenizers = {"text": experiment.text.sha256}
    found = {
        "data_hash": index.get("data_hash"),
        "tokenizers": tokenizers,
        "backbone": weights_hashes(config),
        "numerics": NUMERICS,
        "precision": precision(config),
    }
    optional = {
        "replay_hash": experiment.replay_hash,
        "configs": architecture_hashes(config),
        "plugins": plugin_identities(config),
        # An index of older scenes has no version; an image tokenizer has no index.
        SCENES: index.get(SCENES) if index else SCENES_FORMAT if config.data.source == "scenes" else None,
        CONTENTS: data_contents(config),
    }
    return found | {name: value for name, value in optional.items() if value}


def require_same_files(config: ExperimentConfig, found_run: Resumption) -> None:
    """Checks tokenizers, backbone and plug-ins of a run to resume, before its data is prepared.

    Raises:
        ValueError: naming each that differs from the run's env.json or checkpoint, and was not allowed to.
    """
    found: dict[str, Any] = {"plugins": plugin_identities(config), "numerics": NUMERICS, "precision": precision(config)}
    found["configs"] = architecture_hashes(config)
    if not is_plugin(config.backbone.path):  # a plug-in's hash is known once it is built
        found["backbone"] = weights_hashes(config)
    if config.task in ("text_to_image", "unconditional", "align"):
        image, text = open_image(config, local_rank()), open_text(config)
        found["tokenizers"] = {"image": image.sha256, "text": text.sha256}
    _compare(found, found_run)


def require_same_start(experiment: Experiment, found: Mapping[str, Any], found_run: Resumption) -> None:
    """Checks all that a run to resume started from; says what its env.json, of an older version, does not record.

    Args:
        experiment: as it is now.
        found: `started_from` it.
        found_run: the run to resume.

    Raises:
        ValueError: naming each that differs from the run's env.json or checkpoint, and was not allowed to; or those
            that were, if the checkpoint's weights are not the model's.
    """
    run = found_run.folder
    found_run.changes += _compare(found, found_run)
    if found_run.changes and found_run.checkpoint is not None and found_run.checkpoint.is_file():
        _require_fitting(experiment.module, found_run, found_run.checkpoint)
    recorded = read_environment(run)
    for key in changed_data(recorded.get(CONTENTS) or {}, found.get(CONTENTS) or {}):
        print(f"note: {key}={experiment.config.value(key)} has changed since {run} was started", file=sys.stderr)
    if isinstance(experiment, ImageTokenizerExperiment):  # whose data has no hash
        experiment.data.setup("fit")
        then, now = recorded.get("train_samples"), len(experiment.data.train_set)
        if then not in (None, now):
            raise ValueError(
                f"{run} was started on {then:,} training images, now there are {now:,}: see data.train_size"
            )
    unknown = [name for name, value in found.items() if value and name not in recorded]
    if unknown:
        print(f"note: {run / ENVIRONMENT} does not record {', '.join(unknown)}: not compared", file=sys.stderr)


def _compare(found: Mapping[str, Any], resumed: Resumption) -> list[Change]:
    """The allowed differences from env.json and from the record in the checkpoint."""
    sources = {ENVIRONMENT: read_environment(resumed.folder)}
    if resumed.checkpoint is not None and resumed.record:
        sources[resumed.checkpoint.name] = resumed.record
    refused, allowed = dict[str, str](), dict[str, Change]()
    for file, recorded in sources.items():
        for name in HASHES:
            if name not in found or name not in recorded:
                continue
            then, now = _entries(name, recorded[name]), _entries(name, found[name])
            for key in sorted({*then, *now}):
                before, value = then.get(key), now.get(key)
                if before == value:
                    continue
                if key in resumed.allowed or f"trainer.{key}" in resumed.allowed:  # trainer.precision
                    allowed.setdefault(key, Change(key, before, value))
                else:
                    refused.setdefault(key, f"{key} is {_short(before)} in {file}, now {_short(value)}")
    if refused:
        raise ValueError(
            f"--resume {resumed.folder}: {'; '.join(refused.values())}. Restore what the run started from, or start a "
            "new one; or accept a difference by --allow-mismatch KEY"
        )
    return list(allowed.values())


def _require_fitting(module: torch.nn.Module, resumed: Resumption, checkpoint: Path) -> None:
    """Compares names and shapes of the weights in a checkpoint with the model's, before anything is written."""
    saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    then, now = _shapes(saved), _shapes(module.state_dict())
    # Names of adapters may be those of an earlier version, which loading completes.
    names = then.keys() & now.keys() if any(".lora_" in name for name in now) else then.keys() | now.keys()
    for name in sorted(names):
        if then.get(name) != now.get(name):
            keys = ", ".join(change.key for change in resumed.changes)
            raise ValueError(
                f"--resume {resumed.folder}: {keys} cannot change so within a run: {name} has the shape "
                f"{then.get(name)} in {checkpoint.name}, now {now.get(name)}. Restore what the run started from, or "
                "start a new one"
            )


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of weights by name; of sharded ones, those of the whole."""
    return {
        name: list(value.shape) if isinstance(value, torch.Tensor) else value[SHAPE]
        for name, value in state.items()
        if not name.endswith("_extra_state")
    }


def _entries(name: str, value: Any) -> dict[str, str]:
    """Hashes by dotted name."""
    if isinstance(value, dict):
        return {f"{name}.{key}": str(entry) for key, entry in value.items()}
    return {} if value is None else {name: str(value)}


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:16] if len(value) == 64 else value  # the identity of a plug-in is text
