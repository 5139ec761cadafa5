"""YAML of bounded size: aliases that multiply, and values that never end, are refused before they are expanded."""

from typing import Any

import yaml

# Characters and values of a file; a config has some 10,000 and 200.
MAX_CHARACTERS, MAX_VALUES = 200_000, 20_000


def read_yaml(text: str) -> Any:
    """The content of a YAML text, of plain types.

    Raises:
        yaml.YAMLError: if it is not YAML, over `MAX_CHARACTERS` or, with its aliases written out, over `MAX_VALUES`.
    """
    loader = loader_of(text)
    try:
        node = root_node(loader)
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    finally:
        loader.dispose()


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


def _values(node: Any, known: dict[int, int]) -> int:
    """Number of values of a node with its aliases written out, without doing so."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # while it is counted: an alias inside its own anchor has no end
        children = node.value if isinstance(node, yaml.SequenceNode) else [item for pair in node.value for item in pair]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]
