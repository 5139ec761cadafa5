"""Figure 2: published numbers with their sources, and our own evaluations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2i_lm.evaluation.protocol_card import CANONICAL, HASHES, Card
from t2i_lm.figures import main as figures
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.plots.published import own_systems, published_systems, systems_caption


def test_every_published_number_has_a_source_and_both_families_are_there() -> None:
    systems = published_systems()
    assert len({system.name for system in systems}) == len(systems) >= 10
    assert {system.family for system in systems} == {"auto-regressive", "diffusion"}
    assert all(system.source.startswith("arXiv:") and 4 < system.fid < 30 for system in systems)


def test_a_number_that_others_read_off_a_plot_is_marked_in_table_and_caption() -> None:
    others = [system for system in published_systems() if system.stated_by == "others"]
    assert [system.name for system in others] == ["DALL-E"]
    assert "Figure 9" in others[0].note
    assert "(DALL-E's is what others read off its authors' plot)" in systems_caption(published_systems())
    assert "others read off" not in systems_caption([s for s in published_systems() if s.stated_by == "authors"])


def evaluated(runs: Path, fid: float, **card: Any) -> None:
    """Writes an evaluation like `evaluate --coco`, canonical except for the given fields of its card."""
    made = Card(**{**dict.fromkeys(HASHES, "0" * 64), **CANONICAL, **card})
    folder = runs / "t2i_pretrained" / "20260301-100000-paper" / "evaluations" / f"step-{fid}"
    folder.mkdir(parents=True)
    result = {"run": "20260301-100000-paper", "title": made.title, "fid": fid, "differs": made.differences()}
    result |= {"card": made.as_dict(), "environment": {"finished": "2026-03-02T10:00:00"}}
    (folder / "coco.json").write_text(json.dumps(result))


def test_an_earlier_checkpoint_is_named(tmp_path: Path) -> None:
    for step, fid in ((100, 250.0), (300, 30.0)):
        evaluated(tmp_path, fid)
        file = next(tmp_path.glob(f"*/*/evaluations/step-{fid}/coco.json"))
        result = json.loads(file.read_text())
        digest = f"{step:064d}"
        file.write_text(json.dumps(result | {"checkpoint": f"step-{step:08d}.ckpt", "checkpoint_sha256": digest}))
        checkpoints = file.parents[2] / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / f"step-{step:08d}.ckpt.sha256").write_text(f"{digest}  step-{step:08d}.ckpt\n")
    names = {system.fid: system.name for system in own_systems(tmp_path.glob("*/*"))}
    assert names == {
        250.0: "t2i_pretrained (step-00000100, an earlier checkpoint): COCO FID-30k",
        30.0: "t2i_pretrained: COCO FID-30k",
    }


def test_only_comparable_evaluations_look_like_published_ones(tmp_path: Path) -> None:
    evaluated(tmp_path, 21.5)
    evaluated(tmp_path, 33.25, prompts=10)
    evaluated(tmp_path, 0.5, features=64)
    names = {system.fid: system.name for system in own_systems(tmp_path.glob("*/*"))}
    assert names[21.5] == "t2i_pretrained: COCO FID-30k"
    assert names[33.25] == "t2i_pretrained: FID, n=10, not COCO FID-30k"
    drawing = FIGURES["2"](Request(tmp_path))
    drawn = {str(line.get_gid()): line for axes in drawing.figure.axes for line in axes.get_lines()}
    values = {gid: list(np.asarray(line.get_ydata(), dtype=float)) for gid, line in drawn.items()}
    assert values["this suite"] == [21.5]
    assert values["this suite/hollow"] == [33.25]
    assert len(values["auto-regressive"]) + len(values["diffusion"]) == len(published_systems())
    faces = {gid: line.get_markerfacecolor() for gid, line in drawn.items()}
    assert faces["this suite/hollow"] == "none" != faces["this suite"]
    labels = {text.get_text() for axes in drawing.figure.axes for text in axes.texts}
    assert {names[21.5], names[33.25]} <= labels
    assert names[0.5] not in labels  # distances of 64 features are on another scale
    assert "Hollow markers are no COCO FID-30k and not comparable" in drawing.caption
    assert "Not drawn: 1 of ours, whose features are not 2,048 wide." in drawing.caption
    (row,) = (line for line in drawing.table.splitlines() if "0.50" in line)
    assert "features=64 (not 2048)" in row
    assert "not drawn" in row
    plain = FIGURES["2"](Request(tmp_path / "none")).caption
    assert "ollow" not in plain
    assert "of ours" not in plain


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    evaluated(tmp_path, 21.5)
    (path,) = tmp_path.glob("*/*/evaluations/*/coco.json")
    path.write_text(json.dumps({"fid": 3.0}))
    with pytest.raises(ValueError, match=r"coco\.json cannot be read: KeyError"):
        own_systems(tmp_path.glob("*/*"))


def test_figure_2_needs_no_run_but_missing_runs_are_still_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert figures(["--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--figure", "2"]) == 0
    assert "arXiv:2206.10789" in capsys.readouterr().out
    assert figures(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no run" in capsys.readouterr().err


def test_a_damaged_table_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    head = "name,released,family,fid,stated_by,source,note\n"
    path.write_text(f"{head}A,2021-01-01,painting,3,authors,arXiv:1,\n")
    with pytest.raises(ValueError, match="line 2 cannot be read: family 'painting'"):
        published_systems(path)
    path.write_text(f"{head}A,2021-01-01,diffusion,3,rumour,arXiv:1,\n")
    with pytest.raises(ValueError, match="stated_by 'rumour'"):
        published_systems(path)
