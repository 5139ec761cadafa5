"""Parts of a report: a part that fails is recorded and told in one line, and the others go on."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from t2i_lm.storage.reading import shows_traceback
from t2i_lm.storage.writing import problem

ERROR = "error"


@contextmanager
def part(report: dict[str, Any], name: str) -> Iterator[None]:
    """Computes one part of a report: after an error, `report[name]` is `{"error": message}`."""
    try:
        yield
    except Exception as error:
        report[name] = {ERROR: problem(error)}
        if shows_traceback():
            traceback.print_exc()
        print(f"report: {name} failed: {problem(error)}", file=sys.stderr)


def failed(report: dict[str, Any]) -> list[str]:
    """Names of the parts that failed, those inside of others as `iid.samples`."""
    names: list[str] = []
    for name, value in report.items():
        if isinstance(value, dict):
            inner = [f"{name}.{one}" for one in failed(value)]
            names += [name] if isinstance(value.get(ERROR), str) else inner
    return names


def measured(report: dict[str, Any], name: str) -> Any:
    """A part of a report; an empty one where it failed or is not there."""
    value = report.get(name) or {}
    return {} if isinstance(value, dict) and isinstance(value.get(ERROR), str) else value
