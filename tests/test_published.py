"""Figure 2: published numbers with a source each, and our own evaluations."""

import json
from pathlib import Path

import pytest

from t2i_lm.figures import FIGURES, Request
from t2i_lm.figures import main as figures
from t2i_lm.published import own_systems, published_systems


def test_every_published_number_has_a_source_and_both_families_are_there() -> None:
    systems = published_systems()
    assert len({system.name for system in systems}) == len(systems) >= 10
    assert {system.family for system in systems} == {"auto-regressive", "diffusion"}
    assert all(system.source.startswith("arXiv:") and 4 < system.fid < 30 for system in systems)


def test_an_evaluation_is_drawn_under_the_title_of_its_card(tmp_path: Path) -> None:
    folder = tmp_path / "t2i_pretrained" / "20260301-100000-paper" / "evaluations" / "step-8"
    folder.mkdir(parents=True)
    result = {"run": "20260301-100000-paper", "title": "FID, n=10, not COCO FID-30k", "fid": 21.5}
    (folder / "coco.json").write_text(json.dumps(result | {"environment": {"finished": "2026-03-02T10:00:00"}}))
    assert own_systems(tmp_path)[0].name == "t2i_pretrained: FID, n=10, not COCO FID-30k"
    drawing = FIGURES["2"](Request(tmp_path))
    drawn = {str(line.get_gid()): line.get_ydata() for axes in drawing.figure.axes for line in axes.get_lines()}
    assert list(drawn["this suite"]) == [21.5]
    assert len(drawn["auto-regressive"]) + len(drawn["diffusion"]) == len(published_systems())


def test_figure_2_needs_no_run_but_does_not_hide_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert figures(["--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--figure", "2"]) == 0
    assert "arXiv:2206.10789" in capsys.readouterr().out
    assert figures(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no run" in capsys.readouterr().err


def test_a_damaged_table_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("name,released,family,fid,source,note\nA,2021-01-01,painting,3,arXiv:1,\n")
    with pytest.raises(ValueError, match="line 2 cannot be read: family 'painting'"):
        published_systems(path)
