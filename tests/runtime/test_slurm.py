"""Requeueing of a Slurm job, with a stand-in for `scontrol`."""

import os
import stat
from pathlib import Path

import pytest

from t2i_lm.runtime.slurm import job_id, requeue


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that writes its arguments to a file; with a file `refuse` beside it, it fails."""
    program, called = tmp_path / "scontrol", tmp_path / "called"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {called}\nif test -f {tmp_path}/refuse; then echo "Access denied" >&2; exit 1; fi\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    return called


def test_a_job_is_requeued_by_its_number(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert "job 4711 is requeued" in str(requeue())
    assert scontrol.read_text() == "requeue 4711\n"


def test_a_refusal_is_told(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    scontrol.with_name("refuse").touch()
    assert requeue() == "job 4711 is not requeued: Access denied"
    monkeypatch.setenv("PATH", "")
    assert "scontrol cannot be run" in str(requeue())


def test_outside_slurm_nothing_is_called(scontrol: Path) -> None:
    assert requeue() is None
    assert not scontrol.exists()


def test_a_task_of_an_array_has_both_numbers() -> None:
    ids = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_id(ids) == "4711_3"
