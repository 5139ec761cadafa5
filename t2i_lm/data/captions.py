"""Captions as files hold them: names of their fields, JSON, and values of unintended types."""

import ast
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t2i_lm.data.pairs import RejectedPairError

# In order of preference: of several in one row or object, the first counts.
CAPTION_NAMES = ("captions", "caption", "text", "txt")
# A list written as text is no longer than this; longer text is not parsed to find out.
MAX_LIST_TEXT = 100_000


class Repeated:
    """Value of a JSON key that an object has more than once."""


def parse_json(text: str) -> Any:
    """The value of a JSON text; a repeated key has the value `Repeated()`.

    Raises:
        ValueError: if it is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        fields |= {key: Repeated() for key, count in counts.items() if count > 1}
    return fields


def find_name(known: Sequence[str], names: Iterable[str]) -> str | None:
    """The first known name among `names`: in its own case, or else in the only other one; None if there is none.

    Raises:
        ValueError: if a known name occurs in several other cases.
    """
    present = [name for name in names if isinstance(name, str)]
    for name in known:
        if name in present:
            return name
        alike = [other for other in present if other.strip().casefold() == name]
        if len(alike) > 1:
            raise ValueError(f"{' and '.join(map(repr, alike))} are the same name in two cases")
        if alike:
            return alike[0]
    return None


def other_captions(names: Iterable[str]) -> list[str]:
    """Fields beside the caption field that have the name of one, and are not read."""
    present = list(names)
    try:
        chosen = find_name(CAPTION_NAMES, present)
    except ValueError:  # ambiguous: a reject of its own
        return []
    return [name for name in present if name != chosen and find_name(CAPTION_NAMES, [name]) is not None]


def caption_value(fields: Mapping[str, Any], name: str) -> Any:
    """The caption field's value in a row or JSON object.

    Raises:
        RejectedPairError: if there is none, listing the fields.
    """
    try:
        key = find_name(CAPTION_NAMES, fields)
    except ValueError as error:
        raise RejectedPairError("ambiguous caption", f"{name} ({error})") from error
    if key is None:
        raise RejectedPairError("no caption", f"{name} (it has {', '.join(map(str, fields)) or 'no keys'})")
    return fields[key]


def captions_of(value: Any, name: str) -> list[str]:
    """Non-blank captions from a string or a list of strings, without surrounding white space.

    Raises:
        RejectedPairError: if there is none, or the value is anything else, naming its type.
    """
    captions = _texts(value, name)
    if not captions:
        raise RejectedPairError("no caption", name)
    return captions


def joined_captions(values: Sequence[Any], name: str) -> list[str]:
    """`captions_of` several values of one image."""
    captions = [caption for value in values for caption in _texts(value, name)]
    if not captions:
        raise RejectedPairError("no caption", name)
    return captions


def _texts(value: Any, name: str) -> list[str]:
    if value is None:
        raise RejectedPairError("caption is null", name)
    if isinstance(value, str):
        values: Sequence[Any] = [value]
    elif isinstance(value, list | tuple):
        values = value
        for item in values:
            if not isinstance(item, str):
                raise RejectedPairError(f"caption list holds {_kind(item)}, not a string", name)
    else:
        detail = f"{name} (keys {', '.join(map(str, value))})" if isinstance(value, Mapping) and value else name
        raise RejectedPairError(f"caption is {_kind(value)}, not a string or a list of strings", detail)
    texts = [text.strip() for text in values if text.strip()]
    for text in texts:
        if _is_structure(text):
            raise RejectedPairError("caption is a list or an object written as text", f"{name} ({text[:60]})")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RejectedPairError("caption is not valid Unicode", name) from error
    return texts


def _kind(value: Any) -> str:
    """What a value is, in JSON's terms."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Repeated):
        return "given more than once"
    if isinstance(value, bytes):
        return "binary data"
    return f"of type {type(value).__name__}"


def _is_structure(text: str) -> bool:
    """Whether a caption is a JSON or Python list or object, as a table of text cells holds it."""
    if (text[0], text[-1]) not in (("[", "]"), ("{", "}")) or len(text) > MAX_LIST_TEXT:
        return False
    try:
        parse_json(text)
        return True
    except ValueError as error:
        if isinstance(error.__cause__, RecursionError):
            return True
    if text[1:].lstrip()[:1] not in ("'", '"'):  # `[a dog]` is a caption
        return False
    try:
        ast.literal_eval(text)
        return True
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
