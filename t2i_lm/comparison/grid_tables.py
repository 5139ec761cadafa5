"""The table of a comparison over its grid, as text and JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from t2i_lm.comparison.arms import PRECISIONS, precision_note
from t2i_lm.comparison.comparability import REVISIONS, revision_note
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.contrasts import contrasts
from t2i_lm.comparison.grid import OPTIMISTIC, Grid, at_best, labeled_points, tune
from t2i_lm.comparison.tables import interval_text, p_text, sentence, value_text
from t2i_lm.runtime.tables import text_table


@dataclass(frozen=True)
class GridTable:
    """A row per point with the primary endpoint, the best values in words, and what is left out."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]
    notes: tuple[str, ...]


def grid_table(grid: Grid) -> GridTable:
    """The table of a grid."""
    interval = f"{100 * (1 - grid.plan.alpha):g} % t-interval"
    last = [*grid.plan.parsed][-1]
    first = "arm's mean" if "arm" in grid.labels else next(iter(grid.plan.parsed))
    rows, notes = [], []
    for labels, comparison, corrected in labeled_points(grid):
        if comparison.arms is None:
            reason = str(comparison.problem).splitlines()[0]
            rows.append((*labels, *[""] * 7, "MISSING" if comparison.is_missing else "REFUSED"))
            notes.append(f"{comparison.name}: {reason}")
            continue
        one = comparison.results[0]
        rows.append(
            (
                *labels,
                *(value_text(one, mean) for mean in one.means or ()),
                *([] if one.means else ["", ""]),
                value_text(one, one.statistics.mean, signed=True),
                interval_text(one, one.statistics.t_interval),
                str(one.statistics.n),
                p_text(one.statistics.p_difference),
                p_text(corrected),
                sentence(comparison.plan, one),
            )
        )
        notes += [
            f"{comparison.name}: {note}"
            for note in comparison.arms.notes
            if not note.startswith((REVISIONS, PRECISIONS))
        ]
    names = f"{grid.plan.primary} by {' and '.join(grid.labels)}"
    tuned = tune(grid)
    runs = [run for one in grid.comparisons if one.arms is not None for run in one.arms.runs]
    general = [
        f"p (Holm): corrected for {sum(bool(row[-2]) for row in rows)} p-values, those of points with every planned "
        "seed; the verdict is of each comparison alone",
        *([OPTIMISTIC] if any(one.best for one in tuned) else []),
        *precision_note(runs),
        *revision_note(runs),
    ]
    return GridTable(
        title=f"{grid.name}: {names}, each arm minus {last}, paired by seed",
        header=(*grid.labels, first, last, "difference", interval, "n", "p", "p (Holm)", "verdict"),
        rows=tuple(rows),
        lines=(*(line for one in tuned for line in one.lines), *contrasts(grid)),
        notes=(*general, *notes),
    )


def grid_text(grid: Grid) -> str:
    """The table of a grid as text."""
    table = grid_table(grid)
    left = (*range(len(grid.labels)), len(table.header) - 1)
    return "\n".join([table.title, "", text_table(table.header, table.rows, left=left), "", *table.lines, *table.notes])


def grid_json(grid: Grid) -> str:
    """The same as JSON."""
    content = {
        "comparison": grid.name,
        "endpoint": grid.plan.primary,
        "keys": grid.family.keys,
        "points": [
            {
                "values": member.point,
                "name": comparison.name,
                "problem": None if comparison.problem is None else str(comparison.problem),
                **_numbers(comparison, corrected),
            }
            for member, (_, comparison, corrected) in zip(grid.family.members, labeled_points(grid), strict=True)
        ],
        "best": [
            {
                "condition": tuned.condition,
                "common": tuned.common,
                "missing": tuned.missing,
                "arms": [{**asdict(one), "sentence": one.sentence} for one in tuned.best],
            }
            for tuned in tune(grid)
        ],
        "at_best": [
            {"name": one.name, "notes": one.arms.notes if one.arms is not None else [], **_numbers(one, None)}
            for one in at_best(grid)
        ],
        "notes": grid_table(grid).notes,
    }
    return json.dumps(content, indent=2)


def _numbers(comparison: Comparison, corrected: float | None) -> dict[str, Any]:
    if comparison.arms is None:
        return {}
    one = comparison.results[0]
    return {
        "means": one.means,
        "differences": one.differences,
        "mean": one.statistics.mean,
        "t_interval": one.statistics.t_interval,
        "n": one.statistics.n,
        "p_difference": one.statistics.p_difference,
        "p_holm": corrected,
        "verdict": one.verdict,
        "missing_seeds": one.missing,
    }
