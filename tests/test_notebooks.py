"""Notebooks are short, stripped, import the catalogue of figures alone, and run from start to end."""

import ast
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from t2i_lm.plots.catalogue import FIGURES, Request, show, stem
from tests.plots.synthetic_runs import write_relearning, write_run, write_tokens

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
ALLOWED = {"t2i_lm.plots.catalogue"}
PRINTED = ("PSNR", "gap %", "validation", "source", "after steps", "tokens saved")  # of the tables


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the runs of every figure."""
    warm_up = {"optim.warmup_steps": 15}  # of 300 steps
    pretrained = write_run(tmp_path / "runs", "t2i_pretrained", "20260301-100000", config=warm_up, forgotten=1.5)
    write_relearning(pretrained, 12.3)
    write_tokens(pretrained)
    write_run(tmp_path / "runs", "remedy_replay", "20260301-170000", forgotten=0.2)
    write_relearning(write_run(tmp_path / "runs", "t2i_scratch", "20260301-110000", config=warm_up), 13.9)
    write_run(tmp_path / "runs", "uncond_pretrained", "20260301-120000")
    write_run(tmp_path / "runs", "uncond_scratch", "20260301-130000")
    write_run(tmp_path / "runs", "t2i_body_only", "20260301-140000")
    write_run(tmp_path / "runs", "align", "20260301-150000")
    write_run(tmp_path / "runs", "align_shuffled", "20260301-160000")
    for number, steps in enumerate((100, 200)):  # with the pair above, a curve of three lengths
        for arm in ("t2i_pretrained", "t2i_scratch"):
            shorter = {"trainer.max_steps": steps, "optim.warmup_steps": steps // 20}
            write_run(tmp_path / "runs", arm, f"20260201-1{number}0000", config=shorter)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def cells(notebook: Path) -> list[Any]:
    """Cells as Jupyter would see them."""
    read = jupytext.read(notebook)
    nbformat.validate(read)
    return list(read.cells)


def shown(notebook: Path) -> list[str]:
    """Names of the figures that a notebook shows, in order."""
    calls = [node for node in ast.walk(ast.parse(notebook.read_text())) if isinstance(node, ast.Call)]
    names = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "show"]
    return [str(name.value) for name in names if isinstance(name, ast.Constant)]


def test_the_notebooks_show_every_figure_once() -> None:
    names = [name for notebook in NOTEBOOKS for name in shown(notebook)]
    assert sorted(names) == sorted(FIGURES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_starts_with_words(notebook: Path) -> None:
    content = cells(notebook)
    assert 2 <= len(content) <= 12
    assert content[0].cell_type == "markdown"
    assert not any(cell.get("outputs") for cell in content)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_only_the_catalogue(notebook: Path) -> None:
    modules = set()
    for node in ast.walk(ast.parse(notebook.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    ours = {name for name in modules if name.split(".")[0] in ("t2i_lm", "callbacks")}
    assert ours
    assert ours <= ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_and_saves_its_figures(notebook: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    read = jupytext.read(notebook)
    where = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(read, timeout=120, kernel_name="python3", resources=where).execute()
    cells_with_images = 0
    for cell in read.cells:
        outputs = cell.get("outputs", [])
        if any("image/png" in output.get("data", {}) for output in outputs):
            cells_with_images += 1
            printed = "".join(output.get("text", "") for output in outputs)
            assert any(words in printed for words in PRINTED)
    names = shown(notebook)
    assert cells_with_images == len(names)
    for name in names:
        assert (project / "figures" / f"{stem(name)}.pdf").stat().st_size > 5000
        with Image.open(project / "figures" / f"{stem(name)}.png") as image:
            assert image.width == 2400


def test_a_figure_without_runs_prints_the_command_that_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show("5", Request(tmp_path / "runs"), tmp_path / "figures") is None
    assert "python -m t2i_lm.ablate --all" in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()
