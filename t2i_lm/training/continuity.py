"""What a resumed run must find as it was at its start: data, tokenizers, backbone and plug-ins, by their hashes."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import is_plugin
from t2i_lm.data.scenes.version import SCENES, SCENES_FORMAT
from t2i_lm.data.shards.cache import shards_of
from t2i_lm.experiment.build import Experiment, open_image, open_text
from t2i_lm.models.factory import weights_hashes
from t2i_lm.runtime.devices import local_rank
from t2i_lm.runtime.plugins import plugin_identities
from t2i_lm.storage.run_folder import ENVIRONMENT, read_run

# Entries of env.json that identify what a run starts from.
CONTENT = "data_content"
STARTED_FROM = ("data_hash", "replay_hash", "tokenizers", "backbone", "plugins")


def started_from(experiment: Experiment) -> dict[str, Any]:
    """Hashes of everything that a run starts from, as env.json records them."""
    config, index = experiment.config, experiment.index
    found = {
        "data_hash": index.get("data_hash"),
        "tokenizers": index.get("tokenizers"),
        "backbone": weights_hashes(config),
    }
    optional = {
        "replay_hash": experiment.replay_hash,
        "plugins": plugin_identities(config),
        # An index of older scenes has no version; an image tokenizer has no index.
        SCENES: index.get(SCENES) if index else SCENES_FORMAT if config.data.source == "scenes" else None,
        CONTENT: shards_of(config, {}).contents if config.task == "image_tokenizer" else None,
    }
    return found | {name: value for name, value in optional.items() if value}


def require_same_files(config: ExperimentConfig, run: Path) -> None:
    """Checks tokenizers, backbone and plug-ins of a run to resume, before its data is prepared.

    Raises:
        ValueError: naming each that differs from the run's env.json.
    """
    found: dict[str, Any] = {"plugins": plugin_identities(config)}
    if not is_plugin(config.backbone.path):  # a plug-in's hash is known once it is built
        found["backbone"] = weights_hashes(config)
    if config.task in ("text_to_image", "unconditional", "align"):
        image, text = open_image(config, local_rank()), open_text(config)
        found["tokenizers"] = {"image": image.sha256, "text": text.sha256}
    _compare(found, run)


def require_same_start(experiment: Experiment, run: Path) -> None:
    """Checks all that a run to resume started from; says what its env.json, of an older version, does not record.

    Raises:
        ValueError: naming each that differs from the run's env.json.
    """
    found = started_from(experiment)
    _compare(found, run)
    recorded = read_run(run).environment
    if recorded.get(CONTENT, found.get(CONTENT)) != found.get(CONTENT):  # no hash: a copy has other modification times
        print(f"note: data.path={experiment.config.data.path} has changed since {run} was started", file=sys.stderr)
    unknown = [name for name, value in found.items() if value and name not in recorded]
    if unknown:
        print(f"note: {run / ENVIRONMENT} does not record {', '.join(unknown)}: not compared", file=sys.stderr)


def _compare(found: Mapping[str, Any], run: Path) -> None:
    recorded = read_run(run).environment
    differences = []
    for name in STARTED_FROM:
        if name in found and name in recorded:
            then, now = _entries(name, recorded[name]), _entries(name, found[name])
            for key in sorted({*then, *now}):
                if then.get(key) != now.get(key):
                    differences.append(f"{key} is {_short(then.get(key))} in {ENVIRONMENT}, now {_short(now.get(key))}")
    if differences:
        raise ValueError(
            f"--resume {run}: {'; '.join(differences)}. Restore what the run started from, or start a new one"
        )


def _entries(name: str, value: Any) -> dict[str, str]:
    """Hashes by dotted name."""
    if isinstance(value, dict):
        return {f"{name}.{key}": str(entry) for key, entry in value.items()}
    return {} if value is None else {name: str(value)}


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:16] if len(value) == 64 else value  # the identity of a plug-in is text
