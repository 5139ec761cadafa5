"""Notebooks are short, stripped, import figures alone, and run from start to end."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.plots.synthetic_runs import write_run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
ALLOWED = {"t2i_lm.figures", "t2i_lm.config.load"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the runs of every figure."""
    write_run(tmp_path / "runs", "t2i_pretrained", "20260301-100000", forgotten=1.5)
    write_run(tmp_path / "runs", "remedy_replay", "20260301-170000", forgotten=0.2)
    write_run(tmp_path / "runs", "t2i_scratch", "20260301-110000")
    write_run(tmp_path / "runs", "uncond_pretrained", "20260301-120000")
    write_run(tmp_path / "runs", "uncond_scratch", "20260301-130000")
    write_run(tmp_path / "runs", "t2i_body_only", "20260301-140000")
    write_run(tmp_path / "runs", "align", "20260301-150000")
    write_run(tmp_path / "runs", "align_shuffled", "20260301-160000")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def cells(notebook: Path) -> list[Any]:
    """Cells as Jupyter would see them."""
    read = jupytext.read(notebook)
    nbformat.validate(read)
    return list(read.cells)


def test_there_is_a_notebook_for_each_figure() -> None:
    from t2i_lm.figures import FIGURES, stem

    assert {notebook.stem for notebook in NOTEBOOKS} == {stem(name) for name in FIGURES}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_starts_with_words(notebook: Path) -> None:
    found = cells(notebook)
    assert 2 <= len(found) <= 10
    assert found[0].cell_type == "markdown"
    assert not any(cell.get("outputs") for cell in found)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_only_figures_and_load(notebook: Path) -> None:
    modules = set()
    for node in ast.walk(ast.parse(notebook.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    ours = {name for name in modules if name.split(".")[0] in ("t2i_lm", "callbacks")}
    assert ours
    assert ours <= ALLOWED


def drawn_width(project: Path, notebook: Path) -> int:
    """Width of the figure that a notebook wrote, in pixels."""
    assert (project / "figures" / f"{notebook.stem}.pdf").stat().st_size > 5000
    with Image.open(project / "figures" / f"{notebook.stem}.png") as image:
        return image.width


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_and_saves_its_figure_in_jupyter(
    notebook: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    read = jupytext.read(notebook)
    where = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(read, timeout=120, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in read.cells for output in cell.get("outputs", [])]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 1
    printed = "".join(output.get("text", "") for output in outputs)
    assert "gap %" in printed or "validation" in printed or "source" in printed  # the table of final numbers
    assert drawn_width(project, notebook) == 2400


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_a_script(notebook: Path, project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(notebook)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert drawn_width(project, notebook) == 2400
