"""What a remedy keeps of the language and what it costs: points, their Pareto front, the figure and the tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from t2i_lm.plots.curves import Series, mismatches
from t2i_lm.plots.pairing import Group
from t2i_lm.plots.panels import GREY, captioned_figure
from t2i_lm.storage.run_folder import Run, read_run, run_folders

# Experiments of this prefix are remedies; the rest of the name is the point's label.
PREFIX = "remedy_"
COMMAND = "python -m t2i_lm.remedies --text HELDOUT --replay TEXT"
UNTOUCHED = "pretrained"
# Okabe and Ito's palette, as in the other figures.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C99", "#8C8C00")
MARKERS = "sDv^P*X<>"


@dataclass(frozen=True)
class Point:
    """A finished run as what it lost and what it learnt, both on held-out data, nats/token.

    Attributes:
        arm: `pretrained` or a remedy.
        forgotten: rise of the text loss, renormalized to the text rows.
        forgotten_se: its standard error, of paired differences.
        image: loss of image tokens.
        step: of the image loss.
    """

    arm: str
    forgotten: float
    forgotten_se: float
    image: float
    step: int

    @property
    def label(self) -> str:
        """The arm in words."""
        return "pre-trained, untouched" if self.arm == UNTOUCHED else self.arm.replace("_", " ")


def remedy_group(root: Path) -> Group:
    """The untouched pre-trained arm and every remedy that has been run."""
    names = sorted({folder.parent.name for folder in run_folders(root, f"{PREFIX}*")})
    remedies = {name.removeprefix(PREFIX): name for name in names}
    return Group({UNTOUCHED: "t2i_pretrained", **remedies}, COMMAND, records="forgetting")


def point_of(arm: str, run: Run) -> Point:
    """A run's last validation and last measurement.

    Raises:
        ValueError: if the run has not measured forgetting from its beginning, or was not validated.
    """
    lines, validations = run.records("forgetting"), run.records("val")
    entry = lines[-1]["forgetting"]["text"].get("text_rows", {}) if lines else {}
    if "change" not in entry or not validations:
        raise ValueError(f"{run.folder} has no change of held-out text loss or no validation; to make it: {COMMAND}")
    last = validations[-1]
    return Point(arm, entry["change"], entry["change_se"], last["val"]["image"]["nll"], last["step"])


def scratch_of(root: Path, partner: Run) -> float | None:
    """Held-out image loss of the newest random-weights run that agrees with `partner`; None where there is none."""
    for folder in reversed(run_folders(root, "t2i_scratch")):
        try:
            run = read_run(folder)
        except (ValueError, OSError):
            continue
        if run.records("val") and run.report is not None and not mismatches(partner, run):
            return float(run.records("val")[-1]["val"]["image"]["nll"])
    return None


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both, from the least forgotten on."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.forgotten, one.image)):
        if not kept or point.image < kept[-1].image:
            kept.append(point)
    return kept


def tradeoff_table(points: Sequence[Point], scratch: float | None) -> str:
    """Every arm's text loss gained and image loss, and their distance from the untouched arm's, as text."""
    base = next(point for point in points if point.arm == UNTOUCHED)
    best = {point.arm for point in front(points)}
    head = f"{'nll (nats/token)':<26}{'text gained':>13}{'+-':>9}{'image validation':>18}{'- untouched':>13}"
    lines = [f"{head}{'front':>7}{'step':>9}"]
    for point in points:
        numbers = f"{point.forgotten:>13.4f}{point.forgotten_se:>9.4f}{point.image:>18.4f}"
        mark = "*" if point.arm in best else ""
        lines.append(f"{point.label:<26}{numbers}{point.image - base.image:>+z13.4f}{mark:>7}{point.step:>9,}")
    if scratch is not None:
        lines.append(f"{'random initialization':<26}{'':>22}{scratch:>18.4f}{scratch - base.image:>+z13.4f}")
    return "\n".join(lines)


def draw_tradeoff(points: Sequence[Point], caption: str, scratch: float | None) -> Figure:
    """Text loss gained (x, with standard errors) against image loss (y): down and left is better.

    Points carry a gid of the form `tradeoff/ARM`.

    Args:
        points: one an arm.
        caption: text under the axes.
        scratch: image loss from random weights, a horizontal line.
    """
    with captioned_figure(caption) as figure:
        axes = figure.subplots()
        best = front(points)
        axes.plot(
            [point.forgotten for point in best],
            [point.image for point in best],
            color=GREY,
            linewidth=1.1,
            drawstyle="steps-post",  # between two points of the front only its corner is known to be reachable
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
                [point.forgotten],
                [point.image],
                xerr=[point.forgotten_se],
                color="#0072B2" if untouched else COLOURS[number % len(COLOURS)],
                marker="o" if untouched else MARKERS[number % len(MARKERS)],
                markersize=8,
                linestyle="none",
                gid=f"tradeoff/{point.arm}",
                label=point.label,
                zorder=4,
            )
        axes.margins(0.12)
        axes.set_xlabel("held-out text loss gained in training (nats/token, text rows)")
        axes.set_ylabel("held-out image loss (nats/token)")
        axes.set_title("down: draws better; left: forgets less", loc="left", fontsize=9, fontweight="normal")
        figure.legend(loc="outside upper center", ncols=4)
    return figure


def text_series(run: Run, rows: str) -> Series:
    """Perplexity of held-out text at every measurement, against positions seen."""
    lines = [line for line in run.records("forgetting") if rows in line["forgetting"]["text"]]
    tokens = [line["tokens_nominal"] for line in lines]
    values = [line["forgetting"]["text"][rows]["ppl"] for line in lines]
    return Series(tokens, values, values, tokens, values)


def question_table(arms: Mapping[str, Run]) -> str:
    """What every probe said before and after, with standard errors of the paired change, as text."""
    lines = [f"{'arm, probe':<40}{'before':>10}{'after':>10}{'change':>10}{'+-':>9}"]
    for arm, run in arms.items():
        first, last = (run.records("forgetting")[place]["forgetting"] for place in (0, -1))
        entries = [("text", last["text"], first["text"])]
        entries += [(name, last["tasks"][name], first["tasks"].get(name, {})) for name in last["tasks"]]
        for name, after, before in entries:
            for key, entry in after.items():
                unit = "nll" if isinstance(entry, dict) and "nll" in entry else "accuracy"
                if not isinstance(entry, dict) or key not in before:
                    continue
                change, error = entry.get("change", math.nan), entry.get("change_se", math.nan)
                numbers = f"{before[key][unit]:>10.4f}{entry[unit]:>10.4f}{change:>+z10.4f}{error:>9.4f}"
                lines.append(f"{f'{arm}, {name} {key} {unit}':<40}{numbers}")
    return "\n".join(lines)
