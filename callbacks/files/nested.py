"""Values in the nested dictionaries, lists and tuples of a checkpoint."""

import copy
from collections.abc import Callable, Iterator
from typing import Any


def leaves(content: Any) -> Iterator[Any]:
    """Everything that is no dictionary, list or tuple, in order."""
    if isinstance(content, dict):
        for value in content.values():
            yield from leaves(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from leaves(value)
    else:
        yield content


def mapped(
    content: Any,
    chosen: Callable[[Any], bool],
    replace: Callable[[Any], Any],
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """`content` with `replace` of the chosen values, in order, and `other` of everything else.

    Dictionaries keep their class and attributes, such as the versions in a module's state, and what was one object is
    one object again.
    """
    known: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if id(value) not in known:
            known[id(value)] = new(value)
        return known[id(value)]

    def new(value: Any) -> Any:
        if chosen(value):
            return replace(value)
        if isinstance(value, dict):
            same = copy.copy(value)
            for key, inner in value.items():
                same[key] = visit(inner)
            return same
        if isinstance(value, list):
            return [visit(inner) for inner in value]
        if type(value) is tuple:
            return tuple(visit(inner) for inner in value)
        return other(value)

    return visit(content)
