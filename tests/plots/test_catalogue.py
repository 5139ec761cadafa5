"""Figures 3 and 4: lines equal to metrics.jsonl, captions, floors, axes and files."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from t2i_lm.plots import panels
from t2i_lm.plots.catalogue import FIGURES, RenderedFigure, Request, write_figures
from t2i_lm.plots.panels import AXES_HEIGHT, WIDTH
from t2i_lm.runtime.tables import compact
from tests.plots.synthetic_runs import read_lines, write_run

ROOT = Path(__file__).parents[2]
MODALITIES = {"3": {"All tokens": "all"}, "4": {"Text tokens": "text", "Image tokens": "image"}}


def drawn(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Data of every line by its gid."""
    lines = (line for axes in figure.axes for line in axes.get_lines())
    return {str(line.get_gid()): (floats(line.get_xdata()), floats(line.get_ydata())) for line in lines}


def floats(data: Any) -> list[float]:
    """Line data as plain numbers."""
    return [float(value) for value in data]


def panel_of(axes: Axes) -> str:
    """A panel's title."""
    return axes.get_title("left")


def texts(figure: Figure) -> str:
    """All text of a figure, with line breaks as spaces."""
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    notes = [text for axes in figure.axes for text in (*axes.texts, *axes.findobj(Text))]
    return " ".join(text.get_text() for text in [*legends, *notes, *figure.texts]).replace("\n", " ")


@pytest.mark.parametrize("number", MODALITIES)
def test_the_files_are_sharp_wide_and_not_blank(
    number: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "DPI", 300)
    png, pdf = FIGURES[number](Request(runs)).save(tmp_path / "figure")
    with Image.open(png) as image:
        assert image.width == WIDTH * 300
        assert image.height > AXES_HEIGHT * 300
        assert image.info["dpi"][0] == pytest.approx(300, abs=0.1)
        pixels_HW3 = np.asarray(image.convert("RGB")).astype(int)
    ink_HW = np.asarray(pixels_HW3.min(axis=-1) < 250)
    assert 0.02 < ink_HW.mean() < 0.5
    assert not ink_HW[:, :4].any() and not ink_HW[:, -4:].any()  # noqa: PT018
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both arms can be seen
        assert (abs(pixels_HW3 - color).max(axis=-1) < 8).sum() > 1000
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content  # TrueType, embedded
    assert b"/Type3" not in content


@pytest.mark.parametrize("number", MODALITIES)
def test_drawn_lines_equal_the_metrics_file(number: str, runs: Path) -> None:
    lines = drawn(FIGURES[number](Request(runs)).figure)
    for panel, modality in MODALITIES[number].items():
        for arm in ("pretrained", "scratch"):
            folder = next((runs / f"t2i_{arm}").iterdir())
            train, val = read_lines(folder, "train"), read_lines(folder, "val")
            tokens = [line["tokens_nominal"] for line in train]
            raw = [line["train"][modality]["ppl"] for line in train]
            smooth = [line["train"][modality]["ppl_ema"] for line in train]
            held = [line["val"][modality]["ppl"] for line in val]
            assert lines.pop(f"{panel}/{arm}/raw") == (tokens, raw)
            assert lines.pop(f"{panel}/{arm}/ema") == (tokens, smooth)
            assert lines.pop(f"{panel}/{arm}/val") == (
                [line["tokens_nominal"] for line in val],
                held,
            )
    assert set(lines) <= {"Text tokens/floor"}


def test_raw_curves_are_thin_and_averages_thick_in_the_color_of_the_arm(runs: Path) -> None:
    for number in MODALITIES:
        for axes in FIGURES[number](Request(runs)).figure.axes:
            looks = {str(line.get_gid()).partition("/")[2]: line for line in axes.get_lines()}
            for arm, color in (("pretrained", "#0072B2"), ("scratch", "#D55E00")):
                raw, ema = looks[f"{arm}/raw"], looks[f"{arm}/ema"]
                assert raw.get_color() == ema.get_color() == color
                assert 2 * raw.get_linewidth() < ema.get_linewidth()
                assert (raw.get_alpha() or 1) < 0.5
                assert looks[f"{arm}/val"].get_marker() in ("o", "s")


def test_the_text_floor_is_a_dashed_line_in_the_text_panel_alone(runs: Path) -> None:
    figure = FIGURES["4"](Request(runs)).figure
    floors = [
        (axes.get_title("left"), line)
        for axes in figure.axes
        for line in axes.get_lines()
        if "floor" in str(line.get_gid())
    ]
    ((panel, line),) = floors
    assert (panel, line.get_linestyle()) == ("Text tokens", "--")
    assert floats(line.get_ydata()) == pytest.approx([math.exp(1.0043)] * 2)
    assert "floor, the captions' entropy: 2.73" in texts(figure)
    assert "floor" not in texts(FIGURES["3"](Request(runs)).figure)


def test_both_validation_splits_are_drawn_and_named(tmp_path: Path) -> None:
    for name in ("t2i_pretrained", "t2i_scratch"):
        write_run(tmp_path, name, splits=("iid", "compositional"))
    drawing = FIGURES["4"](Request(tmp_path))
    lines = drawn(drawing.figure)
    looks = {str(line.get_gid()): line for axes in drawing.figure.axes for line in axes.get_lines()}
    for panel, modality in MODALITIES["4"].items():
        for arm in ("pretrained", "scratch"):
            records = read_lines(next((tmp_path / f"t2i_{arm}").iterdir()), "val/iid")
            for split, gid in (("iid", "val"), ("compositional", "val/compositional")):
                held = [line[f"val/{split}"][modality]["ppl"] for line in records]
                assert lines[f"{panel}/{arm}/{gid}"] == ([line["tokens_nominal"] for line in records], held)
            hollow, filled = looks[f"{panel}/{arm}/val/compositional"], looks[f"{panel}/{arm}/val"]
            assert (hollow.get_fillstyle(), filled.get_fillstyle()) == ("none", "full")
    assert floats(looks["Image tokens/floor"].get_ydata()) == pytest.approx([math.exp(0.1)] * 2)
    words = texts(drawing.figure)
    assert "validation, iid validation, compositional" in words
    assert "iid, new images of trained color-shape pairs (filled); compositional, color-shape pairs" in drawing.caption
    assert "Upper right: iid validation at step 300" in drawing.caption
    assert drawing.table.startswith("iid validation at step 300")
    assert "\ncompositional validation at step 300" in drawing.table


def test_no_floor_is_drawn_where_no_report_gives_one(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained", floor=None)
    write_run(tmp_path, "t2i_scratch", finished=False)
    figure = FIGURES["4"](Request(tmp_path)).figure
    assert not [gid for gid in drawn(figure) if "floor" in gid]
    assert "floor" not in texts(figure)


def test_the_caption_states_what_the_figure_shows(runs: Path) -> None:
    for number in MODALITIES:
        drawing = FIGURES[number](Request(runs))
        assert " ".join(texts(drawing.figure).split()).endswith(drawing.caption)
        for words in (
            f"Figure {number}.",
            "Scale demo, seed 0, learning rate 0.002, backbone lm_rotary",
            "300 steps and 1.23M tokens (971k without pads) in each arm",
            "2026-03-01",
            "procedural scenes, 20,000 training pairs, hash 0123456789abcdef",
            "EMA: constant 0.95, updated every 5 steps",
            "about 95 steps behind the raw loss",
            "validation at step 300, gap in percent of random",
            "paper's data (HQITP-134M) are private: these are other data at another size",
        ):
            assert words in drawing.caption
        for panel, modality in MODALITIES[number].items():
            mine, other = (
                read_lines(next((runs / f"t2i_{arm}").iterdir()), "val")[-1]["val"][modality]["ppl"]
                for arm in ("pretrained", "scratch")
            )
            (axes,) = (axes for axes in drawing.figure.axes if panel_of(axes) == panel)
            note = f"pre-trained {mine:.3f}\nrandom {other:.3f} (gap {100 * (mine / other - 1):+.1f} %)"
            assert axes.get_title("right") == note
        assert "UNFINISHED" not in drawing.caption
        assert "NOT CONTROLLED" not in drawing.caption


@pytest.mark.parametrize("number", MODALITIES)
def test_nothing_written_leaves_the_figure_or_covers_the_caption(number: str, tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained", finished=False, steps=200, config={"optim.lr": 0.001})
    write_run(tmp_path, "t2i_scratch", finished=False, steps=140)
    figure = FIGURES[number](Request(tmp_path)).figure
    figure.set_dpi(100)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [text.get_window_extent() for text in figure.texts]
    plots = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
    for box in (*boxes, *plots):
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y0 >= 0
        assert box.y1 <= height
    assert all(box.y0 >= figure.texts[0].get_window_extent().y1 for box in plots)
    written = [
        text
        for axes in figure.axes
        for text in axes.findobj(Text)
        if isinstance(text, Text) and text.get_text().startswith((panel_of(axes), "pre-trained"))
    ]
    assert len(written) == 2 * len(figure.axes)
    for one, two in itertools.combinations([text.get_window_extent() for text in written], 2):
        assert not one.overlaps(two)


def test_other_data_sources_are_named_without_their_folders(tmp_path: Path) -> None:
    for name in ("t2i_pretrained", "t2i_scratch"):
        config = {"data.source": "image_folder", "data.path": "/home/someone/flickr8k"}
        write_run(tmp_path, name, config={**config, "scale": "flickr8k"})
    caption = FIGURES["3"](Request(tmp_path)).caption
    assert "Data: image folder flickr8k, 20,000 training pairs" in caption
    assert "someone" not in caption


def test_an_unfinished_run_with_a_torn_line_is_drawn_and_labeled(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained")
    folder = write_run(tmp_path, "t2i_scratch", steps=140, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 145, "samples": 46')
    drawing = FIGURES["4"](Request(tmp_path))
    assert "random initialization (unfinished)" in texts(drawing.figure)
    assert "pre-trained (unfinished)" not in texts(drawing.figure)
    assert "UNFINISHED: random at step 140 of 300." in drawing.caption
    assert "pre-trained: 300 steps and 1.23M tokens" in drawing.caption
    assert len(drawn(drawing.figure)["Text tokens/scratch/raw"][0]) == 28
    # The arms are compared where both have been validated.
    assert drawing.table.startswith("validation at step 100 ")


def test_arms_without_a_common_validation_have_no_table(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained")
    folder = write_run(tmp_path, "t2i_scratch", steps=50, finished=False)
    lines = [json.dumps(line) + "\n" for line in read_lines(folder, "train")]
    (folder / "metrics.jsonl").write_text("".join(lines))
    drawing = FIGURES["4"](Request(tmp_path))
    assert drawing.table == "no validation that both arms have reached"
    assert "Upper right" not in drawing.caption
    assert "(gap" not in texts(drawing.figure)


def test_an_uncontrolled_pair_is_labeled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {"optim.lr": 0.001, "data.path": "/elsewhere", "trainer.threads": 4, "run.dir": "r"}
    write_run(tmp_path, "t2i_pretrained", config=changed)
    folder = write_run(tmp_path, "t2i_scratch")
    environment = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps({**environment, "stream_hash": "c" * 64}))
    rendered = FIGURES["3"](Request(tmp_path))
    expected = "optim.lr: 0.001 and 0.002; order of the data: bbbbbbbbbbbb and cccccccccccc."
    sentence = f"NOT CONTROLLED, the arms (pre-trained and random) also differ in {expected}"
    assert rendered.uncontrolled == [sentence]
    assert rendered.table.endswith(f"t2i_scratch/{folder.name}")
    assert write_figures(Request(tmp_path), tmp_path / "out", ["3", "4"]) == 0
    assert capsys.readouterr().err == f"note: figure 3 and figure 4: {sentence}\n"


def test_a_modality_that_an_interval_lacks_leaves_a_gap_in_the_curve(runs: Path) -> None:
    folder = next((runs / "t2i_scratch").iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[3]["train"]["text"] = {"nll_sum": 0.0, "count": 0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = drawn(FIGURES["4"](Request(runs)).figure)
    missing = set(data["Image tokens/scratch/raw"][0]) - set(data["Text tokens/scratch/raw"][0])
    assert missing == {lines[3]["tokens_nominal"]}


def test_a_diverged_run_leaves_the_other_readable(runs: Path, tmp_path: Path) -> None:
    folder = next((runs / "t2i_scratch").iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-2]["train"]["all"] |= {"nll": 700.0, "ppl": math.exp(700)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawing = FIGURES["3"](Request(runs))
    assert drawing.figure.axes[0].get_ylim()[1] < 1e11
    assert drawing.save(tmp_path / "figure3")[0].stat().st_size > 10_000


def test_perplexities_close_together_get_a_linear_axis(runs: Path, tmp_path: Path) -> None:
    assert {axes.get_yscale() for axes in FIGURES["4"](Request(runs)).figure.axes} == {"log"}
    for name in ("t2i_pretrained", "t2i_scratch"):
        folder = write_run(tmp_path / "late", name)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        late = [line for line in lines if line["step"] > 200]
        for line in late:
            line.get("train", {}).get("image", {}).update(ppl_ema=6.0)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in late))
    image = FIGURES["4"](Request(tmp_path / "late")).figure.axes[1]
    assert image.get_yscale() == "linear"


def test_the_step_axis_agrees_with_the_token_axis(runs: Path) -> None:
    drawing = FIGURES["3"](Request(runs))
    axes = drawing.figure.axes[0]
    (steps,) = axes.child_axes
    drawing.figure.draw_without_rendering()
    last = read_lines(next((runs / "t2i_scratch").iterdir()), "train")[-1]
    ratio = axes.get_xlim()[1] / steps.get_xlim()[1]
    assert ratio == pytest.approx(last["tokens_nominal"] / last["step"])
    at_steps = steps.transData.transform((last["step"] / 2, 0))[0]
    at_tokens = axes.transData.transform((last["tokens_nominal"] / 2, 1))[0]
    assert at_steps == pytest.approx(at_tokens)


def test_arms_of_unequal_batch_have_no_step_axis(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained", config={"data.batch_size": 64})
    write_run(tmp_path, "t2i_scratch")
    drawing = FIGURES["3"](Request(tmp_path))
    assert drawing.figure.axes[0].child_axes == []
    assert "data.batch_size: 64 and 32" in drawing.caption


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    def files(drawing: RenderedFigure, stem: str) -> list[bytes]:
        return [path.read_bytes() for path in drawing.save(tmp_path / stem)]

    assert files(FIGURES["4"](Request(runs)), "a") == files(FIGURES["4"](Request(runs)), "b")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0"), (950, "950"), (1000, "1k"), (350_000, "350k"), (1.25e6, "1.25M"), (1e11, "100B")],
)
def test_counts_are_written_with_the_usual_suffixes(number: float, expected: str) -> None:
    assert compact(number) == expected
    assert [compact(one) for one in (999_499, 999_936, 999_999_999)] == ["999k", "1M", "1B"]
