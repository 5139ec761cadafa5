"""YAML of bounded size: aliases that multiply, and values that never end, are refused before they are expanded."""

from typing import Any

import yaml

# Characters and values of a file; a config has some 10,000 and 200.
MAX_CHARACTERS, MAX_VALUES = 200_000, 20_000


def read_yaml(text: str) -> Any:
    """The content of a YAML text, of plain types.

    Raises:
        yaml.YAMLError: if it is not YAML, has a key twice, is over `MAX_CHARACTERS` or, with its aliases written
            out, over `MAX_VALUES`.
    """
    loader = loader_of(text)
    try:
        node = root_node(loader)
        if node is None:
            return None
        _require_unique_keys(node, set())
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    finally:
        loader.dispose()


def problem_of(error: yaml.YAMLError) -> str:
    """The problem and its line, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return where + (problem or " ".join(str(error).split()))


def loader_of(text: str) -> yaml.SafeLoader:
    """A loader of a YAML text, for `root_node`; the caller disposes it."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"over {MAX_CHARACTERS:,} characters")
    return yaml.SafeLoader(text)


def root_node(loader: yaml.SafeLoader) -> Any:
    """The root of a text's only document, None where it is empty.

    Raises:
        yaml.YAMLError: if it is not YAML, or larger than `MAX_VALUES`.
    """
    try:
        node = loader.get_single_node()
        values = _values(node, {}) if node is not None else 0
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    if values > MAX_VALUES:
        raise yaml.YAMLError(f"over {MAX_VALUES:,} values, with aliases written out")
    return node


def _require_unique_keys(node: Any, seen: set[int]) -> None:
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, item) for item in node.value]
    names: set[str] = set()
    for key, value in pairs:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in names:
                problem = f"the key {key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            names.add(key.value)
        _require_unique_keys(value, seen)


def _values(node: Any, known: dict[int, int]) -> int:
    """Number of values of a node with its aliases written out, without doing so."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # while it is counted: an alias inside its own anchor has no end
        children = node.value if isinstance(node, yaml.SequenceNode) else [item for pair in node.value for item in pair]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]
