"""The command `python -m t2i_lm.figures`."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2i_lm.figures import NAMES, main
from t2i_lm.plots.catalogue import FIGURES
from tests.plots.synthetic_runs import read_lines

ROOT = Path(__file__).parents[1]


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, with warnings as errors; code 9 if it imports torch or pyplot."""
    code = (
        "import sys; from t2i_lm.figures import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules or 'matplotlib.pyplot' in sys.modules else code)"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_writes_both_figures_and_prints_paths_and_numbers(runs: Path, tmp_path: Path) -> None:
    done = command("--runs", runs, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    written = [tmp_path / "out" / f"figure{n}.{kind}" for n in "34" for kind in ("png", "pdf")]
    assert done.stdout.splitlines()[2:6] == [str(path) for path in written]  # after figure 2, which needs no run
    mine, other = (
        read_lines(next((runs / name).iterdir()), "val")[-1]["val"]["text"]["nll"]
        for name in ("t2i_pretrained", "t2i_scratch")
    )
    row = next(line for line in done.stdout.splitlines() if line.startswith("text nll"))
    printed = [float(word) for word in row.split()[-4:]]
    expected = [mine, other, mine - other, 100 * (mine - other) / other]
    assert printed == pytest.approx(expected, abs=0.006)
    assert done.stdout.count("gap %") == 1  # one table for both figures


def test_only_the_named_figures_are_written(runs: Path, tmp_path: Path) -> None:
    assert main(["--runs", str(runs), "--out", str(tmp_path / "out"), "--figure", "4"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figure4.pdf",
        "figure4.png",
    ]


def test_every_figure_of_the_catalogue_is_an_option() -> None:
    assert tuple(FIGURES) == NAMES


def test_help_is_quick_shows_an_example_and_loads_no_matplotlib() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = command("--help")
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
    assert "example:\n  python -m t2i_lm.figures" in done.stdout
    assert min(times) < 1.0  # the bar is 0.5 s on a quiet machine
    code = "import sys, t2i_lm.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
