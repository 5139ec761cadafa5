"""Whole items, in order, on a disk that is full for a while."""

import os
import random
from pathlib import Path

import pytest

from callbacks.files.appended_file import AppendedFile
from callbacks.files.event_log import EventLog
from callbacks.files.metrics_file import MetricsFile
from t2i_lm.storage.run_folder import METRICS, metrics_digest
from tests.disks import Ballast, file_limit, small_disk


def test_items_wait_for_space_and_are_written_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = AppendedFile(tmp_path / "file", "rows", 10_000)
    items = [bytes([65 + number]) * 700 for number in range(20)]
    with file_limit(3000):
        for item in items[:10]:
            file.add(item)
            file.try_to_write()
        assert file.path.read_bytes() == b"".join(items[:4])  # the fifth, of which 200 bytes fit, was cut off
        assert file.size() == 7000
        with pytest.raises(OSError, match=f"{file.path}: File too large .* MB free"):
            file.write()
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert "rows are written later, and the run goes on" in out
    for item in items[10:]:
        file.add(item)
        assert file.try_to_write()
    assert file.path.read_bytes() == b"".join(items)
    assert file.waiting == 0
    assert capsys.readouterr().err == f"{file.path}: the rows that waited are written\n"


@pytest.mark.parametrize("drops", [False, True])
def test_what_may_wait_is_limited(tmp_path: Path, drops: bool, capsys: pytest.CaptureFixture[str]) -> None:
    file = AppendedFile(tmp_path / "file", "rows", 1500, drops)
    with file_limit(0):
        for _ in range(2):
            file.add(b"x" * 700)
            assert not file.try_to_write()
        file.add(b"y" * 700)
        if not drops:
            with pytest.raises(OSError, match="File too large"):
                file.try_to_write()
            return
        assert not file.try_to_write()
    assert file.try_to_write()
    assert file.path.read_bytes() == b"x" * 1400
    assert "1 were more than may wait and are lost" in capsys.readouterr().err


def test_remains_that_cannot_be_cut_off_at_once_are_before_the_next_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendedFile(tmp_path / "file", "rows", 10_000)
    file.add(b"a" * 100)
    file.write()

    def failing(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, file_limit(150):
        patch.setattr(os, "truncate", failing)
        file.add(b"b" * 100)
        assert not file.try_to_write()
        assert file.path.stat().st_size == 150
        assert file.size() == 200
    file.write()
    assert file.path.read_bytes() == b"a" * 100 + b"b" * 100


def test_an_error_when_the_file_is_closed_counts_as_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system."""
    file = AppendedFile(tmp_path / "file", "rows", 10_000)
    close = os.close

    def failing(handle: int) -> None:
        close(handle)
        raise OSError(122, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing)
        file.add(b"a" * 100)
        assert not file.try_to_write()
    assert file.path.stat().st_size == 0
    file.write()
    assert file.path.read_bytes() == b"a" * 100


def test_lines_of_metrics_that_waited_continue_the_chain_of_digests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, late = MetricsFile(tmp_path / "whole"), MetricsFile(tmp_path / METRICS)
    draw = random.Random(0)
    for step in range(200):
        record = {"step": step, "text": "x" * draw.randrange(200)}
        whole.append(record)
        with file_limit(draw.choice([2**30, draw.randrange(100, 40_000)])):
            late.append(record)
        assert len(MetricsFile(late.path).read()) <= step + 1  # and each line is whole
        assert late.end() == whole.end()
    late.sync()
    assert late.path.read_bytes() == whole.path.read_bytes()
    assert metrics_digest(tmp_path) == whole.end()[1]


def test_events_are_printed_at_once_and_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(tmp_path / "events.log")
    log.write("first", "a")
    with file_limit(30):
        log.write("second", "b")
        assert [kind for _, kind, _ in EventLog(log.path).read()] == ["first"]
    assert " second b\n" in capsys.readouterr().err
    log.catch_up()
    assert [kind for _, kind, _ in log.read()] == ["first", "second"]


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        metrics, ballast, draw = MetricsFile(disk / METRICS), Ballast(disk), random.Random(1)
        for step in range(300):
            if step % 30 == 10:
                ballast.fill(draw.randrange(2) * 4096)
            if step % 30 == 25:
                ballast.remove()
            metrics.append({"step": step, "text": "x" * draw.randrange(400)})
            MetricsFile(metrics.path).read()
        metrics.sync()
        assert [record["step"] for record in MetricsFile(metrics.path).read()] == list(range(300))
