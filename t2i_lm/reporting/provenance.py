"""What identifies a run of the page: its hashes, and the command that makes it again."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from t2i_lm.comparison.comparability import HASHED, config_values
from t2i_lm.comparison.plan import setting_words
from t2i_lm.config.key_groups import is_compared, is_neutral
from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.storage.run_folder import Run

DIGITS = 16  # of a hash on the page
RUN_KEYS = ("name", "scale", "run.dir")  # keys that the command says by other words


@dataclass(frozen=True)
class RunFacts:
    """A run of the page.

    Attributes:
        label: its arms.
        folder: its path.
        command: what trains it again.
        hashes: names and values.
    """

    label: str
    folder: str
    command: str
    hashes: Mapping[str, str]


def run_facts(labels: Sequence[str], run: Run, experiments: Path) -> RunFacts:
    """The facts of a run.

    Args:
        labels: names of its arms.
        run: the run.
        experiments: folder of experiments, to which the command is relative.
    """
    environment = run.environment
    tokenizers, weights = _mapping(environment.get("tokenizers")), _mapping(environment.get("backbone"))
    revision = str(environment.get("git") or "unknown")[:DIGITS]
    hashes = {
        "data": str(environment.get("data_hash") or "unknown"),
        "config": config_hash(run),
        "code": revision + (" with local changes" if environment.get("git_dirty") else ""),
        "text tokenizer": str(tokenizers.get("text") or "unknown")[:DIGITS],
        "image tokenizer": str(tokenizers.get("image") or "unknown")[:DIGITS],
        "backbone weights": ", ".join(str(value)[:DIGITS] for value in weights.values()) or "none",
        "order of the data": str(environment.get("stream_hash") or "unknown")[:DIGITS],
    }
    return RunFacts(", ".join(labels), str(run.folder), train_command(run, experiments), hashes)


def config_hash(run: Run) -> str:
    """SHA-256 of a run's config in its first digits, without keys that change nothing computed and without paths.

    What lies at the paths is hashed on its own; a run keeps its hash where it is copied or collected.
    """
    apart = (*HASHED, "backbone.path")
    values = {key: value for key, value in config_values(run).items() if not is_neutral(key) and key not in apart}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def train_command(run: Run, experiments: Path) -> str:
    """What trains a run again: its experiment and the values that differ from it, or its config where there is none."""
    file = experiment_file(run, experiments)
    if file is None:
        return shlex.join(["python", "-m", "t2i_lm.train", str(run.folder / "config.yaml")])
    scale = ["--scale", str(config_values(run)["scale"])]
    return shlex.join(
        ["python", "-m", "t2i_lm.train", str(file), *scale, *setting_words(changed_values(run, experiments))]
    )


def changed_values(run: Run, experiments: Path) -> dict[str, Any]:
    """The values of a run that differ from its experiment's, by key; empty where there is no experiment."""
    base = experiment_values(run, experiments)
    return {
        key: value
        for key, value in config_values(run).items()
        if base and value != base.get(key) and _is_given(key) and key not in RUN_KEYS
    }


def _is_given(key: str) -> bool:
    """Whether a run's command gives a key: not where it works, but that its plug-ins may run."""
    return key == "allow_code" or is_compared(key)


def experiment_values(run: Run, experiments: Path) -> Mapping[str, Any]:
    """The values of a run's experiment at its scale, by key; empty where there is no experiment."""
    file = experiment_file(run, experiments)
    return {} if file is None else _base(file, str(config_values(run)["scale"]))


def experiment_file(run: Run, experiments: Path) -> Path | None:
    """The file of a run's experiment; None where it cannot be read."""
    file = experiments / f"{run.name}.yaml"
    file = file if file.is_file() else experiments / "remedies" / f"{run.name.removeprefix('remedy_')}.yaml"
    try:
        _base(file, str(config_values(run)["scale"]))
    except ValueError:
        return None
    return file


@cache
def _base(file: Path, scale: str) -> dict[str, Any]:
    return flatten(load_experiment(file, scale))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
