"""Remedies against forgetting: increase of text loss against image loss, their Pareto front, and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from t2i_lm.comparison.comparability import ORDER, mismatches
from t2i_lm.plots.groups import Group
from t2i_lm.plots.pairing import newest_first
from t2i_lm.plots.panels import GREY, captioned_figure
from t2i_lm.runtime.tables import text_table
from t2i_lm.storage.run_folder import VAL, Run, run_folders

# Prefix of a remedy's experiment; the rest of the name is its arm.
PREFIX = "remedy_"
COMMAND = "python -m t2i_lm.remedies --text HELDOUT --replay TEXT"
UNTOUCHED = "pretrained"
# What a remedy may change; replayed text also changes the order of the data.
VARIED = ("freeze", "tune", "loss.text_weight", "distil.", "lora.", "optim.l2_sp", "data.replay_", ORDER)
# Okabe and Ito's palette, as in the other figures.
COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C99", "#8C8C00")
MARKERS = "sDv^P*X<>"


@dataclass(frozen=True)
class Point:
    """Held-out losses of a finished run, nats/token.

    Attributes:
        arm: `pretrained` or a remedy.
        text_increase: increase of the text loss by training, softmax over the text rows.
        text_increase_se: its standard error, from paired differences.
        image: loss of image tokens.
        step: step of the image loss.
        split: validation split of the image loss; empty where there is one validation set.
    """

    arm: str
    text_increase: float
    text_increase_se: float
    image: float
    step: int
    split: str = ""

    @property
    def label(self) -> str:
        """The arm in words."""
        return "pre-trained, untouched" if self.arm == UNTOUCHED else self.arm.replace("_", " ")


def remedy_group(root: Path) -> Group:
    """The untouched pre-trained arm and every remedy with a run below `root`."""
    names = sorted({name for folder in run_folders(root) if (name := folder.parent.name).startswith(PREFIX)})
    remedies = {name.removeprefix(PREFIX): name for name in names}
    return Group({UNTOUCHED: "t2i_pretrained", **remedies}, COMMAND, records="forgetting", varied=VARIED)


def point_of(arm: str, run: Run) -> Point:
    """The point of a run's last validation and last forgetting measurement.

    Raises:
        ValueError: if the run has no validation, or no forgetting measurement before training.
    """
    lines, validations = run.records("forgetting"), run.validations()
    entry = lines[-1]["forgetting"]["text"].get("text_rows", {}) if lines else {}
    if "change" not in entry or not validations:
        raise ValueError(f"{run.folder} has no change of held-out text loss or no validation; to make it: {COMMAND}")
    split = next(iter(run.validation_splits), "")
    return Point(arm, entry["change"], entry["change_se"], image_loss(run), validations[-1]["step"], split)


def scratch_run(root: Path, partner: Run) -> Run | None:
    """The newest finished run from random weights that agrees with `partner`; None without one."""
    runs = newest_first(root, "t2i_scratch")
    return next((run for run in runs if run.validations() and run.report and not mismatches(partner, run)), None)


def image_loss(run: Run) -> float:
    """Held-out loss of image tokens at the last validation, of the primary split."""
    return float(run.validations()[-1][VAL]["image"]["nll"])


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other point beats in both losses, by increase of the text loss."""
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.text_increase, one.image)):
        if not front or point.image < front[-1].image:
            front.append(point)
    return front


def tradeoff_table(points: Sequence[Point], scratch: float | None) -> str:
    """Every arm's increase of text loss, its image loss, and the distance of that from the untouched arm's."""
    base = next(point for point in points if point.arm == UNTOUCHED)
    best = pareto_front(points)
    rows = [
        (
            point.label,
            f"{point.text_increase:.4f}",
            f"{point.text_increase_se:.4f}",
            f"{point.image:.4f}",
            f"{point.image - base.image:+z.4f}",
            "*" if point in best else "",
            f"{point.step:,}",
        )
        for point in points
    ]
    if scratch is not None:
        rows.append(("random initialization", "", "", f"{scratch:.4f}", f"{scratch - base.image:+z.4f}", "", ""))
    validation = f"{base.split} image validation".strip()
    header = ("nll (nats/token)", "text increase", "+-", validation, "- untouched", "front", "step")
    return text_table(header, rows)


def draw_tradeoff(points: Sequence[Point], caption: str, scratch: float | None) -> Figure:
    """Scatter of image loss (y) by increase of text loss (x, with standard errors): down and left is better.

    Points carry a gid of the form `tradeoff/ARM`.

    Args:
        points: one per arm.
        caption: text under the axes.
        scratch: image loss from random weights, plotted as a horizontal line.
    """
    with captioned_figure(caption) as figure:
        axes = figure.subplots()
        best = pareto_front(points)
        axes.plot(
            [point.text_increase for point in best],
            [point.image for point in best],
            color=GREY,
            linewidth=1.1,
            drawstyle="steps-post",  # between two points of the front only their corner is known to be reachable
            gid="tradeoff/front",
            zorder=1.5,
            label="Pareto front",
        )
        if scratch is not None:
            axes.axhline(
                scratch,
                color=GREY,
                linestyle="--",
                linewidth=1.1,
                gid="tradeoff/scratch",
                label="random initialization",
            )
        for number, point in enumerate(points):
            untouched = point.arm == UNTOUCHED
            axes.errorbar(
                [point.text_increase],
                [point.image],
                xerr=[point.text_increase_se],
                color="#0072B2" if untouched else COLORS[number % len(COLORS)],
                marker="o" if untouched else MARKERS[number % len(MARKERS)],
                markersize=8,
                linestyle="none",
                gid=f"tradeoff/{point.arm}",
                label=point.label,
                zorder=4,
            )
        axes.margins(0.12)
        axes.set_xlabel("increase of held-out text loss by training (nats/token, text rows)")
        split = f", {points[0].split}" if points[0].split else ""
        axes.set_ylabel(f"held-out image loss{split} (nats/token)")
        axes.set_title("down: lower image loss; left: less forgetting", loc="left", fontsize=9, fontweight="normal")
        figure.legend(loc="outside upper center", ncols=4)
    return figure


def probe_table(arms: Mapping[str, Run]) -> str:
    """Every probe's value before and after training, and its paired change with standard error."""
    rows = []
    for arm, run in arms.items():
        first, last = (run.records("forgetting")[place]["forgetting"] for place in (0, -1))
        entries = [(name, last[name], first.get(name, {})) for name in ("text", "second_text") if name in last]
        entries += [(name, last["tasks"][name], first["tasks"].get(name, {})) for name in last["tasks"]]
        for name, after, before in entries:
            for key, entry in after.items():
                if not isinstance(entry, dict) or key not in before or key == "floors":
                    continue
                unit = "nll" if "nll" in entry else "accuracy"
                change, error = entry.get("change", math.nan), entry.get("change_se", math.nan)
                values = f"{before[key][unit]:.4f}", f"{entry[unit]:.4f}", f"{change:+z.4f}", f"{error:.4f}"
                rows.append((f"{arm}, {name} {key} {unit}", *values))
    return text_table(("arm, probe", "before", "after", "change", "+-"), rows)
