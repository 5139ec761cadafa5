"""Lines about long work: how many, how fast, how long still."""

import re

import pytest

from t2i_lm.runtime import progress as telling
from t2i_lm.runtime.progress import lines, progress


def test_lines_come_at_intervals_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("tokenising", 1000) as tell:
        for _ in range(1000):
            tell(1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert re.fullmatch(r"tokenising: 1 of 1,000 pictures, \S+ a second, \d:\d\d:\d\d left", said[0])
    assert re.fullmatch(r"tokenising: 1,000 of 1,000 pictures, \S+ a second, 0:00:00 left", said[1])


def test_work_that_is_more_than_was_thought_does_not_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    tell = lines("tokenising", 100, 0, world=4)
    for _ in range(100):
        tell(1)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_one_rank_speaks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):
        lines("drawing", 8, rank, world=2)(4)
    assert capsys.readouterr().err.startswith("drawing: 8 of 8 pictures")


def test_work_of_unknown_length_says_how_much_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "TELL_EVERY", 0.0)
    tell = lines("tokenising", None, unit="documents")
    tell(2)
    tell(3)
    assert "5 documents, " in capsys.readouterr().err.splitlines()[1]
