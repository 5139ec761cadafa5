"""Sweeps for the page: the figure of every key of which the runs of `python -m t2i_lm.sweep` have several values."""

from collections.abc import Sequence
from pathlib import Path

from t2i_lm.comparison.comparability import ENVIRONMENT, ORDER, config_values, differences
from t2i_lm.plots.panels import remove_caption
from t2i_lm.plots.sweep import SEED, Outcome, draw_sweep, sweep_caption, sweep_table, varied_in
from t2i_lm.reporting.figures import FigureBlock
from t2i_lm.reporting.images import figure_image
from t2i_lm.reporting.search import find_runs
from t2i_lm.storage.run_folder import CONFIG, Run
from t2i_lm.training.study import RUNS as STUDY_RUNS
from t2i_lm.training.sweep import RUNS

MOST = 6  # figures


def sweep_blocks(root: Path) -> tuple[list[FigureBlock], list[str]]:
    """The figures of sweeps below a folder of runs, or beside that of a study; and notes on runs that are in none."""
    top = root.parent if root.name == STUDY_RUNS else root
    pool = find_runs((top / RUNS).glob(f"*/*/{CONFIG}"))
    runs = [run for run in pool.runs if run.validations()]
    notes = list(pool.notes)
    keys = [key for key in differences(runs, (SEED, ORDER)) if key in config_values(runs[0])] if len(runs) > 1 else []
    found = {key: _outcomes(key, runs) for key in keys}
    chosen = {key: outcomes for key, outcomes in found.items() if len({one.value for one in outcomes}) > 1}
    blocks = [_block(key, outcomes) for key, outcomes in list(chosen.items())[:MOST]]
    used = {one.run.folder for outcomes in chosen.values() for one in outcomes}
    notes += [f"in no sweep of one key: {run.folder}" for run in runs if chosen and run.folder not in used]
    if len(chosen) > MOST:
        notes.append(f"further sweeps: {', '.join(list(chosen)[MOST:])}")
    return blocks, notes


def _outcomes(key: str, runs: Sequence[Run]) -> list[Outcome]:
    """The runs that differ in one key alone: those of the setting with most of its values, then with most runs."""
    others = differences(runs, (*varied_in([key]), ENVIRONMENT["backbone"]))
    settings: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        settings.setdefault(repr([values[number] for values in others.values()]), []).append(run)
    best = max(settings.values(), key=lambda one: (len({_value(key, run) for run in one}), len(one)))
    best = sorted(best, key=lambda run: (_place(key, run), run.name != "t2i_pretrained", run.name))
    return [Outcome(run.name.removeprefix("t2i_"), [_value(key, run)], run) for run in best]


def _value(key: str, run: Run) -> str:
    value = config_values(run)[key]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(key: str, run: Run) -> float:
    value = config_values(run)[key]
    return float(value) if isinstance(value, int | float) else 0.0


def _block(key: str, outcomes: Sequence[Outcome]) -> FigureBlock:
    caption, title = sweep_caption(key, outcomes), f"Sweep of {key}"
    figure = draw_sweep(key, outcomes, caption)
    remove_caption(figure)
    return FigureBlock(
        name=f"sweep of {key}",
        title=title,
        caption=caption.removeprefix(title).removeprefix(".").strip(),
        table=sweep_table(key, outcomes),
        image=figure_image(figure),
        arms={f"{one.arm} {key}={one.value} seed {one.run.config['seed']}": one.run for one in outcomes},
    )
