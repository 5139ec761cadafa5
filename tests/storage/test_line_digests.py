"""Digests of lines: `callbacks`, which imports nothing of t2i_lm, writes what `storage` checks without torch."""

import inspect
import json

import pytest

from callbacks.files import line_digests as written
from t2i_lm.storage import line_digests as read


@pytest.mark.parametrize("name", ["check", "_digest"])
def test_both_copies_are_the_same_code(name: str) -> None:
    assert inspect.getsource(getattr(written, name)) == inspect.getsource(getattr(read, name))


def test_signed_lines_are_read_and_a_changed_one_is_not() -> None:
    assert read._FIELD.pattern == written._FIELD.pattern
    tip, lines, has_digests = "", [], False
    for step in range(3):
        line, tip = written.signed(tip, json.dumps({"step": step}).encode())
        lines.append(line)
    tip = ""
    for step, line in enumerate(lines):
        body, tip, has_digests = read.check(tip, has_digests, line)
        assert json.loads(body) == {"step": step}
    with pytest.raises(ValueError, match="its digest does not follow"):
        read.check("", True, lines[0].replace(b'"step": 0', b'"step": 1'))
