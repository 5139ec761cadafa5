"""Figures of several arms: arms that agree with the reference, missing arms, uncontrolled differences."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.figures import main as figures
from t2i_lm.plots import catalogue
from t2i_lm.plots.captions import loss_table
from t2i_lm.plots.catalogue import FIGURES, Request, write_figures
from t2i_lm.plots.curves import Series
from t2i_lm.plots.groups import FIGURE5
from t2i_lm.plots.panels import Panel, draw_panels
from t2i_lm.storage.run_folder import read_run
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
    assert "NO RUN" not in drawing.caption
    assert "demo" in drawing.caption


def test_missing_and_mismatched_arms_are_left_out_and_named(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for hour, name in enumerate(["uncond_scratch", "uncond_pretrained"]):
        write_run(root, name, f"20260301-{hour + 10}0000")
    write_run(root, "uncond_tune_ffn", "20260301-130000", config={"seed": 1})
    drawing = FIGURES["5"](Request(root))
    assert "NO RUN OF THIS SETTING: tune_embed, tune_norm, tune_first_half, tune_ffn." in drawing.caption
    assert "tune_ffn" not in drawing.table


def test_without_partners_the_error_has_the_command_that_makes_them(tmp_path: Path) -> None:
    write_run(tmp_path, "uncond_scratch")
    with pytest.raises(ValueError, match="ablate --all"):
        FIGURES["5"](Request(tmp_path))


def test_by_default_figures_that_have_their_runs_are_written(runs: Path, tmp_path: Path) -> None:
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
    assert "NO RUN OF THIS SETTING: gaussian, mimetic, embeddings_only, body_only, aligned." in drawing.caption
    assert drawing.table.splitlines()[1].startswith("scratch")


def test_a_pair_alone_is_no_figure_of_initializations(tmp_path: Path) -> None:
    for name in ("t2i_scratch", "t2i_pretrained"):
        write_run(tmp_path, name)
    with pytest.raises(ValueError, match="NAME one of gaussian"):
        FIGURES["inits"](Request(tmp_path))


def test_a_legend_of_many_arms_is_not_cut_off(tmp_path: Path) -> None:
    names = ("scratch", "pretrained", "gaussian", "mimetic", "shuffled", "body_only", "embeddings_only", "aligned")
    for hour, name in enumerate(names):
        write_run(tmp_path, f"t2i_{name}", f"20260301-{hour + 10}0000")
    figure = FIGURES["inits"](Request(tmp_path)).figure
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names) + 3
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_an_arm_that_is_not_controlled_is_named(runs: Path) -> None:
    assert "NOT CONTROLLED" not in FIGURES["5"](Request(runs)).caption
    neutral = {"fid.interval": 100, "trainer.activation_checkpointing": True, "tune": "norm"}
    write_run(runs, "uncond_tune_norm", "20260302-100000", config=neutral)
    assert "NOT CONTROLLED" not in FIGURES["5"](Request(runs)).caption
    changed = {"optim.lr": 0.001, "data.batch_size": 64}
    write_run(runs, "uncond_tune_ffn", "20260302-110000", config=changed)
    folder = write_run(runs, "uncond_tune_norm", "20260302-120000", config={"optim.lr": 0.001, "freeze": ["ffn"]})
    environment = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps({**environment, "git": "c" * 40}))
    expected = (
        "NOT CONTROLLED, arms also differ from scratch in freeze: [] and ['ffn'] (tune_norm); "
        "data.batch_size: 32 and 64 (tune_ffn); optim.lr: 0.002 and 0.001 (tune_norm, tune_ffn). "
        "Code revisions: aaaaaaa, ccccccc."
    )
    assert expected in FIGURES["5"](Request(runs)).caption
    with pytest.raises(IncomparableError, match=r"optim.lr: scratch 0.002, .*tune_norm 0.001"):
        FIGURES["5"](Request(runs, strict=True))


@pytest.mark.parametrize(
    ("figure", "reference", "other", "designed"),
    [
        ("6", "align", "align_shuffled", {"align.shuffle_pairs": True}),
        ("inits", "t2i_scratch", "t2i_aligned", {"aligned_rows": "runs/align/x"}),
        ("forgetting", "t2i_pretrained", "t2i_scratch", {}),
        ("remedies", "t2i_pretrained", "remedy_l2_sp", {"optim.l2_sp": 10.0, "data.replay_ratio": 0.25}),
    ],
)
def test_differences_by_design_are_controlled(
    figure: str, reference: str, other: str, designed: dict[str, object], tmp_path: Path
) -> None:
    for name in dict.fromkeys((reference, "t2i_pretrained")):
        write_run(tmp_path, name, forgotten=1.0)
    write_run(tmp_path, other, "20260301-100000", config=designed, forgotten=1.0)
    assert "NOT CONTROLLED" not in FIGURES[figure](Request(tmp_path)).caption
    write_run(tmp_path, other, "20260302-100000", config={**designed, "optim.lr": 0.001}, forgotten=1.0)
    assert "in optim.lr: 0.002 and 0.001 (" in FIGURES[figure](Request(tmp_path)).caption


def test_an_arm_without_a_style_of_its_own_is_drawn_and_labeled() -> None:
    curve = Series([1.0, 2.0], [3.0, 2.0], [3.0, 2.5], [2.0], [2.0])
    arms = {"scratch": curve, "brand_new": curve}
    figure = draw_panels([Panel("Image tokens", arms)], "caption", smoothing="EMA 0.95")
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == ["random initialization", "brand new"]
    gids = {str(line.get_gid()) for line in figure.axes[0].get_lines()}
    assert "Image tokens/brand_new/ema" in gids


def test_strict_names_the_figures_that_it_refuses(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t2i_pretrained", "t2i_scratch"):
        write_run(runs, name)
    write_run(runs, "uncond_tune_ffn", "20260302-110000", config={"optim.weight_decay": 0.2})
    command = ["--runs", str(runs), "--out", str(runs.parent / "figures")]
    assert figures(command) == 0
    assert capsys.readouterr().err.startswith(
        "note: figure 5: NOT CONTROLLED, arms also differ from scratch in optim.w"
    )
    assert figures([*command, "--strict"]) == 2
    output, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert line.startswith("error: not drawn, figure 5: the runs differ in more than what is compared: optim.weight")
    assert "figure3.png" in output


def test_a_loss_that_is_not_finite_is_a_cell_of_its_table(tmp_path: Path) -> None:
    runs = {name: write_run(tmp_path, name) for name in ("t2i_pretrained", "t2i_shuffled")}
    file = runs["t2i_shuffled"] / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if "val" in line:
            line["val"]["image"] = {"count": 0, "nonfinite": 640}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = loss_table({name: read_run(run) for name, run in runs.items()}, "image")
    assert re.search(r"t2i_shuffled +not finite +300", table), table


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("env.json", None, "env.json is missing"),
        ("env.json", {"data_hash": ...}, "env.json has no data_hash"),
        ("config.yaml", {"seed": ...}, "config.yaml has no seed"),
        ("config.yaml", {"log": {"ema": 0.95}}, "config.yaml has no log.interval"),
        ("config.yaml", {"data": "scenes"}, "config.yaml: data=scenes: expected the keys of a section"),
    ],
)
def test_what_a_partial_run_folder_lacks_is_named_and_the_other_figures_are_drawn(
    file: str,
    changed: dict[str, Any] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_run(tmp_path, "align", config={"task": "align"}) / file
    content = yaml.safe_load(path.read_text())
    path.unlink()
    if changed is not None:
        kept = {key: value for key, value in (content | changed).items() if value is not ...}
        path.write_text(json.dumps(kept))
    monkeypatch.setattr(catalogue, "FIGURES", {name: FIGURES[name] for name in ("6", "2")})
    assert write_figures(Request(tmp_path), tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: not drawn, figure 6: {path.parent}/{message}\n"
    assert (tmp_path / "out" / "figure2.png").is_file()
