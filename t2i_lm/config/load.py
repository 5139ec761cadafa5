"""The merge of YAML files into an ExperimentConfig, the only user of OmegaConf beside the dry run.

Layers, later ones win: base.yaml, scale/SCALE.yaml, the experiment, `key=value`.
"""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i_lm.config.experiment import ExperimentConfig

# Former keys and prefixes of values, still read from files and overrides, with a note on stderr.
MOVED_KEYS = {"data.trim": "data.pad_to_multiple_of", "align.neighbours": "align.neighbors"}
MOVED_PREFIXES = {"hub:": "hf://"}


def load_experiment(path: str | Path, scale: str | None = None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Merges an experiment and checks every key and value.

    Args:
        path: experiment YAML; `base.yaml` and `scale/` are looked up beside it, or one folder up.
        scale: name of a file in `scale/`; None where the experiment stands alone (a run's config.yaml).
        overrides: `key=value` strings, dotted keys.

    Raises:
        ValueError: naming the file or key, and the nearest known key or the allowed values.
    """
    path = Path(path)
    layers = [_read(path)]
    if scale is not None:
        beside = _shared_folder(path)
        overlay = beside / "scale" / f"{scale}.yaml"
        if not overlay.is_file():
            known = sorted(file.stem for file in overlay.parent.glob("*.yaml"))
            raise ValueError(f"--scale {scale}: no {overlay}; known here: {', '.join(known) or 'none'}")
        layers = [_read(beside / "base.yaml"), _read(overlay), *layers]
    layers.append(_parse_overrides(overrides))
    if scale is not None:
        layers.append({"scale": scale})
    merged = OmegaConf.structured(ExperimentConfig)
    known_keys = {key for key, _ in _walk(OmegaConf.to_container(merged))}
    for layer in layers:
        merged = _merge(merged, layer, known_keys)
    return _build(merged)


def save_experiment(config: ExperimentConfig, path: Path) -> None:
    """Writes the resolved experiment as YAML, which `load_experiment(path)` reads back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every value of a config by its dotted key."""
    return flatten_mapping(asdict(config))


def flatten_mapping(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf of a nested mapping by its dotted key; an empty mapping has none."""
    return {key: value for key, value in _walk(tree) if not isinstance(value, Mapping)}


def migrate(tree: Mapping[str, Any], origin: str | Path) -> dict[str, Any]:
    """A nested config with today's keys and values; a note on stderr names each that was replaced.

    Args:
        tree: the config, such as a run's config.yaml as read.
        origin: where it is from, for notes and errors.

    Raises:
        ValueError: if both names of a key are present.
    """
    result = deepcopy(dict(tree))
    keys = dict(_walk(result))
    for old, new in MOVED_KEYS.items():
        if old not in keys:
            continue
        if new in keys:
            raise ValueError(f"{origin}: {old} is the former name of {new}; expected one of them")
        _set(result, new, _pop(result, old))
        _note(f"note: {origin}: {old} is now {new}")
    for key, value in flatten_mapping(result).items():
        for old, new in MOVED_PREFIXES.items():
            if isinstance(value, str) and value.startswith(old):
                renamed = f"{new}{value.removeprefix(old)}"
                _set(result, key, renamed)
                _note(f"note: {origin}: {key}={value} is now written {renamed}")
    return result


@cache
def _note(text: str) -> None:
    """Prints a line once, however often a file is read."""
    print(text, file=sys.stderr)


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of all nodes of a nested mapping."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")


def _pop(tree: dict[str, Any], key: str) -> Any:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    return tree.pop(name)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _shared_folder(path: Path) -> Path:
    """Where `base.yaml` and `scale/` of an experiment lie: beside it, or one folder up from a folder of variants."""
    above = path.resolve().parent.parent
    return above if not (path.parent / "base.yaml").is_file() and (above / "base.yaml").is_file() else path.parent


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no experiment file {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, found {type(content).__name__}")
    return migrate(content, path)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for item in overrides:
        if "=" not in item or item.startswith(("-", "=")):
            raise ValueError(f"{item!r} is not of the form key=value, for example optim.lr=1e-3")
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {' '.join(overrides)}: {error}") from error
    assert isinstance(content, dict)
    return migrate({str(key): value for key, value in content.items()}, "command line")


def _merge(merged: DictConfig, layer: dict[str, Any], known: set[str]) -> DictConfig:
    for key in flatten_mapping(layer):
        if key not in known:
            raise ValueError(f"unknown key {key!r}{_suggestion(key, known)}")
    try:
        result = OmegaConf.merge(merged, OmegaConf.create(layer))
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"{getattr(error, 'full_key', None) or 'config'}: {message}") from error
    assert isinstance(result, DictConfig)
    return result


def _suggestion(key: str, known: set[str]) -> str:
    """The known key whose last part is nearest, then as a whole, or the keys of its section."""
    values = [name for name in sorted(known) if not any(other.startswith(f"{name}.") for other in known)]

    def likeness(name: str) -> tuple[float, float]:
        pairs = (key.rpartition(".")[2], name.rpartition(".")[2]), (key, name)
        last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, whole

    best = max(values, key=likeness)
    if likeness(best)[0] > 0.6:
        return f"; did you mean {best!r}?"
    section = key.rpartition(".")[0]
    names = [name.removeprefix(f"{section}.") for name in values if section and name.startswith(f"{section}.")]
    return f"; {section} has {', '.join(names)}" if names else ""


def _build(merged: DictConfig) -> ExperimentConfig:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(config, ExperimentConfig)
    return config
