"""From text to the value of a key: the type that the section declares decides what a text means.

Standard library only. Files and `key=value` follow the same rules, so `name=007` is the text 007 in both.
"""

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from t2i_lm.config.experiment import ExperimentConfig

NULLS = ("null", "Null", "NULL", "~", "")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
LARGEST = 2**63
UTF8_REQUIRED = f"this process names files in {sys.getfilesystemencoding()} (its locale); set PYTHONUTF8=1"
_PREFIXED = re.compile(r"\s*[+-]?0[xob]")  # hexadecimal, octal, binary


class Plain(str):
    """An unquoted scalar of a YAML file, or the value of a `key=value`: where a key may be null, `null` is null."""


@cache
def key_types() -> dict[str, Any]:
    """The type of every dotted key, in order; of a section, its class."""
    return dict(_types(ExperimentConfig, ""))


def _types(section: type, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    hints = get_type_hints(section)
    for name in (one.name for one in fields(section)):
        found.append((f"{prefix}{name}", hints[name]))
        found += _types(hints[name], f"{prefix}{name}.") if is_dataclass(hints[name]) else []
    return found


def section_problem(key: str) -> str:
    """What is wrong with a value of a section, naming one of its keys; empty for every other key."""
    if not is_dataclass(key_types().get(key)):
        return ""
    return f"{key} is a section of keys, such as {next(name for name in key_types() if name.startswith(f'{key}.'))}"


def read_value(key: str, value: object) -> Any:
    """The value of a key.

    Args:
        key: a known dotted key, not that of a section.
        value: text, a list of texts, or a value that already has the key's type.

    Raises:
        ValueError: naming the key, the value and what is allowed.
    """
    kind = key_types()[key]
    if isinstance(kind, UnionType):
        if value is None or (isinstance(value, Plain) and value in NULLS):
            return None
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
        null = "null or "
    else:
        null = ""
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        if value is None or (isinstance(value, Plain) and value in NULLS):
            raise _wrong(key, value, "a list; an empty one is []")
        values = value if isinstance(value, list) else [value]
        return [_scalar(key, one, item, f"a list of {_WORDS[item][1]}") for one in values]
    return _scalar(key, value, kind, null + _WORDS[kind][0])


# What is expected, alone and in a list.
_WORDS: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    str: ("text", "texts"),
}


def _scalar(key: str, value: object, kind: type, allowed: str) -> Any:
    found = None
    if isinstance(value, str):
        found = _READERS[kind](value)
    elif isinstance(value, bool):
        found = value if kind is bool else None
    elif isinstance(value, int | float) and kind is not str:
        found = _READERS[kind](repr(value))
    if found is None:
        raise _wrong(key, value, allowed)
    return found


def _wrong(key: str, value: object, allowed: str) -> ValueError:
    if isinstance(value, Mapping):
        return ValueError(f"{key}: expected {allowed}, found the keys {', '.join(map(str, value)) or '{}'}")
    shown = "null" if value is None else str(value) if isinstance(value, Plain) else repr(value)
    return ValueError(f"{key}={shown}: expected {allowed}")


def _text(text: str) -> str | None:
    return None if isinstance(text, Plain) and not text else str(text)


def _bool(text: str) -> bool | None:
    word = text.strip().lower()
    return word in TRUE if word in (*TRUE, *FALSE) else None


def _int(text: str) -> int | None:
    try:
        number = Decimal(int(text, 0) if _PREFIXED.match(text) else text)
    except (InvalidOperation, ValueError):
        return None
    whole = number.is_finite() and abs(number) < LARGEST and number == number.to_integral_value()
    return int(number) if whole else None


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_READERS: dict[type, Any] = {bool: _bool, int: _int, float: _float, str: _text}


def value_word(value: object) -> str:
    """A value of a config as `key=value` takes it."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_path(key: str, text: str) -> str:
    """A path with `~` expanded.

    Raises:
        ValueError: if this process has a locale in which libraries would look for another name.
    """
    if not text.isascii() and sys.getfilesystemencoding() != "utf-8":
        raise ValueError(f"{key}={as_text(text)}: {UTF8_REQUIRED}")
    return os.path.expanduser(text)


def as_text(argument: str) -> str:
    """A word of the command line as UTF-8, where the locale decoded its bytes to escapes (PEP 383)."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument
