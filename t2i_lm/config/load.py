"""The only file that knows OmegaConf: base.yaml <- scale/S.yaml <- experiment <- key=value -> ExperimentConfig."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i_lm.config.experiment import ExperimentConfig


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
    merged = OmegaConf.structured(ExperimentConfig)
    for layer in layers:
        merged = _merge(merged, layer)
    if scale is not None:
        merged.scale = scale
    return _build(merged)


def save_experiment(config: ExperimentConfig, path: Path) -> None:
    """Writes the resolved experiment as YAML, which `load_experiment(path)` reads back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every leaf of a config by its dotted key."""
    leaves: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                leaves[f"{prefix}{key}"] = value

    walk(asdict(config), "")
    return leaves


def _shared_folder(path: Path) -> Path:
    """Where `base.yaml` and `scale/` of an experiment lie: beside it, or one folder up from a folder of variants."""
    above = path.resolve().parent.parent
    return above if not (path.parent / "base.yaml").is_file() and (above / "base.yaml").is_file() else path.parent


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ValueError(f"no experiment file {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, found {type(content).__name__}")
    return OmegaConf.create(content)


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item or item.startswith(("-", "=")):
            raise ValueError(f"{item!r} is not of the form key=value, for example optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {' '.join(overrides)}: {error}") from error


def _merge(merged: DictConfig, layer: DictConfig) -> DictConfig:
    known = set(_dotted(OmegaConf.to_container(merged)))
    for key in _dotted(OmegaConf.to_container(layer)):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown key {key!r}{hint}")
    try:
        result = OmegaConf.merge(merged, layer)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"{getattr(error, 'full_key', None) or 'config'}: {message}") from error
    assert isinstance(result, DictConfig)
    return result


def _dotted(tree: Any, prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _build(merged: DictConfig) -> ExperimentConfig:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(config, ExperimentConfig)
    return config
