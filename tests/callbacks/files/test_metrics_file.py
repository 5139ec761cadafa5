"""Complete lines in metrics.jsonl and events.log after kills and full disks."""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from callbacks import EventLog, MetricsFile
from callbacks.checkpoints import require_same_metrics
from t2i_lm.storage.run_folder import metrics_digest


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    """Three lines, of steps 0, 10 and 20."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (0, 10, 20):
        metrics.append({"step": step, "loss": 0.1 + 0.2})
    return metrics


def steps(metrics: MetricsFile) -> list[int]:
    """The steps of all lines."""
    return [record["step"] for record in metrics.read()]


def test_lines_are_appended_and_read_back(file: MetricsFile) -> None:
    assert file.read()[1] == {"step": 10, "loss": 0.30000000000000004}
    assert MetricsFile(file.path.with_name("absent")).read() == []


@pytest.mark.parametrize(("step", "left"), [(-1, []), (9, [0]), (10, [0, 10]), (99, [0, 10, 20])])
def test_cutting_keeps_the_bytes_of_lines_up_to_the_step(file: MetricsFile, step: int, left: list[int]) -> None:
    before = file.path.read_bytes()
    assert file.cut_after(step) == 3 - len(left)
    assert steps(file) == left
    assert before.startswith(file.path.read_bytes())


def test_a_torn_last_line_is_not_read_and_is_cut(file: MetricsFile) -> None:
    with file.path.open("ab") as raw:
        raw.write(b'{"step": 30, "lo')
    assert steps(file) == [0, 10, 20]
    assert file.cut_after(99) == 1
    file.append({"step": 30})
    assert steps(file) == [0, 10, 20, 30]


@pytest.mark.parametrize("asked", [False, True])
def test_a_torn_last_line_is_cut_before_another_process_appends(file: MetricsFile, asked: bool) -> None:
    whole, digest = file.end()
    with file.path.open("ab") as raw:
        raw.write(b'{"step": 30, "lo')
    again = MetricsFile(file.path)
    if asked:
        assert again.end() == (whole, digest)
    again.append({"step": 30})
    again.append({"step": 40})
    assert again.size() == file.path.stat().st_size
    assert steps(MetricsFile(file.path)) == [0, 10, 20, 30, 40]


def test_a_torn_last_event_is_cut_before_another_process_appends(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.log")
    log.write("skipped", "step 3")
    with log.path.open("a") as raw:
        raw.write("2026-03-01T10:00:00 skip")
    again = EventLog(log.path)
    again.write("resumed", "from step-00000002.ckpt")
    assert again.counts() == {"skipped": 1, "resumed": 1}


@pytest.mark.parametrize("line", [b'{"step": 3', b"7", b"\xff"])
def test_damage_elsewhere_is_named_with_its_line(file: MetricsFile, line: bytes) -> None:
    first, _, third = file.path.read_bytes().splitlines()
    file.path.write_bytes(b"\n".join([first, line, third]) + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is damaged"):
        file.read()


def harms(lines: list[bytes], draw: random.Random) -> list[bytes]:
    """Lines of which one was edited, removed, doubled, moved, or stripped of its digest."""
    at = draw.randrange(len(lines) - 1)
    kind = draw.choice(["flip", "remove", "double", "swap", "strip"])
    changed = list(lines)
    if kind == "flip":
        line = bytearray(lines[at])
        line[draw.randrange(len(line) - 1)] ^= 1 << draw.randrange(8)
        changed[at] = bytes(line)
    elif kind == "remove":
        del changed[at]
    elif kind == "double":
        changed.insert(at, lines[at])
    elif kind == "swap":
        changed[at], changed[at + 1] = lines[at + 1], lines[at]
    else:
        changed[at + 1] = re.sub(rb', "digest": "\w+"', b"", lines[at + 1])
    return changed


def test_every_change_of_lines_is_found_by_both_readers(file: MetricsFile) -> None:
    for step in range(30, 200, 10):
        file.append({"step": step, "loss": 1 / step})
    lines, draw = file.path.read_bytes().splitlines(keepends=True), random.Random(0)
    for _ in range(300):
        file.path.write_bytes(b"".join(harms(lines, draw)))
        with pytest.raises(ValueError, match=r"metrics\.jsonl:\d+ is damaged"):
            MetricsFile(file.path).read()
        with pytest.raises(ValueError, match=r"metrics\.jsonl line \d+ is damaged"):
            metrics_digest(file.path.parent)
    file.path.write_bytes(b"".join(lines))
    assert metrics_digest(file.path.parent) == MetricsFile(file.path).tip() == file.tip()


def test_lines_of_an_older_version_are_read_and_covered_by_the_next_digest(file: MetricsFile) -> None:
    old = b'{"step": 0}\n{"step": 10}\n'
    file.path.write_bytes(old)
    assert steps(MetricsFile(file.path)) == [0, 10]
    MetricsFile(file.path).append({"step": 20})
    whole = file.path.read_bytes()
    assert whole.startswith(old)
    assert steps(MetricsFile(file.path)) == [0, 10, 20]
    file.path.write_bytes(whole.replace(b'"step": 10', b'"step": 11'))
    with pytest.raises(ValueError, match="3 is damaged"):
        MetricsFile(file.path).read()


def test_lines_up_to_a_checkpoint_must_be_those_of_then(file: MetricsFile) -> None:
    size, digest = file.end()
    state = {"metrics_size": size, "metrics_digest": digest}
    file.append({"step": 30})
    require_same_metrics(file, state)
    require_same_metrics(file, {"metrics_size": size})  # of an older version
    file.path.write_bytes(re.sub(rb', "digest": "\w+"', b"", file.path.read_bytes()) + b" " * 200 + b"\n")
    with pytest.raises(ValueError, match="has other lines than when"):
        require_same_metrics(MetricsFile(file.path), state)
    file.path.write_bytes(b"")  # RunCheckpoints says so
    require_same_metrics(MetricsFile(file.path), state)


def test_cutting_to_a_size_happens_only_where_a_line_ends(file: MetricsFile) -> None:
    first = len(file.path.read_bytes().splitlines(keepends=True)[0])
    whole = file.size()
    assert not file.cut_to(first + 1)
    assert not file.cut_to(whole + 1)
    assert file.size() == whole
    assert file.cut_to(first)
    assert steps(file) == [0]
    assert file.cut_to(0)
    assert steps(file) == []


def test_values_that_json_cannot_hold_are_refused(file: MetricsFile) -> None:
    with pytest.raises(ValueError, match="JSON"):
        file.append({"step": 30, "loss": float("nan")})
    assert steps(file) == [0, 10, 20]


def test_lines_wait_for_a_full_disk_and_none_is_written_in_part(
    file: MetricsFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, before = os.write, file.path.read_bytes()
    calls = 0

    def full(handle: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls % 2:  # a first write takes some bytes, the next finds no room
            return write(handle, bytes(data)[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        file.append({"step": 30})
        file.append({"step": 40})
        with pytest.raises(OSError, match="No space left"):
            file.sync()
        assert file.path.read_bytes() == before
        assert file.size() == len(before) + sum(
            len(f'{{"step": {step}, "digest": "0123456789abcdef"}}\n') for step in (30, 40)
        )
    assert capsys.readouterr().err.count("lines are written later") == 1
    file.append({"step": 50})
    assert steps(file) == [0, 10, 20, 30, 40, 50]
    file.sync()


def test_a_line_is_one_json_object(file: MetricsFile) -> None:
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [0, 10, 20]


def test_events_are_counted_by_kind_and_kept_on_one_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.log")
    assert log.counts() == {}
    log.write("resumed", "from\nstep 3")
    log.write("skip", "a")
    log.write("skip", "b")
    with log.path.open("a") as file:
        file.write("2026-01-01T00:00:00 torn")
    assert log.counts() == {"resumed": 1, "skip": 2}
    assert log.read()[0][2] == "from step 3"


@pytest.mark.parametrize("kind", ["", "two words", "a\n"])
def test_the_kind_of_an_event_is_one_word(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="expected one word"):
        EventLog(tmp_path / "events.log").write(kind, "text")


def test_an_event_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EventLog(tmp_path / "absent" / "events.log").write("skip", "step 3")
    assert "skip step 3" in capsys.readouterr().err
