"""The merge of YAML files and `key=value` strings into an ExperimentConfig.

Layers, later ones win: base.yaml, scale/SCALE.yaml, the experiment, `key=value`. `values.py` says what a value means.
"""

import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.file_kinds import EXPERIMENT, require_kind
from t2i_lm.config.key_groups import PATH_KEYS
from t2i_lm.config.presets import PRESETS
from t2i_lm.config.sections import ASSET, is_plugin
from t2i_lm.config.values import Plain, as_path, as_text, key_types, read_value, section_problem
from t2i_lm.storage.hub import is_hub
from t2i_lm.storage.run_folder import CONFIG, read_config, read_environment
from t2i_lm.storage.writing import write_atomic
from t2i_lm.storage.yaml_text import loader_of, problem_of, read_yaml, root_node

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
    layers = [_file_layer(path)]
    given = _override_layer(overrides)
    if scale is not None:
        beside = _shared_folder(path)
        overlay = beside / "scale" / f"{scale}.yaml"
        if not overlay.is_file():
            known = sorted(file.stem for file in overlay.parent.glob("*.yaml"))
            raise ValueError(f"--scale {scale}: no {overlay}; known here: {', '.join(known) or 'none'}")
        layers = [_file_layer(beside / "base.yaml"), _file_layer(overlay), *layers]
        if given.setdefault("scale", scale) != scale:
            raise ValueError(f"scale={given['scale']}: the scale is chosen by --scale, here {scale}")
    merged = OmegaConf.merge(_schema(), *map(_node, (*layers, given)))
    try:
        config = OmegaConf.to_object(merged)
    except ValueError as error:
        alone = scale is None and not overrides  # else a value may be from another layer
        raise ValueError(f"{path}: {error}") if alone else error from error
    assert isinstance(config, ExperimentConfig)
    return config


@cache
def _schema() -> Any:
    """Keys, types and defaults; OmegaConf takes a while for it, and merges into a copy."""
    return OmegaConf.structured(ExperimentConfig)


def experiment_names(folder: Path) -> list[str]:
    """Names of the experiments in a folder: its YAML files without the shared base and the study, a plan."""
    return sorted(file.stem for file in folder.glob("*.yaml") if file.stem not in ("base", "study"))


def load_run(folder: Path) -> ExperimentConfig:
    """The experiment of a run folder, its relative paths `located`.

    Raises:
        ValueError: if its files are damaged.
    """
    config = load_experiment(folder / CONFIG)
    read_config(folder, read_environment(folder))
    return located(config, folder)


def located(config: ExperimentConfig, folder: Path) -> ExperimentConfig:
    """A run's config whose relative paths are those of the directory in which the run was started, where they exist."""
    start = read_environment(folder).get("directory")
    changes: dict[str, Any] = {}
    for key in PATH_KEYS:
        path = config.value(key)
        here = key == "run.dir" or (key == "backbone.config" and path in PRESETS)
        if start is not None and not here and is_relative(path) and Path(start, path).exists():
            _set(changes, key, str(Path(start, path)))
    for section, value in changes.items():
        new = replace(getattr(config, section), **value) if isinstance(value, dict) else value
        config = replace(config, **{section: new})
    return config


def require_located(config: ExperimentConfig, folder: Path, keys: Sequence[str]) -> None:
    """Checks that relative paths of a run exist.

    Raises:
        ValueError: naming the first that does not, and where it was looked for.
    """
    start = read_environment(folder).get("directory")
    for key in keys:
        path = config.value(key)
        if is_relative(path) and not Path(path).exists():
            first = f"in {start}, where this run was started, nor " if start else ""
            last = "" if start else "; call this command where the run was started"
            raise ValueError(f"{key}={path} of {folder}: not found {first}in {Path.cwd()}{last}")


def is_relative(path: str | None) -> bool:
    """Whether a path of a config depends on the working directory: assets, hub references and plug-ins do not."""
    named = path is None or is_plugin(path) or is_hub(path) or path.startswith(ASSET) or "://" in path
    return path is not None and not named and not Path(path).is_absolute()


def save_experiment(config: ExperimentConfig, path: Path) -> None:
    """Writes the resolved experiment as YAML, which `load_experiment(path)` reads back."""
    write_atomic(path, to_yaml(config))


def to_yaml(config: ExperimentConfig) -> str:
    """Every key of an experiment as YAML."""
    return _dump(asdict(config))


def nested_yaml(values: Mapping[str, Any]) -> str:
    """Values by dotted key as nested YAML."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        _set(tree, key, value)
    return _dump(tree)


def changed_yaml(path: Path, values: Mapping[str, Any]) -> str:
    """The content of a YAML file with other values of some dotted keys, under today's names."""
    tree = migrate(read_yaml(path.read_text(encoding="utf-8")), path)
    for key, value in values.items():
        _set(tree, key, value)
    return _dump(tree)


def _dump(tree: Mapping[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class _Dumper(yaml.SafeDumper):
    """Texts with line breaks or control characters in double quotes: PyYAML's other styles change some of them."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


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
        if not isinstance(tree, dict):
            raise ValueError(f"{key}={value}: {section}={tree} is given too, which is either a value or a section")
    tree[name] = value


def _shared_folder(path: Path) -> Path:
    """Where `base.yaml` and `scale/` of an experiment lie: beside it, or one folder up from a folder of variants."""
    above = path.resolve().parent.parent
    return above if not (path.parent / "base.yaml").is_file() and (above / "base.yaml").is_file() else path.parent


def _file_layer(path: Path) -> dict[str, Any]:
    """Values of a file by dotted key."""
    try:
        values = _typed(migrate(_read(path), path))
        for key, value in values.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and "${" in text:
                    _note(f"note: {path}: {key}={text} is used as written: references and resolvers, ${{...}}, are off")
        return values
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def _override_layer(overrides: Sequence[str]) -> dict[str, Any]:
    """Values of `key=value` strings by dotted key; of a key that is given twice, the last."""
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ValueError(f"{item!r} is not of the form key=value, for example optim.lr=1e-3")
        if is_dataclass(key_types().get(key)):
            raise ValueError(f"{key}={text}: {section_problem(key)}")
        text = text if key in PATH_KEYS else as_text(text)
        _set(tree, key, given_value(key, text))
    return _typed(migrate(tree, "command line"))


def given_value(key: str, text: str) -> Any:
    """What `key=text` gives: a list of texts in brackets where the key takes a list, else a text.

    Raises:
        ValueError: naming a list that cannot be read.
    """
    if not text.startswith("[") or getattr(key_types().get(MOVED_KEYS.get(key, key)), "__origin__", None) is not list:
        return Plain(text)
    try:
        values = _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{key}={text}: expected a list, such as [a, 'b, with a comma']: {problem_of(error)}"
        ) from error
    assert isinstance(values, list)
    return values


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no experiment file {path}")
    try:
        content = _yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {problem_of(error)}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, found {'no key' if not content else repr(content)}")
    require_kind(path, content, EXPERIMENT)
    return content


def _yaml(text: str) -> Any:
    """YAML with every scalar as text, `Plain` where it is unquoted: a key's type says what it means."""
    loader = loader_of(text)
    try:
        return _content(loader, root_node(loader))
    finally:
        loader.dispose()


def _content(loader: yaml.SafeLoader, node: Any) -> Any:
    if node is None:
        return None
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.endswith(":binary"):
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} has no meaning here", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_content(loader, item) for item in node.value]
    written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or (written.count(key.value) > 1 and key.value != "<<"):
            problem = f"the key {key.value!r} occurs twice" if isinstance(key, yaml.ScalarNode) else "a key is no text"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
    loader.flatten_mapping(node)  # `<<: *anchor`
    return {str(key.value): _content(loader, value) for key, value in node.value}


def _typed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested mapping by dotted key, each as a value of its type.

    Raises:
        ValueError: on an unknown key, a value of another type, or a section in place of a value.
    """
    types = key_types()
    values: dict[str, Any] = {}
    for key, value in _walk(tree):
        if key not in types:
            # of an unknown section, its first key is named
            if not isinstance(value, Mapping) or not value:
                raise ValueError(f"unknown key {key!r}{_suggestion(key, set(types))}")
        elif key in values:
            raise ValueError(f"{key} is given twice")
        elif not is_dataclass(types[key]):
            value = read_value(key, value)
            values[key] = as_path(key, value) if key in PATH_KEYS and value is not None else value
        elif not isinstance(value, Mapping) and value not in (None, ""):  # `optim:` with all keys commented out
            raise ValueError(f"{key}={value}: {section_problem(key)}")
    return values


def _suggestion(key: str, known: set[str]) -> str:
    """The nearest known key: of an equal last part, else of the same section, else of all; or the section's keys."""
    values = [name for name in sorted(known) if not any(other.startswith(f"{name}.") for other in known)]
    section, _, last = key.rpartition(".")
    own = [name for name in values if section and name.startswith(f"{section}.")]

    def likeness(name: str) -> tuple[float, float]:
        pairs = (last, name.rpartition(".")[2]), (key, name)
        of_last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return of_last, whole

    best = max([name for name in values if name.rpartition(".")[2] == last] or own or values, key=likeness)
    if likeness(best)[0] > 0.6:
        return f"; did you mean {best!r}?"
    names = ", ".join(name.removeprefix(f"{section}.") for name in own)
    return f"; {section} has {names}" if own else "; all keys: docs/configuration.md"


def _node(values: Mapping[str, Any]) -> DictConfig:
    """The values of a layer as OmegaConf holds them."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        _set(tree, key, literal(value))
    return OmegaConf.create(tree)


def literal(value: Any) -> Any:
    """A value, list or mapping as OmegaConf holds it, in which `${` is text: no resolver reads the environment."""
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
