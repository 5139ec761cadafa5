"""Sweeps of two config keys: a map of held-out losses per arm, and of the difference of the arms."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2i_lm.comparison.best import best_of
from t2i_lm.comparison.comparability import SEED
from t2i_lm.plots.captions import group_caption
from t2i_lm.plots.panels import arm_style, captioned_figure
from t2i_lm.plots.sweep import (
    MODALITIES,
    Outcome,
    at_edges,
    distance,
    draw_sweep,
    held_out,
    present,
    sweep_caption,
    sweep_table,
    varied_in,
)
from t2i_lm.runtime.tables import text_table

Place = tuple[str, ...]
# Held-out loss by the values of the keys, and by seed.
Grid = Mapping[Place, Mapping[int, float]]


def caption_of(keys: Sequence[str], outcomes: Sequence[Outcome], has_best: bool = True) -> str:
    """The caption of the figure of a sweep of one or two keys."""
    if len(keys) == 1:
        return sweep_caption(keys[0], outcomes, has_best)
    names = f"{keys[0]} and {keys[1]}"
    arms = {f"{one.arm} {' '.join(one.values)} seed={one.run.config['seed']}": one.run for one in outcomes}
    stars = "; a star marks each arm's best" if has_best else ""
    how = (
        f"Mean final {held_out(outcomes)} loss of {MODALITIES[present(outcomes)[0]].lower()} over "
        f"{seed_words(outcomes)}, all other keys of an arm equal{stars}."
    )
    lines = _edges(keys, grids(outcomes, present(outcomes)[0])) if has_best else []
    edges = (f"{line}." for line in lines)
    return " ".join([f"Sweep of {names}.", group_caption(arms, varied=varied_in(keys), how=how), *edges])


def tables_of(keys: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """The tables of a sweep of one or two keys."""
    if len(keys) == 1:
        return sweep_table(keys[0], outcomes)
    tables = []
    for modality in present(outcomes):
        by_arm = grids(outcomes, modality)
        for arm, grid in by_arm.items():
            rows, columns = _values(grid)
            best = best_of(grid)
            cells = [[_cell(grid, (row, column), best) for column in columns] for row in rows]
            header = (f"{arm}, {modality} nll: {keys[0]}, by {keys[1]}", *columns)
            tables.append(text_table(header, [(row, *line) for row, line in zip(rows, cells, strict=True)]))
        tables += _edges(keys, by_arm)
    return "\n\n".join(tables)


def draw(keys: Sequence[str], outcomes: Sequence[Outcome], caption: str, has_best: bool = True) -> Figure:
    """The figure of a sweep of one or two keys; of two, a map per arm and one of each arm minus the first."""
    if len(keys) == 1:
        return draw_sweep(keys[0], outcomes, caption, has_best)
    by_arm = grids(outcomes, present(outcomes)[0])
    first, *others = by_arm
    maps = {arm_style(arm).label: (_means(grid), best_of(grid) if has_best else None) for arm, grid in by_arm.items()}
    signed = set()
    for other in others:
        apart = {place: distance(nlls, by_arm[first].get(place, {})) for place, nlls in by_arm[other].items()}
        shared = {place: one for place, one in apart.items() if one is not None}
        if shared:
            title = f"{arm_style(other).label}\n- {arm_style(first).label}"
            maps[title] = shared, None
            signed.add(title)
    rows, columns = _values({place for grid in by_arm.values() for place in grid})
    with captioned_figure(caption) as figure:
        for axes, (title, (means, best)) in zip(
            figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True
        ):
            _draw_map(axes, means, rows, columns, best, title in signed)
            axes.set_title(title)
            axes.set_xlabel(keys[1])
        figure.axes[0].set_ylabel(keys[0])
    return figure


def grids(outcomes: Sequence[Outcome], modality: str) -> dict[str, Grid]:
    """The held-out losses by arm, values of the keys and seed."""
    found: dict[str, dict[Place, dict[int, float]]] = {}
    for outcome in outcomes:
        nll = outcome.nll(modality)
        if nll is not None:
            found.setdefault(outcome.arm, {}).setdefault(tuple(outcome.values), {})[outcome.run.config[SEED]] = nll
    return {**found}


def _means(grid: Grid) -> dict[Place, float]:
    return {place: fmean(nlls.values()) for place, nlls in grid.items()}


def seed_words(outcomes: Sequence[Outcome]) -> str:
    """How many seeds each mean is of: 3 seeds, or 1 to 3 seeds where some are missing."""
    distinct = {((one.arm, *one.values), one.run.config[SEED]) for one in outcomes}
    counts = Counter(place for place, _ in distinct)
    least, most = min(counts.values()), max(counts.values())
    return f"{least} to {most} seeds" if least < most else f"{most} seed{'s' * (most > 1)}"


def _edges(keys: Sequence[str], by_arm: Mapping[str, Grid]) -> list[str]:
    """Warnings where the best value of a key lies at the edge of the grid, the other key at its best."""
    lines = []
    for number, key in enumerate(keys):
        along = {}
        for arm, grid in by_arm.items():
            best = best_of(grid)
            if best is not None:
                other = best[1 - number]
                along[arm] = {place[number]: nlls for place, nlls in grid.items() if place[1 - number] == other}
        lines += at_edges(key, along)
    return lines


def _values(grid: Collection[Place]) -> tuple[list[str], list[str]]:
    """The values of both keys, numbers in order."""

    def ordered(values: Sequence[str]) -> list[str]:
        try:
            return sorted(dict.fromkeys(values), key=float)
        except ValueError:
            return list(dict.fromkeys(values))

    return ordered([row for row, _ in grid]), ordered([column for _, column in grid])


def _cell(grid: Grid, place: Place, best: Place | None) -> str:
    return "" if place not in grid else f"{fmean(grid[place].values()):.4f}{' *' if place == best else ''}"


def _draw_map(
    axes: Axes,
    grid: Mapping[Place, float],
    rows: Sequence[str],
    columns: Sequence[str],
    best: Place | None,
    signed: bool,
) -> None:
    losses = np.array([[grid.get((row, column), np.nan) for column in columns] for row in rows])
    colors = "RdBu" if signed else "viridis_r"
    most = float(np.nanmax(np.abs(losses))) or 1.0
    limits = {"vmin": -most, "vmax": most} if signed else {}
    image = axes.imshow(losses, cmap=colors, aspect="auto", origin="lower", **limits)  # type: ignore[arg-type]
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) in grid:
                text = f"{grid[row, column]:+.3f}" if signed else f"{grid[row, column]:.3f}"
                share = float(np.asarray(image.norm(losses[y, x])))
                dark = abs(share - 0.5) > 0.3 if signed else share > 0.5
                mark = "\n\N{BLACK STAR}" if (row, column) == best else ""
                axes.text(x, y, text + mark, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
