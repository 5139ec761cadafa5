"""The command `python -m t2i_lm.report`."""

import subprocess
import sys
from pathlib import Path

import pytest

from t2i_lm.report import main

ROOT = Path(__file__).parents[1]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: --runs {tmp_path / 'none'}: no such folder\n"
    (tmp_path / "plan.yaml").write_text("comparisons: {one: {arm: [a, b]}}")
    assert main(["--runs", str(tmp_path), "--plan", str(tmp_path / "plan.yaml")]) == 2
    error = capsys.readouterr().err
    assert "unknown key comparisons.one.'arm'; did you mean 'arms'" in error
    assert error.count("\n") == 1


def test_a_scale_of_no_run_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", str(runs), "--scale", "papr"]) == 2
    words = f"error: --scale papr: no run of it below {runs}; found: demo\n"
    assert capsys.readouterr().err == words


@pytest.mark.slow
def test_the_page_needs_no_torch(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from t2i_lm.report import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    arguments = ["--runs", str(runs), "--out", str(tmp_path / "out.html")]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], cwd=ROOT, timeout=120)
    assert done.returncode == 0


def test_help_loads_no_matplotlib() -> None:
    code = "import sys, t2i_lm.report; t2i_lm.report.parser().format_help(); sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
