"""Log lines of long work: items, rate, ETA."""

import re

import pytest

from t2i_lm.runtime.progress import log_progress, progress


def test_lines_come_at_intervals_and_at_the_end_but_not_at_the_first_item(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 4004, 4))  # seconds: an item takes four
    monkeypatch.setattr("t2i_lm.runtime.progress.time.monotonic", lambda: float(next(clock)))
    with progress("tokenizing train", 1000) as advance:
        for _ in range(1000):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenizing train: 3/1,000 images, 0.25 images/s, ETA 1:06:28"
    assert lines[-1] == "tokenizing train: 1,000/1,000 images, 0.25 images/s, ETA 0:00:00"
    assert len(lines) == 334


def test_rates_have_no_exponents(capsys: pytest.CaptureFixture[str]) -> None:
    log_progress("tokenizing", 25_600)(25_600)
    assert re.fullmatch(r"tokenizing: 25,600/25,600 images, [\d,]+ images/s, ETA 0:00:00\n", capsys.readouterr().err)


def test_more_items_than_expected_do_not_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    advance = log_progress("tokenizing", 100, 0, world=4)
    for _ in range(100):
        advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rank_0_reports_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):
        log_progress("sampling", 8, rank, world=2)(4)
    assert capsys.readouterr().err.startswith("sampling: 8/8 images")


def test_an_unknown_number_of_items_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_lm.runtime.progress.LOG_EVERY_S", 0.0)
    advance = log_progress("tokenizing", None, unit="documents")
    advance(2)
    advance(3)
    assert "5 documents, " in capsys.readouterr().err.splitlines()[1]
