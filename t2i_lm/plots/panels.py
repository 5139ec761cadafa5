"""Plots of training curves: pure functions from series to a matplotlib Figure.

Figures are made without pyplot, which would need a display and keep global state.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from t2i_lm.comparison.comparability import MissingRunsError
from t2i_lm.plots.curves import Series
from t2i_lm.runtime.tables import compact
from t2i_lm.storage.writing import atomic_file


@dataclass(frozen=True)
class ArmStyle:
    """Label, color, marker and dashes of an arm, the same in every figure."""

    label: str
    color: str
    marker: str
    dashes: str | tuple[float, Sequence[float]] = "solid"


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a series per arm, an optional horizontal line (`floor`), and dotted ones (`lines`) by label."""

    title: str
    series: Mapping[str, Series]
    floor: float | None = None
    floor_label: str = ""
    note: str = ""
    unit: str = "perplexity"
    axis: str = "tokens seen (pads included)"
    lines: Mapping[str, float] = field(default_factory=dict)


GREY = "#555555"
# Okabe and Ito's palette, safe for the common color blindnesses. The random arm is dashed and drawn last: where curves
# coincide, the other one stays visible between its dashes.
ARM_STYLES = {
    "pretrained": ArmStyle("pre-trained", "#0072B2", "o"),
    "scratch": ArmStyle("random initialization", "#D55E00", "s", (0, (2.2, 1.3))),
    # Figure 5: the trainable part of the pre-trained model.
    "tune_embed": ArmStyle("(1) embedding + output", "#CC79A7", "v"),
    "tune_norm": ArmStyle("(2) = (1) + norms", "#E69F00", "^"),
    "tune_first_half": ArmStyle("(3) = (2) + first half", "#56B4E9", "D"),
    "tune_ffn": ArmStyle("(4) = (2) + feed-forward", "#009E73", "P"),
    # Figure 6, and text-to-image between pre-trained and random.
    "align": ArmStyle("own captions", "#0072B2", "o"),
    "align_shuffled": ArmStyle("other images' captions", "#D55E00", "s", (0, (2.2, 1.3))),
    "aligned": ArmStyle("pre-trained, aligned image rows", "#009E73", "P"),
    "gaussian": ArmStyle("pre-trained mean and deviation only", "#0072B2", "<", (0, (1, 1))),
    "mimetic": ArmStyle("the same, with attention structure", "#009E73", ">", (0, (4, 1))),
    "shuffled": ArmStyle("pre-trained, entries shuffled", "#CC79A7", "v"),
    "body_only": ArmStyle("pre-trained body only", "#E69F00", "^"),
    "embeddings_only": ArmStyle("pre-trained rows only", "#56B4E9", "D"),
    # Controls of relearning.
    "language_model": ArmStyle("the language model, before images", "#009E73", "P"),
    "random_weights": ArmStyle("random weights, no training", "#555555", "v"),
}
# Of arms without a row: 7 colors and 8 markers, 56 looks.
COLORS, MARKERS = tuple(dict.fromkeys(style.color for style in ARM_STYLES.values())), "osv^DPX<"
LEGEND_COLUMNS = 5
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same letters on every machine
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.9,
    "legend.columnspacing": 1.3,
    "pdf.fonttype": 42,  # TrueType, embedded: text stays text
    "text.parse_math": False,  # captions and names are of users: a `$` in them begins no formula
}
WIDTH, AXES_HEIGHT = 8.0, 4.0  # inches
CAPTION = "caption"  # gid of a figure's caption
CAPTION_SIZE, CAPTION_COLUMNS = 8.5, 124  # points; characters per line that fit WIDTH
LINE_HEIGHT = CAPTION_SIZE * 1.3 / 72  # inches
DPI = 300
# Least ratio of the largest to the smallest value for a logarithmic axis.
LOG_RATIO = 3.0
# Upper limit of the axes: a diverged run leaves them at the top instead of flattening the other curves.
CEILING = 1e9


def arm_style(arm: str) -> ArmStyle:
    """The style of an arm; grey, labeled by its name, for an arm without a row in ARM_STYLES."""
    return ARM_STYLES.get(arm) or ArmStyle(arm.replace("_", " "), GREY, "X")


def arm_styles(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """The styles of the arms of a figure; those without a row in ARM_STYLES differ in color and marker."""
    names = dict.fromkeys(arms)
    taken = {ARM_STYLES[arm].color for arm in names if arm in ARM_STYLES}
    free = [number for number, color in enumerate(COLORS) if color not in taken] or [*range(len(COLORS))]
    styles = {arm: arm_style(arm) for arm in names}
    for place, arm in enumerate(arm for arm in names if arm not in ARM_STYLES):
        number = free[place % len(free)] + len(COLORS) * (place // len(free))
        styles[arm] = numbered_style(styles[arm].label, number)
    return styles


def numbered_style(label: str, number: int) -> ArmStyle:
    """The style of one of several curves that are no arms of ARM_STYLES."""
    return ArmStyle(label, COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])


def draw_panels(
    panels: Sequence[Panel],
    caption: str,
    labels: Mapping[str, str] | None = None,
    smoothing: str = "",
    tokens_per_step: float | None = None,
    splits: Sequence[str] = (),
) -> Figure:
    """Curves side by side: one pair of axes per panel, legend above, caption below.

    Lines carry a gid of the form `panel/arm/raw|ema|val`, or `panel/arm/val/SPLIT` of a further validation split.

    Args:
        panels: from left to right, with the same arms.
        caption: text under the axes, which `save_figure` also stores in the files' metadata.
        labels: legend text by arm, where it is not the arm's usual label.
        smoothing: legend text of the thick curves; empty where curves only join measured points.
        splits: names of the validation splits, the primary one first; empty where there is one validation set.
        tokens_per_step: adds an upper axis of optimizer steps; None where the arms differ in it.
    """
    with captioned_figure(caption) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, panel, tokens_per_step)
            if len(panels) > 2:
                axes.xaxis.set_major_locator(MaxNLocator(3))
        place_legend(figure, _legend(panels[0].series, labels or {}, smoothing, splits))
    return figure


def place_legend(figure: Figure, handles: list[Line2D]) -> None:
    """Places the legend above the axes in as many columns as fit."""
    for columns in range(min(len(handles), LEGEND_COLUMNS), 0, -1):
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


@contextmanager
def captioned_figure(caption: str, axes_height: float = AXES_HEIGHT) -> Iterator[Figure]:
    """An empty figure in the suite's style; the block adds axes, `axes_height` inches high, above the caption."""
    lines = textwrap.wrap(caption, CAPTION_COLUMNS, break_on_hyphens=False)
    below = len(lines) * LINE_HEIGHT + 0.12
    height = axes_height + below
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(rect=(0, below / height, 1, 1 - below / height), wspace=0.06)  # type: ignore[call-arg]
        yield figure
        text = "\n".join(lines)
        size = {"fontsize": CAPTION_SIZE, "linespacing": 1.25}
        figure.text(0.012, below / height, text, va="top", ha="left", gid=CAPTION, **size)  # type: ignore[arg-type]


def remove_caption(figure: Figure) -> None:
    """Removes the caption of a `captioned_figure` and the room under it, for a page that has it as text."""
    for text in [text for text in figure.texts if text.get_gid() == CAPTION]:
        height, share = figure.get_figheight(), text.get_position()[1]
        text.remove()
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(rect=(0, 0, 1, 1))  # type: ignore[call-arg]
        figure.set_figheight(height * (1 - share))


def _draw_panel(axes: Axes, panel: Panel, tokens_per_step: float | None) -> None:
    """Draws thin raw curves below thick averages below validation markers."""
    styles = arm_styles(panel.series)
    for order, (arm, one) in enumerate(panel.series.items()):
        look, gid = styles[arm], f"{panel.title}/{arm}"
        axes.plot(
            one.tokens,
            one.raw,
            color=look.color,
            alpha=0.45,
            linewidth=0.9,
            gid=f"{gid}/raw",
            zorder=2,
        )
        axes.plot(
            one.tokens,
            one.ema,
            color=look.color,
            linewidth=2.2,
            linestyle=look.dashes,
            gid=f"{gid}/ema",
            zorder=3 + order,
        )
        if one.val:  # an unclipped line without points has no extent, and the layout would collapse
            axes.plot(
                one.val_tokens,
                one.val,
                color=look.color,
                linestyle="none",
                marker=look.marker,
                # The smaller marker comes last, inside the larger one: both show where they coincide.
                markersize=max(4.0, 7.5 - 2.5 * order),
                markeredgecolor="white",
                markeredgewidth=0.8,
                gid=f"{gid}/val",
                zorder=6 + order,
                clip_on=False,
            )
        for split, (tokens, values) in one.others.items():
            axes.plot(
                tokens,
                values,
                color=look.color,
                linestyle="none",
                marker=look.marker,
                # Around the marker of the primary split where both coincide.
                markersize=max(4.0, 7.5 - 2.5 * order) + 3.0,
                fillstyle="none",
                markeredgewidth=1.2,
                gid=f"{gid}/val/{split}",
                zorder=5.5 + order,
                clip_on=False,
            )
    if panel.floor is not None:
        axes.axhline(
            panel.floor,
            color=GREY,
            linestyle="--",
            linewidth=1.1,
            gid=f"{panel.title}/floor",
            zorder=1.5,
        )
    axes.set_title(panel.title, loc="left")
    # Beside the title, not among the curves, which may run anywhere in a short or a slow run.
    axes.set_title(panel.note, loc="right", fontsize=8.5, fontweight="normal", linespacing=1.3)
    _scale_y(axes, panel)
    if panel.floor is not None:
        axes.annotate(
            panel.floor_label,
            (1, panel.floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color=GREY,
        )
    for label, value in panel.lines.items():
        axes.axhline(value, color=GREY, linestyle=":", linewidth=1.1, gid=f"{panel.title}/{label}", zorder=1.5)
        axes.annotate(
            f"{label} {value:,.0f}" if value >= 100 else f"{label} {value:.3g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 1),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=GREY,
            zorder=9,
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel(panel.axis)
    axes.set_ylabel(panel.unit)
    if tokens_per_step:
        rate = tokens_per_step
        conversions: Any = (lambda tokens: tokens / rate, lambda steps: steps * rate)
        steps = axes.secondary_xaxis("top", functions=conversions)
        steps.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        steps.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        steps.set_xlabel("optimizer steps", fontsize=9, color=GREY)
        steps.tick_params(colors=GREY, labelsize=8.5)


def _scale_y(axes: Axes, panel: Panel) -> None:
    """Sets the scale, logarithmic from LOG_RATIO on, with round labels and room for the floor's."""
    values = [value for one in panel.series.values() for value in (*one.raw, *one.ema, *one.val)]
    values += [value for one in panel.series.values() for _, more in one.others.values() for value in more]
    if not values:
        raise MissingRunsError(f"{panel.title}: the runs have no such values")
    low, high = min(*values, CEILING), min(max(values), CEILING)
    for value in (*([] if panel.floor is None else [panel.floor]), *panel.lines.values()):
        low, high = min(low, value), max(high, value)
    below = 0.12 if panel.floor is not None else 0.06  # of the height
    if low <= 0 or high / low < LOG_RATIO:
        height = (high - low) or high
        axes.set_ylim(low - below * height, high + 0.06 * height)
        return
    decades = math.log10(high / low)
    axes.set_ylim(low / 10 ** (below * decades), high * 10 ** (0.06 * decades))
    axes.set_yscale("log")  # after the limits: autoscaling would overflow at a diverged value
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=100))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _legend(arms: Iterable[str], labels: Mapping[str, str], smoothing: str, splits: Sequence[str]) -> list[Line2D]:
    """Arms by color and dashes, then the meaning of thin and thick lines and of markers."""

    def key(label: str, **look: Any) -> Line2D:
        return Line2D([], [], label=label, **{"color": GREY, "linewidth": 2.2, **look})

    styles = arm_styles(arms)
    handles = [key(labels.get(arm, one.label), color=one.color, linestyle=one.dashes) for arm, one in styles.items()]
    if smoothing:
        handles += [key("raw", linewidth=0.9, alpha=0.6), key(smoothing)]
        for number, split in enumerate(splits or [""]):
            hollow = {"fillstyle": "none", "markeredgewidth": 1.2} if number else {}
            label = f"validation, {split}" if split else "validation"
            handles.append(key(label, linestyle="none", marker="o", markersize=6, **hollow))
    return handles


def save_figure(figure: Figure, stem: Path, title: str, caption: str) -> list[Path]:
    """Writes STEM.png and STEM.pdf and returns their paths; the same figure gives the same bytes.

    Raises:
        OSError: if a file cannot be written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    with rc_context(STYLE), atomic_file(png) as own_png, atomic_file(pdf) as own_pdf:
        figure.savefig(own_png, dpi=DPI, metadata={"Title": title, "Description": caption})
        figure.savefig(own_pdf, metadata={"Title": title, "Subject": caption, "CreationDate": None})
    return [png, pdf]
