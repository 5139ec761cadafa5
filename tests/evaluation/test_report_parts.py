"""A report whose parts fail one by one, and its second writing from the last checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from callbacks import MetricsFile
from t2i_lm.evaluate import main
from t2i_lm.evaluation.parts import failed, measured, part
from t2i_lm.storage.run_folder import REPORT, Run, read_run
from tests.runs import PRETRAINED, checkpoints, resume_from_middle


@pytest.mark.parametrize(
    "error", [ValueError("x\ny"), RuntimeError("CUDA out of memory"), AssertionError(), OSError(2, "no")]
)
def test_a_part_that_fails_is_recorded_and_told_in_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    report: dict[str, Any] = {"iid": {}}
    with part(report, "samples"):
        report["samples"] = {"prompts": 3}
        fail()
    with part(report["iid"], "ceiling"):
        fail()
    with part(report, "preference"):
        report["preference"] = {"size": {"preferred": 1.0}}
    assert set(report["samples"]) == {"error"}
    assert failed(report) == ["iid.ceiling", "samples"]
    assert (measured(report, "samples"), measured(report, "absent")) == ({}, {})
    assert measured(report, "preference") == {"size": {"preferred": 1.0}}
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " samples failed",
        " ceiling failed",
    ]


def copy_of(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.folder, tmp_path / "run"))


def without(report: dict[str, Any] | None, *names: str) -> dict[str, Any]:
    assert report is not None
    return {name: value for name, value in report.items() if name not in names}


def test_a_report_is_written_again_as_it_was(pretrained: Run, tmp_path: Path) -> None:
    folder = copy_of(pretrained, tmp_path)
    grid = (folder / "samples" / "grid.png").read_bytes()
    shutil.rmtree(folder / "samples")
    assert main(["--checkpoint", str(folder), "--report"]) == 0
    assert read_run(folder).report == pretrained.report
    assert (folder / "samples" / "grid.png").read_bytes() == grid
    (folder / REPORT).unlink()
    assert main(["--checkpoint", str(folder), "--report"]) == 0
    again = read_run(folder).report
    assert without(again, "wall_s", "digest") == without(pretrained.report, "wall_s", "digest")
    assert again is not None
    assert again["wall_s"] > 0


def test_a_failed_part_spoils_no_other_and_no_run(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_the_way(folder: Path) -> None:
        (folder / "samples" / "grid.png").unlink()
        (folder / "samples" / "grid.png").mkdir()

    run = resume_from_middle(PRETRAINED, tmp_path, pretrained, first=in_the_way)  # ends with exit code 0
    assert run.report is not None
    assert "Is a directory" in run.report["iid"].pop("grid")["error"]
    clocks = ("wall_s", "metrics_digest", "digest")
    assert without(run.report, *clocks) == without(pretrained.report, *clocks)
    said = capsys.readouterr().err.splitlines()
    assert "report: grid failed: Is a directory" in said
    again = f"python -m t2i_lm.evaluate --checkpoint {run.folder} --report"
    assert f"report: iid.grid failed, all else is written; to compute it again: {again}" in said
    assert main(["--checkpoint", str(run.folder), "--report"]) == 1
    (run.folder / "samples" / "grid.png").rmdir()
    assert main(["--checkpoint", str(run.folder), "--report"]) == 0
    assert without(read_run(run.folder).report, *clocks) == without(pretrained.report, *clocks)


def test_an_unfinished_run_has_no_report(pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(pretrained, tmp_path)
    (folder / "report.json").unlink(missing_ok=True)
    metrics = folder / "metrics.jsonl"
    lines = [record for record in MetricsFile(metrics).read() if "train" in record]
    metrics.unlink()
    for record in lines:
        MetricsFile(metrics).append(record)
    assert main(["--checkpoint", str(folder), "--report"]) == 2
    assert "step 8 is not validated; --resume finishes this run" in capsys.readouterr().err
    checkpoints(read_run(folder))[-1].unlink()
    assert main(["--checkpoint", str(folder), "--report"]) == 2
    assert "is of step 6 of 8; --resume finishes this run" in capsys.readouterr().err
    assert main(["--checkpoint", str(folder), "--report", "--coco", "x"]) == 2
    assert (
        "--report: writes report.json into the run's own folder, and alone; not with --coco" in capsys.readouterr().err
    )
