"""What a study writes: a table per comparison and per grid, the best values, and the gap against training tokens."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.gap import GapCurve, gap_curves, gap_json, gap_text
from t2i_lm.comparison.grid import Grid, at_best, grids, names_at_best, tune
from t2i_lm.comparison.grid_tables import grid_json, grid_text
from t2i_lm.comparison.study_plan import STEPS, TABLE, Study, result_files
from t2i_lm.comparison.tables import as_json, text
from t2i_lm.config.values import value_word
from t2i_lm.plots.gap import TITLE, draw_gap, draw_grid, gap_caption, grid_caption
from t2i_lm.plots.groups import arm_of
from t2i_lm.plots.panels import save_figure
from t2i_lm.plots.sweep import Outcome
from t2i_lm.plots.sweep_grid import caption_of, draw
from t2i_lm.storage.writing import write_atomic


@dataclass(frozen=True)
class Results:
    """The results of a study.

    Attributes:
        comparisons: of two arms each; those of arms at their best values among them.
        grids: those with several points.
        curves: of the gap, where lengths vary.
        problems: why a grid or a curve could not be made.
        refused: those of grids, whose points are of several versions.
        files: every file that a study of the plan may write here; those that cannot be made are removed.
    """

    comparisons: tuple[Comparison, ...]
    grids: tuple[Grid, ...] = ()
    curves: tuple[GapCurve, ...] = ()
    problems: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def answer_first(self) -> "tuple[Comparison, ...]":
        """The comparisons, first the one that answers the plan's question.

        That is the first one; of a grid over a tuned key the arms at their best, which may be a point of the grid, or
        the reason why there is no best value; of one over steps the longest.
        """
        grid = self.grids[0] if self.grids and self.comparisons[0] in self.grids[0].comparisons else None
        if grid is None:
            return self.comparisons
        by_name = {one.name: one for one in self.comparisons}
        best = [by_name[name] for name in names_at_best(grid)]
        if grid.tuned is not None and not best:
            reason = "; ".join(line for tuned in tune(grid) for line in tuned.lines)
            return (Comparison(grid.name, grid.plan, None, (), ValueError(reason)), *self.comparisons)
        made = [one for one in grid.comparisons if one.arms is not None]
        by_length = sorted(made, key=lambda one: float(one.plan.where.get(STEPS, 0)))
        first = (best or (by_length[-1:] if STEPS in grid.family.keys else made[:1]))[:1]
        return (*first, *(one for one in self.comparisons if one not in first))


def results_of(
    study: Study, comparisons: Sequence[Comparison], strict: bool = True, seeds: int | None = None
) -> Results:
    """The results of a study's comparisons, with those that follow from its grids.

    Args:
        study: the plan.
        comparisons: its comparisons.
        strict: whether another order of the data between the arms is refused.
        seeds: number of the plan's seeds, the first ones, over which best values are chosen; None for all.
    """
    families = study.families()
    found, refused = grids(families, comparisons, strict, seeds)
    best = [one for grid in found for one in at_best(grid)]
    curves, problems = gap_curves(families, comparisons)
    files = tuple(file for file, _ in result_files(families))
    return Results((*comparisons, *best), tuple(found), tuple(curves), (*refused, *problems), tuple(refused), files)


def write_results(results: Results, out: Path) -> int:
    """Prints every table and writes it to a folder: NAME.txt and NAME.json, and of a gap also its figure.

    Tables of a grid have its name, those of its points are printed only as rows of it. Former files of the plan's
    results that are not made now are removed: their verdict no longer holds.

    Returns:
        0, or 2 if something cannot be made, after naming the reason on stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    code, written = 0, set[str]()
    points = {one.name for grid in results.grids for one in grid.comparisons}
    for name, shown, write in _tables(results, points):
        try:
            table, content = write()
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            code = 2
            continue
        for suffix, words in zip(TABLE, (table, content), strict=True):
            write_atomic(out / f"{name}{suffix}", f"{words}\n")
            written.add(f"{name}{suffix}")
        if shown:
            print(f"== {name}", table, "", sep="\n", flush=True)
    for stem, title, figure, caption in figures_of(results):
        paths = save_figure(figure, out / stem, title, caption)
        written |= {path.name for path in paths}
        print(*paths, sep="\n")
    for problem in results.problems:
        print(problem, file=sys.stderr)
    for file in {*results.files} - written:
        (out / file).unlink(missing_ok=True)
    return 2 if results.problems else code


def figures_of(results: Results) -> Iterator[tuple[str, str, Figure, str]]:
    """File name, title, figure and caption of every grid and curve that has results."""
    for grid in results.grids:
        if any(one.arms is not None for one in grid.comparisons):
            caption = grid_caption(grid)
            words = f"{grid.name} over its grid" if grid.family.keys else f"{grid.name}: every arm minus the last"
            yield grid.name, words, draw_grid(grid, caption), caption
        if grid.tuned is not None and (outcomes := outcomes_of(grid)):
            keys = grid.family.keys
            has_best = not any(one.missing for one in tune(grid))
            caption = caption_of(keys, outcomes, has_best)
            title = f"Sweep of {' and '.join(keys)}"
            yield f"{grid.name}_losses", title, draw(keys, outcomes, caption, has_best), caption
    for curve in results.curves:
        if curve.lengths:
            caption = gap_caption(curve)
            yield f"{curve.name}_gap", TITLE, draw_gap(curve, caption), caption


def outcomes_of(grid: Grid) -> list[Outcome]:
    """The runs of a grid over one or two keys as points of a sweep; none of more keys, or of two settings of an arm."""
    found: dict[Path, Outcome] = {}
    experiments = {arm.experiment for member in grid.family.members for arm in member.plan.parsed.values()}
    names = {name for member in grid.family.members for name in member.plan.parsed}
    if len(grid.family.keys) > 2 or len(experiments) < len(names):
        return []
    for member, one in zip(grid.family.members, grid.comparisons, strict=True):
        for run in one.arms.runs if one.arms is not None else ():
            found[run.folder] = Outcome(arm_of(run.name), tuple(map(value_word, member.point.values())), run)
    return list(found.values())


def _tables(results: Results, points: set[str]) -> Iterator[tuple[str, bool, Callable[[], tuple[str, str]]]]:
    """Name, whether it is printed, and what makes text and JSON of every table."""
    for one in results.comparisons:
        yield one.name, one.name not in points, lambda one=one: _comparison(one)  # type: ignore[misc]
    for grid in results.grids:
        yield grid.name, True, lambda grid=grid: (grid_text(grid), grid_json(grid))  # type: ignore[misc]
    for curve in results.curves:
        yield f"{curve.name}_gap", True, lambda curve=curve: (gap_text(curve), gap_json(curve))  # type: ignore[misc]


def _comparison(one: Comparison) -> tuple[str, str]:
    if one.arms is None:
        assert one.problem is not None
        raise one.problem
    return text(one.plan, one.arms, one.results), as_json(one.plan, one.arms, one.results)
