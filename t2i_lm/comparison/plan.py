"""Plan of a comparison: arms, primary endpoint and margin, written down before the runs are made."""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.config.experiment import is_file_name, stays_inside
from t2i_lm.config.file_kinds import COMPARISON, require_kind
from t2i_lm.config.load import given_value, literal
from t2i_lm.config.sections import require
from t2i_lm.config.values import Plain, key_types, read_value, section_problem, value_word
from t2i_lm.storage.run_folder import PRIMARY, VAL
from t2i_lm.storage.yaml_text import problem_of, read_yaml

SPLITS = (PRIMARY, "compositional")  # of scenes
# Default secondary endpoints.
SECONDARY = (
    "val/compositional.image.nll",
    "val/iid.text.nll",
    "val/compositional.text.nll",
    "val/iid.all.nll",
    "tokens_saved.image",
)


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


LONGEST = 200  # bytes of a folder's name that is used as it is; file systems take 255
# Keys that no arm, no grid and no `where` of a study sets: a plan has its own words for them, or they change nothing
# computed.
RESERVED = ("seed", "scale", "name", "run.dir")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: an experiment, with values of config keys that are the arm's own.

    Attributes:
        name: in the plan, its tables and files.
        experiment: name of the experiment.
        own: values by dotted key.
    """

    name: str
    experiment: str
    own: Mapping[str, Any] = field(default_factory=dict)


EXPERIMENTS = "names of experiments"


def parse_arms(given: Any, key: str = "arms") -> dict[str, Arm]:
    """Arms by name.

    Args:
        given: names of experiments; or a mapping from names to an experiment, or to values of config keys with the
            experiment under `experiment` (default: the name).
        key: where it is from, for messages.

    Raises:
        ValueError: naming the key.
    """
    if isinstance(given, list):
        require(all(isinstance(name, str) and stays_inside(name) for name in given), key, given, EXPERIMENTS)
        require(len(set(given)) == len(given), key, given, "each arm once")
        return {name: Arm(name, name) for name in given}
    require(isinstance(given, Mapping), key, given, f"{EXPERIMENTS}, or settings by arm")
    arms = {}
    for name, content in given.items():
        require(isinstance(name, str) and is_file_name(name), key, name, "a name without / for each arm")
        known = content is None or isinstance(content, str | Mapping)
        require(known, f"{key}.{name}", content, "an experiment, or values of config keys")
        own = {"experiment": content} if isinstance(content, str) else dict(content or {})
        experiment = own.pop("experiment", name)
        named = isinstance(experiment, str) and stays_inside(experiment)
        require(named, f"{key}.{name}.experiment", experiment, "the name of an experiment")
        require_settable(own, f"{key}.{name}")
        arms[name] = Arm(name, experiment, own)
    contents: dict[str, str] = {}
    for name, arm in arms.items():
        content = repr((arm.experiment, sorted((key, of_type(key, value)) for key, value in arm.own.items())))
        other = contents.setdefault(content, name)
        require(other == name, f"{key}.{name}", given[name], f"another experiment or setting than of {other}")
    return arms


def of_type(key: str, value: Any) -> str:
    """A value of a config key as its type reads it, in words: YAML takes 3e-3 for text.

    Raises:
        ValueError: naming the key and what is allowed.
    """
    return repr(read_value(key, Plain(value) if isinstance(value, str) else value))


def require_settable(values: Mapping[Any, Any], where: str) -> None:
    """Checks that values of config keys name keys that a plan may set.

    Args:
        values: by dotted key.
        where: the plan's key or the option that holds them.

    Raises:
        ValueError: naming the key.
    """
    for key, value in values.items():
        name = f"{where} {key}" if where.startswith("--") else f"{where}.{key}"
        name += "" if value is None else f"={value!r}"
        known = isinstance(key, str) and key in key_types()
        near = difflib.get_close_matches(str(key), list(key_types()), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        for wrong, expected in (
            (not known, f"a config key, such as optim.lr{hint}"),
            (key in RESERVED, f"another key than {', '.join(RESERVED)}"),
            (isinstance(value, Mapping), "a value of a dotted key"),
        ):
            if wrong:
                raise ValueError(f"{name}: expected {expected}")
        if problem := section_problem(key):
            raise ValueError(f"{name}: {problem}")


@dataclass(frozen=True)
class Plan:
    """What a comparison tests.

    Attributes:
        arms: two experiments as in `parse_arms`; a difference is the first minus the second.
        scale: overlay of the runs.
        primary: the endpoint (`endpoints.py`) whose verdict counts, at level `alpha` without correction.
        margin: largest difference of the primary endpoint that counts as none: in its unit, or `1%` of the second arm.
        secondary: further endpoints, corrected for their number (Holm).
        seeds: seeds that both arms require for a verdict; missing ones are named. Empty: those that are there.
        where: values of config keys that runs of both arms must have, by dotted key.
        varied: keys, or their beginnings, in which the arms differ by design, beside `name`, `init` and their own.
        alpha: level of the tests.
    """

    arms: Any = field(default_factory=lambda: ["t2i_pretrained", "t2i_scratch"])
    scale: str = "demo"
    primary: str = "val/iid.image.nll"
    margin: str = "1%"
    secondary: list[str] = field(default_factory=lambda: [*SECONDARY])
    seeds: list[int] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    varied: list[str] = field(default_factory=list)
    alpha: float = 0.05

    def on_sets(self, sets: Sequence[str]) -> "Plan":
        """The plan for runs without splits of scenes: endpoints of those are of the runs' own sets, in order.

        Args:
            sets: the runs' validation splits, the primary one first; empty where they have one validation set. An
                endpoint of a split beyond them goes.
        """

        def own(endpoint: str) -> str:
            for split, place in zip(SPLITS, (VAL, *(f"{VAL}/{name}" for name in sets[1:])), strict=False):
                endpoint = endpoint.replace(f"{VAL}/{split}.", f"{place}.")
            return endpoint

        theirs = tuple(f"{VAL}/{name}." for name in sets)
        kept = [name for name in map(own, self.secondary) if not name.startswith(f"{VAL}/") or name.startswith(theirs)]
        return replace(self, primary=own(self.primary), secondary=kept)

    def __post_init__(self) -> None:
        require(len(parse_arms(self.arms)) == 2, "arms", self.arms, "the names of two experiments")
        require(0 < self.alpha < 0.5, "alpha", self.alpha, "a value in (0, 0.5)")
        Margin.parse(self.margin)
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")
        names = [endpoint.name for endpoint in self.endpoints]
        require(len(set(names)) == len(names), "secondary", self.secondary, "each endpoint once, and not the primary")
        for arm in self.parsed.values():
            for key in arm.own:
                require(key not in self.where, f"arms.{arm.name}.{key}", arm.own[key], "no key of where, for both arms")

    @property
    def parsed(self) -> dict[str, Arm]:
        """Both arms by name."""
        return parse_arms(self.arms)

    @property
    def endpoints(self) -> list[Endpoint]:
        """The primary endpoint, then the secondary ones."""
        return [Endpoint(name) for name in (self.primary, *self.secondary)]

    @property
    def own_keys(self) -> frozenset[str]:
        """Config keys of which an arm has a value of its own."""
        return frozenset(key for arm in self.parsed.values() for key in arm.own)

    @property
    def values_words(self) -> str:
        """Values of `where` and of the arms, each after a comma, to follow a scale."""
        shared = "".join(f", {word}" for word in setting_words(self.where))
        own = (f", {arm.name} {' '.join(setting_words(arm.own))}" for arm in self.parsed.values() if arm.own)
        return shared + "".join(own)

    def required(self, arm: str) -> dict[str, Any]:
        """The values that runs of an arm must have, by dotted key."""
        return {**self.where, **self.parsed[arm].own}


def read_plan(path: Path) -> Plan:
    """A plan from a YAML file; keys that it leaves out have their defaults.

    Raises:
        ValueError: naming the file and the key.
    """
    return read_schema(Plan, path, COMPARISON)


def setting_folder(words: Sequence[str]) -> str:
    """Name of the folder of a study's runs with values of their own; empty without any.

    Args:
        words: `key=value` strings.
    """
    name = re.sub(r"[^\w.=-]", "_", " ".join(words))
    if len(name.encode()) <= LONGEST:
        return name
    return f"{name[: LONGEST // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def setting_words(where: Mapping[str, Any]) -> list[str]:
    """Values by config key as `key=value` strings."""
    return [f"{key}={value_word(value)}" for key, value in where.items()]


def one_spelling(word: str) -> str:
    """A `key=value` string with its number as a config writes it: optim.lr=0.003 for optim.lr=3e-3.

    A value that is no number of its key stays as it is.
    """
    key, _, text = word.partition("=")
    try:
        value = read_value(key, Plain(text))
    except (KeyError, ValueError):  # no key, a section, or no value of it
        return word
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{key}={value_word(value)}" if is_number else word


def setting_in_one_spelling(folder: str) -> str:
    """The name of a `setting_folder` with each of its numbers in `one_spelling`; a shortened name stays as it is."""
    return setting_folder([one_spelling(word) for word in _words_of_folder().split(folder)])


@cache
def _words_of_folder() -> re.Pattern[str]:
    """What separates the words of a `setting_folder`: a line below, before a key."""
    return re.compile(f"_(?=(?:{'|'.join(map(re.escape, key_types()))})=)")


Schema = TypeVar("Schema")
# Words for the types of a plan's keys.
TYPES = {
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
    "dict[str, typing.Any]": "keys and values",
    "int | None": "null or a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
}


def read_plan_file(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: naming the file.
    """
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no plan file {path}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {problem_of(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def read_schema(schema: type[Schema], path: Path, kind: str) -> Schema:
    """An instance of a dataclass from a YAML file of a kind (`config.file_kinds`).

    Raises:
        ValueError: naming the file and the key, or the command of a file of another kind.
    """
    content = read_plan_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, found {type(content).__name__}")
    require_kind(path, content, kind)
    try:
        return typed(schema, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def typed(schema: type[Schema], content: dict[str, Any], prefix: str = "") -> Schema:
    """An instance of a dataclass, its keys and the types of its values checked."""
    forms = {key.name: str(key.type) for key in fields(schema)}  # type: ignore[arg-type]
    for key, value in content.items():
        if key not in forms:
            near = difflib.get_close_matches(str(key), list(forms), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(forms)}"
            raise ValueError(f"unknown key {prefix}{key!r}{hint}")
        container = next((form for form in (dict, list) if forms[key].startswith(form.__name__)), object)
        if not isinstance(value, container):
            raise ValueError(f"{prefix}{key}={value!r}: expected {TYPES[forms[key]]}")
    # OmegaConf merges no mapping into the list of a default.
    free = {key.name: content[key.name] for key in fields(schema) if key.type is Any and key.name in content}  # type: ignore[arg-type]
    content = {key: value for key, value in content.items() if key not in free}
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(literal(content))))
    except OmegaConfBaseException as error:
        named = str(getattr(error, "full_key", None)).partition("[")[0]
        if named not in forms:  # a key or value inside
            raise ValueError(f"{prefix}{named}: {str(error).splitlines()[0]}") from error
        raise ValueError(f"{prefix}{named}={content[named]!r}: expected {TYPES[forms[named]]}") from error
    assert isinstance(result, schema)
    return replace(result, **free)  # type: ignore[type-var]


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
        more[key] = given_value(key, value)
    return replace(plan, scale=scale or plan.scale, where={**plan.where, **more})
