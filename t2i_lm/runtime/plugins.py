"""Plug-ins: tokenizers, backbones and sources of pairs from other packages (docs/plugins.md).

A config selects a plug-in by `plugin:NAME[:ARGUMENT]`, where an installed package declares NAME as an entry point. With
`allow_code: true` it may also name any importable function, by `code:MODULE:FUNCTION[:ARGUMENT]`.
"""

import hashlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import PLUGIN_KEYS
from t2i_lm.config.sections import CODE, PLUGIN, is_plugin


@dataclass(frozen=True)
class Kind:
    """A kind of plug-in.

    Attributes:
        key: the config key that selects it.
        group: the entry-point group that declares it.
        parameters: positional parameters of its function.
    """

    key: str
    group: str
    parameters: tuple[str, ...]


IMAGE_TOKENIZER = Kind("image_tokenizer.path", "t2i_lm.image_tokenizers", ("argument", "image_size"))
TEXT_TOKENIZER = Kind("text_tokenizer.path", "t2i_lm.text_tokenizers", ("argument",))
BACKBONE = Kind("backbone.path", "t2i_lm.backbones", ("argument", "pretrained"))
SOURCE = Kind("data.source", "t2i_lm.sources", ("data", "split", "image_size"))
KINDS = {kind.key: kind for kind in (IMAGE_TOKENIZER, TEXT_TOKENIZER, BACKBONE, SOURCE)}


@dataclass(frozen=True)
class Plugin:
    """A function that a config selects.

    Attributes:
        where: the key with its value, for errors.
        origin: the package and its version, or the module.
        argument: text behind the name; None where there is none.
    """

    where: str
    origin: str
    function: Callable[..., Any]
    argument: str | None

    @property
    def identity(self) -> str:
        """Package and version, and the hash of the file that holds the function: what caches depend on."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.function))
        except TypeError:  # compiled, or an object that is called
            file = None
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "unknown"
        return f"{self.origin}, file sha256 {digest}"

    def require(self, made: Any, names: Collection[str]) -> None:
        """Checks that what the function returned has all attributes of an interface.

        Raises:
            ValueError: naming those that are missing.
        """
        missing = [name for name in names if not _has(made, name)]
        if missing:
            raise ValueError(
                f"{self.where}: {type(made).__name__} of {self.origin} lacks {', '.join(missing)}; "
                f"expected {', '.join(names)}"
            )


def find_plugin(kind: Kind, value: str, built_in: Collection[str] = ()) -> Plugin:
    """The plug-in that the value of a config key selects.

    Args:
        kind: the kind of plug-in to find.
        value: `plugin:NAME[:ARGUMENT]` or `code:MODULE:FUNCTION[:ARGUMENT]`.
        built_in: names that the suite itself uses, which no plug-in may take.

    Raises:
        ValueError: if it is not installed, its name is taken, it cannot be imported, or its parameters differ.
    """
    where = f"{kind.key}={value}"
    if value.startswith(CODE):
        module, _, rest = value.removeprefix(CODE).partition(":")
        name, _, argument = rest.partition(":")
        if not module or not name:
            raise ValueError(f"{where}: expected code:MODULE:FUNCTION[:ARGUMENT]")
        origin, entry = module, EntryPoint(name, f"{module}:{name}", kind.group)
    else:
        name, _, argument = value.removeprefix(PLUGIN).partition(":")
        entry = _entry_point(kind, where, name, built_in)
        origin = _package(entry)
    if argument and kind is SOURCE:
        raise ValueError(f"{where}: a source takes no argument, but reads data.path and the other keys of data")
    try:
        function = entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}: {entry.value} of {origin} cannot be imported: {error}") from error
    _require_parameters(kind, where, f"{entry.value} of {origin}", function)
    return Plugin(where, origin, function, argument or None)


def plugin_identities(config: ExperimentConfig) -> dict[str, str]:
    """The identity of each plug-in that a config selects, by key."""
    selected = ((key, config.value(key)) for key in PLUGIN_KEYS)
    return {key: find_plugin(KINDS[key], value).identity for key, value in selected if is_plugin(value)}


def interface(protocol: type) -> list[str]:
    """Names of the public attributes and methods that a Protocol requires."""
    names = {*inspect.get_annotations(protocol), *vars(protocol)}
    return sorted(name for name in names if not name.startswith("_"))


def _entry_point(kind: Kind, where: str, name: str, built_in: Collection[str]) -> EntryPoint:
    installed = entry_points(group=kind.group)
    matches = [entry for entry in installed if entry.name == name]
    if not matches:
        known = ", ".join(sorted({entry.name for entry in installed})) or "none"
        raise ValueError(f"{where}: no installed package has {name!r} in its entry points {kind.group}; known: {known}")
    if name in built_in:
        raise ValueError(
            f"{where}: {name!r} of {_package(matches[0])} is the name of a built-in one; rename the entry point"
        )
    if len(matches) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in matches))
        raise ValueError(f"{where}: {name!r} is taken by {packages}; uninstall all but one")
    return matches[0]


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module


def _require_parameters(kind: Kind, where: str, name: str, function: Any) -> None:
    expected = f"a function of ({', '.join(kind.parameters)})"
    if not callable(function):
        raise ValueError(f"{where}: {name} is no function; expected {expected}")
    signature = inspect.signature(function)
    try:
        signature.bind(*kind.parameters)
    except TypeError as error:
        raise ValueError(f"{where}: {name} has the parameters {signature}; expected {expected}") from error


def _has(made: Any, name: str) -> bool:
    """Whether an attribute exists; a property is not evaluated, since it may refuse."""
    try:
        inspect.getattr_static(made, name)
    except AttributeError:
        return hasattr(made, name)
    return True
