"""Remedies against forgetting: increase of text loss against image loss, their Pareto front, and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2i_lm.comparison.comparability import ORDER, MissingRunsError, config_values, differences, mismatches
from t2i_lm.plots.groups import Group
from t2i_lm.plots.pairing import newest_first
from t2i_lm.plots.panels import GREY, captioned_figure
from t2i_lm.runtime.tables import known, text_table
from t2i_lm.storage.run_folder import VAL, Run, run_folders

# Prefix of a remedy's experiment; the rest of the name is its arm.
PREFIX = "remedy_"
COMMAND = "python -m t2i_lm.remedies --text HELDOUT --replay TEXT"
UNTOUCHED = "pretrained"
# What a remedy may change; replayed text also changes the order of the data.
VARIED = (
    *("freeze", "tune", "modality_experts", "loss.text_weight", "loss.replay_weight", "distil.", "lora."),
    *("optim.l2_sp", "optim.gradient_projection", "data.replay_", ORDER),
)
# Okabe and Ito's palette, as in the other figures, and for more arms Tol's muted one.
COLORS = (
    *("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C99", "#8C8C00"),
    *("#882255", "#44AA99", "#332288", "#AA4499", "#661100", "#6699CC"),
)
MARKERS = "sDv^P*X<>"
HEIGHT = 4.8  # of the axes, inches


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
        strength: of the remedy, where there are runs at several.
        texts: names of the held-out texts: one, or two of different domains.
        second_increase, second_increase_se: of the second text.
        pairs: caption-image pairs trained on; replayed text is none.
    """

    arm: str
    text_increase: float
    text_increase_se: float
    image: float
    step: int
    split: str = ""
    strength: str = ""
    texts: tuple[str, ...] = ("text",)
    second_increase: float = math.nan
    second_increase_se: float = math.nan
    pairs: int = 0

    @property
    def label(self) -> str:
        """The arm in words, without its strength."""
        return "pre-trained, untouched" if self.arm == UNTOUCHED else self.arm.replace("_", " ")

    @property
    def on_second_text(self) -> "Point":
        """The point with the second text's increase."""
        return replace(self, text_increase=self.second_increase, text_increase_se=self.second_increase_se)


def remedy_group(root: Path) -> Group:
    """The untouched pre-trained arm and every remedy with a run below `root`."""
    names = sorted({name for folder in run_folders(root) if (name := folder.parent.name).startswith(PREFIX)})
    remedies = {name.removeprefix(PREFIX): name for name in names}
    return Group({UNTOUCHED: "t2i_pretrained", **remedies}, COMMAND, records="forgetting", varied=VARIED)


def strengths(root: Path, arms: Mapping[str, Run]) -> dict[tuple[str, str], Run]:
    """The runs of a group's arms by arm and strength: of a remedy, the newest finished run of every strength.

    These agree with the arm's own run in all that a remedy does not change. Strengths are the values of the keys in
    which they differ, in order; empty where there is one run.
    """
    found: dict[tuple[str, str], Run] = {}
    for arm, newest in arms.items():
        settings: dict[tuple[Any, ...], Run] = {}
        candidates = [] if arm == UNTOUCHED else newest_first(root, newest.name, "forgetting")
        for run in (newest, *candidates):
            comparable = not mismatches(newest, run) and not differences((newest, run), VARIED)
            if run is newest or (run.report and comparable and not lacks_for_point(run)):
                settings.setdefault(tuple(_varied_values(run).items()), run)
        keys = [key for key in _varied_values(newest) if len({dict(values)[key] for values in settings}) > 1]
        ordered = sorted(settings.items(), key=lambda item: [dict(item[0])[key] for key in keys])
        firsts = {dict(values)[keys[0]] for values, _ in ordered} if keys else set()
        shown = keys[:1] if len(firsts) == len(ordered) else keys
        for values, run in ordered:
            found[arm, ", ".join(f"{dict(values)[key]:g}" for key in shown)] = run
    return found


def _varied_values(run: Run) -> dict[str, float]:
    """The strengths of a run's remedy: the numbers among what a remedy may change."""
    values = config_values(run)
    return {key: float(value) for key, value in values.items() if key.startswith(VARIED) and _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def lacks_for_point(run: Run) -> str:
    """What a run has not measured of `point_of`, in words; empty for a run that has a point."""
    if "change" not in _last_text_rows(run):
        return "it has no change of held-out text loss, which the first forgetting measurement after step 0 gives"
    return "" if run.validations() else "it has no validation"


def _last_text_rows(run: Run) -> dict[str, Any]:
    lines = run.records("forgetting")
    return dict(lines[-1]["forgetting"]["text"].get("text_rows", {})) if lines else {}


def point_of(arm: str, run: Run, strength: str = "") -> Point:
    """The point of a run's last validation and last forgetting measurement.

    Raises:
        ValueError: if the run has no validation, or no forgetting measurement before training.
    """
    if words := lacks_for_point(run):
        raise MissingRunsError(f"{run.folder}: {words}; to make it: {COMMAND}")
    entry, config = _last_text_rows(run), config_values(run)
    split, step = next(iter(run.validation_splits), ""), int(run.validations()[-1]["step"])
    measured = run.records("forgetting")[-1]["forgetting"]
    second = measured.get("second_text", {}).get("text_rows", {})
    texts = [key for key, there in (("text", True), ("second_text", "change" in second)) if there]
    return Point(
        arm,
        entry["change"],
        _or_nan(entry["change_se"]),
        image_loss(run),
        step,
        split,
        strength,
        tuple(str(measured[key].get("name", key.replace("_", " "))) for key in texts),
        second.get("change", math.nan),
        _or_nan(second.get("change_se")),
        round(step * config["data.batch_size"] * (1 - config["data.replay_ratio"])),
    )


def _or_nan(error: float | None) -> float:
    """A standard error, unknown of a single row of text."""
    return math.nan if error is None else error


def scratch_run(root: Path, partner: Run) -> Run | None:
    """The newest finished run from random weights that agrees with `partner`; None without one."""
    runs = newest_first(root, "t2i_scratch")
    return next((run for run in runs if run.validations() and run.report and not mismatches(partner, run)), None)


def image_loss(run: Run) -> float:
    """Held-out loss of image tokens at the last validation, of the primary split.

    Raises:
        ValueError: if some losses were not finite.
    """
    if run.nonfinite:
        raise ValueError(f"{run.folder} has {run.nonfinite_words}")
    return float(run.validations()[-1][VAL]["image"]["nll"])


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other point beats in both losses, by increase of the text loss."""
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.text_increase, one.image)):
        if not front or point.image < front[-1].image:
            front.append(point)
    return front


def tradeoff_table(points: Sequence[Point], scratch: float | None) -> str:
    """Every arm's increase of text losses, its image loss, and the distance of that from the untouched arm's.

    The front is that of the first text.
    """
    base = next(point for point in points if point.arm == UNTOUCHED)
    best, both = pareto_front(points), has_second_text(points)
    rows = [
        (
            f"{point.label} {point.strength}".strip(),
            f"{point.text_increase:.4f}",
            known(point.text_increase_se),
            *((f"{point.second_increase:.4f}", known(point.second_increase_se)) if both else ()),
            f"{point.image:.4f}",
            f"{point.image - base.image:+z.4f}",
            "*" if point in best else "",
            f"{point.pairs:,}",
            f"{point.step:,}",
        )
        for point in points
    ]
    blank = ("",) * (4 if both else 2)
    if scratch is not None:
        losses = f"{scratch:.4f}", f"{scratch - base.image:+z.4f}"
        rows.append(("random initialization", *blank, *losses, "", f"{base.pairs:,}", ""))
    validation = f"{base.split} image validation".strip()
    increases = [part for name in base.texts[: 1 + both] for part in (f"{name} increase", "+-")]
    header = ("nll (nats/token)", *increases, validation, "- untouched", "front", "pairs", "step")
    return text_table(header, rows)


def has_second_text(points: Sequence[Point]) -> bool:
    """Whether all points have a second held-out text, and the same two."""
    return {len(point.texts) for point in points} == {2} and len({point.texts for point in points}) == 1


def draw_tradeoff(points: Sequence[Point], caption: str, scratch: float | None) -> Figure:
    """Image loss (y) by increase of text loss (x, with standard errors): down and left is better.

    One panel per held-out text. The points of a remedy are joined in the order of its strength, and carry a gid of the
    form `tradeoff/ARM`, those of the second text `tradeoff/second/ARM`.

    Args:
        points: one per arm and strength.
        caption: text under the axes.
        scratch: image loss from random weights, plotted as a horizontal line.
    """
    with captioned_figure(caption, HEIGHT) as figure:
        both = has_second_text(points)
        panels = figure.subplots(1, 1 + both, sharey=True, squeeze=False)[0]
        _draw_panel(panels[0], points, scratch, "tradeoff")
        if both:
            _draw_panel(panels[1], [point.on_second_text for point in points], scratch, "tradeoff/second")
        for axes, name in zip(panels, points[0].texts, strict=False):
            of_text = f" of {name}" if both else ""
            axes.set_xlabel(f"increase of held-out text loss{of_text}\n(nats/token, text rows)")
        split = f", {points[0].split}" if points[0].split else ""
        panels[0].set_ylabel(f"held-out image loss{split} (nats/token)")
        panels[0].set_title(
            "down: lower image loss; left: less forgetting", loc="left", fontsize=9, fontweight="normal"
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def _draw_panel(axes: Axes, points: Sequence[Point], scratch: float | None, gid: str) -> None:
    """The front, the remedies as curves, and the loss from random weights."""
    best = pareto_front(points)
    axes.plot(
        [point.text_increase for point in best],
        [point.image for point in best],
        color=GREY,
        linewidth=1.1,
        drawstyle="steps-post",  # between two points of the front only their corner is known to be reachable
        gid=f"{gid}/front",
        zorder=1.5,
        label="Pareto front",
    )
    if scratch is not None:
        axes.axhline(
            scratch, color=GREY, linestyle="--", linewidth=1.1, gid=f"{gid}/scratch", label="random initialization"
        )
    for number, arm in enumerate(dict.fromkeys(point.arm for point in points)):
        own = [point for point in points if point.arm == arm]
        color = "#0072B2" if arm == UNTOUCHED else COLORS[number % len(COLORS)]
        axes.errorbar(
            [point.text_increase for point in own],
            [point.image for point in own],
            xerr=[point.text_increase_se for point in own],
            color=color,
            marker="o" if arm == UNTOUCHED else MARKERS[number % len(MARKERS)],
            markersize=8 if len(own) == 1 else 5,
            linestyle="-" if len(own) > 1 else "none",
            linewidth=1.0,
            gid=f"{gid}/{arm}",
            label=own[0].label,
            zorder=4,
        )
        for point in (own[0], own[-1]) if len(own) > 1 else ():
            place = (point.text_increase, point.image)
            axes.annotate(point.strength, place, (5, 4), textcoords="offset points", fontsize=7, color=color)
    axes.margins(0.12)


def probe_table(arms: Mapping[str, Run]) -> str:
    """Every probe's value before and after training, and its paired change with standard error."""
    rows = []
    for arm, run in arms.items():
        first = (run.before("forgetting") or {}).get("forgetting", {})
        last = run.records("forgetting")[-1]["forgetting"]
        entries = [(name, last[name], first.get(name, {})) for name in ("text", "second_text") if name in last]
        entries += [(name, last["tasks"][name], first.get("tasks", {}).get(name, {})) for name in last["tasks"]]
        for name, after, before in entries:
            for key, entry in after.items():
                if not isinstance(entry, dict) or key not in before or key == "floors":
                    continue
                unit = "nll" if "nll" in entry else "accuracy"
                change, error = entry.get("change", math.nan), known(entry.get("change_se"))
                values = f"{before[key][unit]:.4f}", f"{entry[unit]:.4f}", f"{change:+z.4f}", error
                rows.append((f"{arm}, {name} {key} {unit}", *values))
    return text_table(("arm, probe", "before", "after", "change", "+-"), rows)
