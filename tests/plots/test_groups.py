"""Figures of more than two arms: every arm that agrees with the reference, and who is missing."""

from pathlib import Path

import pytest

from t2i_lm.figures import FIGURE5, FIGURES, Request
from t2i_lm.figures import main as figures
from tests.plots.synthetic_runs import read_lines, write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for hour, name in enumerate(FIGURE5.experiments.values()):
        write_run(root, name, f"20260301-{hour + 10}0000")
    return root


def test_every_arm_is_drawn_as_logged(runs: Path) -> None:
    drawing = FIGURES["5"](Request(runs))
    lines = {str(line.get_gid()): line for axes in drawing.figure.axes for line in axes.get_lines()}
    for arm, name in FIGURE5.experiments.items():
        logged = read_lines(next((runs / name).iterdir()), "train")
        raw = [line["train"]["image"]["nll"] for line in logged]
        averages = [line["train"]["image"]["nll_ema"] for line in logged]
        assert [float(y) for y in lines[f"Image tokens/{arm}/raw"].get_ydata()] == raw
        assert [float(y) for y in lines[f"Image tokens/{arm}/ema"].get_ydata()] == averages
        assert arm in drawing.table
    assert drawing.figure.axes[0].get_ylabel() == "loss (nats/token)"
    assert "NOT RUN" not in drawing.caption
    assert "demo" in drawing.caption


def test_a_missing_and_a_foreign_arm_are_left_out_and_said(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    for hour, name in enumerate(["uncond_scratch", "uncond_pretrained"]):
        write_run(foreign, name, f"20260301-{hour + 10}0000")
    write_run(foreign, "uncond_tune_ffn", "20260301-130000", config={"seed": 1})
    drawing = FIGURES["5"](Request(foreign))
    assert "NOT RUN: tune_embed, tune_norm, tune_first_half, tune_ffn." in drawing.caption
    assert "tune_ffn" not in drawing.table


def test_without_partners_the_command_that_makes_them_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, "uncond_scratch")
    with pytest.raises(ValueError, match="ablate --all"):
        FIGURES["5"](Request(tmp_path))


def test_all_figures_are_those_whose_runs_are_there(runs: Path, tmp_path: Path) -> None:
    assert figures(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"figure{number}.{suffix}" for number in (2, 5) for suffix in ("png", "pdf")
    }
    assert figures(["--runs", str(runs), "--out", str(tmp_path / "out"), "--figure", "3"]) == 2


def test_initializations_are_drawn_beside_both_arms(tmp_path: Path) -> None:
    for name in ("t2i_scratch", "t2i_pretrained", "t2i_shuffled"):
        write_run(tmp_path, name)
    drawing = FIGURES["inits"](Request(tmp_path))
    gids = {str(line.get_gid()) for axes in drawing.figure.axes for line in axes.get_lines()}
    assert {f"{panel} tokens/{arm}/ema" for panel in ("Text", "Image") for arm in ("scratch", "shuffled")} <= gids
    assert "NOT RUN: embeddings_only, body_only, aligned." in drawing.caption
    assert drawing.table.splitlines()[1].startswith("scratch")


def test_a_pair_alone_is_no_figure_of_initializations(tmp_path: Path) -> None:
    for name in ("t2i_scratch", "t2i_pretrained"):
        write_run(tmp_path, name)
    with pytest.raises(ValueError, match="NAME one of shuffled"):
        FIGURES["inits"](Request(tmp_path))


def test_a_legend_of_many_arms_is_not_cut_off(tmp_path: Path) -> None:
    names = ("scratch", "pretrained", "shuffled", "body_only", "embeddings_only", "aligned")
    for hour, name in enumerate(names):
        write_run(tmp_path, f"t2i_{name}", f"20260301-{hour + 10}0000")
    figure = FIGURES["inits"](Request(tmp_path)).figure
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names) + 3
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
