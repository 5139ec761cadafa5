"""Places to write that cannot be written are refused before anything is computed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_lm import ablate, collect, compare, evaluate, export, figures, probe, report, sample, study, sweep

Command = Callable[[list[str]], int]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (figures.main, ()),
        (study.main, ("experiments/study.yaml",)),
        (sweep.main, ("seed=0,1",)),
        (ablate.main, ("--all",)),
        (collect.main, ("runs",)),
        (probe.main, ("run",)),
        (sample.main, ("run",)),
        (export.main, ("run",)),
        (evaluate.main, ("--checkpoint", "run")),
    ],
)
def test_a_file_in_place_of_a_folder_is_refused(
    command: Command, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below"):
        with pytest.raises(SystemExit) as end:
            command([*words, "--out", str(place)])
        assert end.value.code == 2
        assert f"argument --out: {place}: expected a folder, {file} is a file" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(SystemExit):
        figures.main(["--out", str(long)])
    assert f"argument --out: {long}: File name too long" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(SystemExit):
        figures.main(["--out", str(tmp_path / "new" / "below")])
    assert f"argument --out: {tmp_path}/new/below: {tmp_path} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("command", [report.main, compare.main])
def test_a_folder_in_place_of_a_file_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert f"argument --out: {tmp_path}: expected a file, it is a folder" in capsys.readouterr().err
