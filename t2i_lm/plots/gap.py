"""Figures of a difference between two arms: against training tokens with fits of its decay, and over a grid."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2i_lm.comparison.arms import PRECISIONS
from t2i_lm.comparison.comparability import MissingRunsError, config_values
from t2i_lm.comparison.decay import CONSTANT, PARAMETERS, decay_sentences
from t2i_lm.comparison.gap import GapCurve
from t2i_lm.comparison.grid import Grid, labeled, tune
from t2i_lm.comparison.plan import Margin, setting_words
from t2i_lm.comparison.statistics import PairedStatistics
from t2i_lm.comparison.tables import setting
from t2i_lm.plots.groups import arm_of
from t2i_lm.plots.panels import ARM_STYLES, GREY, arm_style, captioned_figure
from t2i_lm.runtime.tables import upper_first
from t2i_lm.storage.run_folder import Run

RATE = "optim.lr"
TITLE = "Gap against training tokens"
COLOR = ARM_STYLES["pretrained"].color
FIT_COLORS = {"zero": ARM_STYLES["scratch"].color, CONSTANT: ARM_STYLES["tune_ffn"].color}


def gap_caption(curve: GapCurve) -> str:
    """What the figure shows, the setting, the fits in words and what is left out.

    Raises:
        MissingRunsError: if no length is left.
    """
    if not curve.lengths:
        raise MissingRunsError(f"{curve.name}: no length has every seed; {'; '.join(curve.notes)}")
    first, second = curve.plan.parsed
    n = _span(length.statistics.n for length in curve.lengths)
    last = curve.lengths[-1].comparison
    assert last.arms is not None
    where = setting(last.plan, last.arms).partition("), ")[2]
    rate = "" if RATE in (*last.plan.where, *last.plan.own_keys) else f", {rate_words(last.arms.runs)}"
    level = f"{100 * (1 - curve.plan.alpha):g} %"
    lines = [
        f"{TITLE}: {curve.plan.primary} of {first} minus {second}, each length a run of its own with its own schedule, "
        f"n = {n} seeds a length. Points: mean and {level} t-interval; crosses: seeds; band: margin "
        f"{curve.plan.margin}. Longest: {where}{rate}.",
        *(f"{upper_first(line)}." for line in decay_sentences(curve.decay, curve.plan.alpha)),
        # A note of one length begins with its name.
        *(
            f"{note}."
            for note in curve.notes
            if any(word in note for word in ("left out", "NOT CONTROLLED", PRECISIONS))
        ),
    ]
    return " ".join(lines)


def rate_words(runs: Iterable[Run]) -> str:
    """The learning rates of runs."""
    rates = sorted({config_values(run)[RATE] for run in runs})
    return f"learning rate {' and '.join(f'{rate:g}' for rate in rates)}"


def _span(numbers: Iterable[int]) -> str:
    """The smallest and the largest number, or the only one."""
    ordered = sorted({*numbers})
    return f"{ordered[0]}" if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def draw_gap(curve: GapCurve, caption: str) -> Figure:
    """The gap by tokens on a logarithmic axis; lines of fits carry a gid of the form `fit/KIND`."""
    tokens = [length.tokens for length in curve.lengths]
    with captioned_figure(caption) as figure:
        axes = figure.subplots()
        _zero(axes, tokens, [Margin.parse(curve.plan.margin).absolute(one.second) for one in curve.lengths])
        for length in curve.lengths:
            _point(axes, length.tokens, length.statistics, list(length.differences.values()))
        grid = np.geomspace(tokens[0], tokens[-1], 200)
        for kind, fit in curve.decay.fits.items():
            form = "a t\N{SUPERSCRIPT MINUS}\N{MODIFIER LETTER SMALL B}" + (
                " + c" if len(PARAMETERS[kind]) == 3 else ""
            )
            preferred = ", preferred by AICc" if kind == curve.decay.chosen else ""
            label = f"fit to {'a ' * (kind == CONSTANT)}{kind}, {form}{preferred}"
            dashes = "--" if fit.problem else "-"
            axes.plot(
                grid, fit(grid.tolist()), color=FIT_COLORS[kind], linestyle=dashes, label=label, gid=f"fit/{kind}"
            )
        axes.set_xscale("log")
        axes.set_xticks(tokens, [f"{length.steps:,}" for length in curve.lengths])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"training steps ({tokens[-1] / curve.lengths[-1].steps:,.0f} tokens each, pads included)")
        first, second = (arm_style(arm_of(name)).label for name in curve.plan.parsed)
        unit = curve.lengths[0].comparison.results[0].endpoint.unit
        axes.set_ylabel(f"{first}\nminus {second}" + (f" ({unit})" if unit else ""))
        if curve.decay.fits:
            figure.legend(loc="outside upper center", ncols=2)
    return figure


def _zero(axes: Axes, places: Sequence[float], margins: Sequence[float]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.9, zorder=1)
    low = [-one for one in margins]
    axes.fill_between(list(places), low, list(margins), color=GREY, alpha=0.12, linewidth=0, zorder=0, gid="margin")


def _point(axes: Axes, place: float, statistics: PairedStatistics, differences: Sequence[float]) -> None:
    """The mean with its interval, and the seeds."""
    interval = statistics.t_interval
    error = None if interval is None else [[statistics.mean - interval[0]], [interval[1] - statistics.mean]]
    seeds = {"linestyle": "none", "marker": "x", "markersize": 4, "alpha": 0.7, "color": COLOR, "zorder": 2}
    axes.plot([place] * len(differences), list(differences), **seeds)  # type: ignore[arg-type]
    look = {"color": COLOR, "marker": "o", "markersize": 6, "capsize": 3, "zorder": 4}
    axes.errorbar([place], [statistics.mean], yerr=error, gid="mean", **look)  # type: ignore[arg-type]


def grid_caption(grid: Grid) -> str:
    """What the figure of a grid shows."""
    made = [one for one in grid.comparisons if one.arms is not None]
    plan = made[0].plan
    level = f"{100 * (1 - plan.alpha):g} %"
    absent = {name: one for name, one in labeled(grid).items() if one.arms is None}
    not_run = [name for name, one in absent.items() if one.is_missing]
    refused = [f"{name} ({str(one.problem).splitlines()[0]})" for name, one in absent.items() if not one.is_missing]
    n = _span(one.results[0].statistics.n for one in made)
    shared = setting_words({key: value for key, value in plan.where.items() if key not in grid.family.keys})
    if RATE not in (*plan.where, *plan.own_keys):
        shared.append(rate_words([run for one in made if one.arms is not None for run in one.arms.runs]))
    hashes = dict.fromkeys(
        str(run.environment.get("data_hash")) for one in made if one.arms is not None for run in one.arms.runs
    )
    lines = [
        f"{grid.name}: {plan.primary}, each arm minus {[*plan.parsed][-1]}, paired by seed, n = {n} seeds. Points: "
        f"mean and {level} t-interval; crosses: seeds; band: margin {plan.margin}. Scale "
        f"{', '.join([plan.scale, *shared])}, data hash{'es' * (len(hashes) > 1)} {', '.join(hashes)}.",
        *([f"NOT RUN: {', '.join(not_run)}."] if not_run else []),
        *([f"REFUSED: {'; '.join(refused)}."] if refused else []),
        *(f"{_sentence(line, grid)}." for tuned in tune(grid) for line in tuned.lines),
    ]
    return " ".join(lines)


def _sentence(line: str, grid: Grid) -> str:
    """A line with a capital, unless it begins with the name of an arm."""
    names = tuple(name for member in grid.family.members for name in member.plan.parsed)
    return line if line.startswith(names) else upper_first(line)


def draw_grid(grid: Grid, caption: str) -> Figure:
    """A row for every point that has results: the difference of its arms with its interval."""
    shown = {name: one for name, one in labeled(grid).items() if one.arms is not None}
    with captioned_figure(caption, max(2.0, 0.8 + 0.34 * len(shown))) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linewidth=0.9, zorder=1)
        for row, one in enumerate(shown.values()):
            result = one.results[0]
            if result.margin is not None:
                span = {"color": GREY, "alpha": 0.12, "linewidth": 0, "zorder": 0}
                axes.barh([row], [2 * result.margin], left=[-result.margin], height=1.0, **span)  # type: ignore[arg-type]
            seeds = {"linestyle": "none", "marker": "x", "markersize": 4, "alpha": 0.7, "color": COLOR, "zorder": 2}
            axes.plot(list(result.differences.values()), [row] * result.statistics.n, **seeds)  # type: ignore[arg-type]
            mean, interval = result.statistics.mean, result.statistics.t_interval
            error = None if interval is None else [[mean - interval[0]], [interval[1] - mean]]
            look = {"color": COLOR, "marker": "o", "markersize": 6, "capsize": 3, "zorder": 4}
            axes.errorbar([mean], [row], xerr=error, gid="mean", **look)  # type: ignore[arg-type]
        axes.set_yticks(range(len(shown)), list(shown))
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_ylabel(" ".join(grid.labels))
        endpoint = next(iter(shown.values())).results[0].endpoint
        axes.set_xlabel(f"difference of {endpoint.name}" + (f" ({endpoint.unit})" if endpoint.unit else ""))
    return figure
