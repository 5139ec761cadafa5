"""Plan of a comparison: arms, primary endpoint and margin, written down before the runs are made."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.config.experiment import is_file_name
from t2i_lm.config.load import literal
from t2i_lm.config.sections import require
from t2i_lm.storage.run_folder import PRIMARY, VAL
from t2i_lm.storage.yaml_text import read_yaml

# Default secondary endpoints.
SECONDARY = ("val/compositional.image.nll", "val/iid.text.nll", "val/iid.all.nll", "tokens_saved.image")


@dataclass(frozen=True)
class Margin:
    """The largest difference that counts as none: a number in the endpoint's unit, or a share of the second arm."""

    size: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> "Margin":
        """From a number (`0.02`) or a percentage (`1 %`).

        Raises:
            ValueError: if it is neither, or not positive.
        """
        text = text.strip()
        try:
            size = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            size = 0.0
        require(0 < size < float("inf"), "margin", text, "a positive number, or a percentage such as 1%")
        return cls(size, text.endswith("%"))

    def absolute(self, second_mean: float) -> float:
        """The margin in the endpoint's unit."""
        return self.size * abs(second_mean) if self.relative else self.size

    def __str__(self) -> str:
        return f"{100 * self.size:g} %" if self.relative else f"{self.size:g}"


@dataclass(frozen=True)
class Plan:
    """What a comparison tests.

    Attributes:
        arms: names of two experiments; a difference is the first minus the second.
        scale: overlay of the runs.
        primary: the endpoint (`endpoints.py`) whose verdict counts, at level `alpha` without correction.
        margin: largest difference of the primary endpoint that counts as none: in its unit, or `1%` of the second arm.
        secondary: further endpoints, corrected for their number (Holm).
        seeds: seeds that both arms should have; missing ones are named. Empty: those that are there.
        where: values of config keys that runs must have, by dotted key.
        varied: keys, or their beginnings, in which the arms differ by design, beside `name` and `init`.
        alpha: level of the tests.
    """

    arms: list[str] = field(default_factory=lambda: ["t2i_pretrained", "t2i_scratch"])
    scale: str = "demo"
    primary: str = "val/iid.image.nll"
    margin: str = "1%"
    secondary: list[str] = field(default_factory=lambda: [*SECONDARY])
    seeds: list[int] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    varied: list[str] = field(default_factory=list)
    alpha: float = 0.05

    def on_one_set(self) -> "Plan":
        """The plan for runs with one validation set: endpoints of the primary split are of it, those of others go."""
        secondary = [_on_one_set(name) for name in self.secondary]
        kept = [name for name in secondary if not name.startswith(f"{VAL}/")]
        return replace(self, primary=_on_one_set(self.primary), secondary=kept)

    def __post_init__(self) -> None:
        pair = len(self.arms) == 2 and self.arms[0] != self.arms[1]
        require(pair, "arms", self.arms, "the names of two experiments")
        require(0 < self.alpha < 0.5, "alpha", self.alpha, "a value in (0, 0.5)")
        Margin.parse(self.margin)
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")
        names = [Endpoint(name).name for name in (self.primary, *self.secondary)]
        require(len(set(names)) == len(names), "secondary", self.secondary, "each endpoint once, and not the primary")


def _on_one_set(endpoint: str) -> str:
    return endpoint.replace(f"{VAL}/{PRIMARY}.", f"{VAL}.")


@dataclass(frozen=True)
class Study:
    """Comparisons and further runs, trained and evaluated by one command.

    Attributes:
        scale, seeds, primary, margin, secondary, alpha: of every comparison that does not set its own (see `Plan`).
        comparisons: keys of a `Plan` by name; its runs are trained with the values of `where`.
        runs: further experiments by name of the group, for figures: `arms`, `seeds` and `where`.
    """

    scale: str = "demo"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    primary: str = "val/iid.image.nll"
    margin: str = "1%"
    secondary: list[str] = field(default_factory=lambda: list(SECONDARY))
    alpha: float = 0.05
    comparisons: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)

    def plans(self) -> dict[str, Plan]:
        """The plan of every comparison."""
        shared = {name: getattr(self, name) for name in ("scale", "seeds", "primary", "margin", "secondary", "alpha")}
        return {name: _typed(Plan, shared | own, f"comparisons.{name}.") for name, own in self.comparisons.items()}

    def groups(self) -> "dict[str, RunGroup]":
        """The further runs."""
        shared = {"seeds": self.seeds[:1]}
        return {name: _typed(RunGroup, shared | own, f"runs.{name}.") for name, own in self.runs.items()}


@dataclass(frozen=True)
class RunGroup:
    """Experiments that are trained and not compared: names, seeds, and values of config keys."""

    arms: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)


def read_plan(path: Path) -> Plan:
    """A plan from a YAML file; keys that it leaves out have their defaults.

    Raises:
        ValueError: naming the file and the key.
    """
    return _read(Plan, path)


def read_study(path: Path) -> Study:
    """A study from a YAML file, its plans and groups checked.

    Raises:
        ValueError: naming the file and the key.
    """
    study = _read(Study, path)
    try:
        require(bool(study.comparisons or study.runs), "comparisons", study.comparisons, "at least one comparison")
        require(bool(study.seeds), "seeds", study.seeds, "at least one seed")
        for name, own in {**study.comparisons, **study.runs}.items():
            require(is_file_name(str(name)), "name", name, "a name without /, of which files are named")
            require(isinstance(own, dict), name, own, "keys and values")
        study.plans()
        study.groups()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return study


def chosen_study(path: Path | None, scale: str | None) -> Study:
    """The study of a file, or one of the default comparison alone, with the command line's scale.

    Raises:
        ValueError: naming the file and the key.
    """
    study = Study(seeds=[], comparisons={"pretraining": {}}) if path is None else read_study(path)
    return study if scale is None else replace(study, scale=scale)


def first_seeds(study: Study, count: int | None) -> Study:
    """A study with the first seeds of its plan alone.

    Raises:
        ValueError: if there are not as many.
    """
    if count is None:
        return study
    require(1 <= count <= len(study.seeds), "--seeds", count, f"1 to {len(study.seeds)}, the seeds of the plan")
    return replace(study, seeds=study.seeds[:count])


def setting_folder(words: Sequence[str]) -> str:
    """Name of the folder of a study's runs with values of their own; empty without any.

    Args:
        words: `key=value` strings.
    """
    return re.sub(r"[^\w.=-]", "_", " ".join(words))


def setting_words(where: Mapping[str, Any]) -> list[str]:
    """The values of a plan's `where` as `key=value` strings."""
    return [f"{key}={'null' if value is None else value}" for key, value in where.items()]


Schema = TypeVar("Schema")


def _read(schema: type[Schema], path: Path) -> Schema:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no plan file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, found {type(content).__name__}")
    try:
        return _typed(schema, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _typed(schema: type[Schema], content: dict[str, Any], prefix: str = "") -> Schema:
    """An instance of a dataclass, its keys and the types of its values checked."""
    known = [key.name for key in fields(schema)]  # type: ignore[arg-type]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"
            raise ValueError(f"unknown key {prefix}{key!r}{hint}")
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(literal(content))))
    except OmegaConfBaseException as error:
        named = getattr(error, "full_key", None)
        raise ValueError(f"{prefix}{named}={content.get(str(named))!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, schema)
    return result


def chosen_plan(path: Path | None, scale: str | None, where: Sequence[str]) -> Plan:
    """The plan of a file, or the default one, with the command line's scale and `key=value` strings.

    Raises:
        ValueError: naming the file, key or string.
    """
    plan = Plan() if path is None else read_plan(path)
    more = {}
    for item in where:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ValueError(f"{item!r} is not of the form key=value, for example optim.lr=1e-3")
        more[key] = value
    return replace(plan, scale=scale or plan.scale, where={**plan.where, **more})
