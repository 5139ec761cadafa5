"""What a study measures after training for its page, of the runs that answer first: relearning and probes."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from t2i_lm.comparison.comparison import Comparison
from t2i_lm.plots.relearning import is_measured
from t2i_lm.reporting.probes import find_probes
from t2i_lm.reporting.request import first_pair
from t2i_lm.storage.run_folder import CHECKPOINTS

# A command of `python -m t2i_lm.NAME`, and its arguments.
Command = tuple[str, list[str]]


def missing_measurements(names: Sequence[str], comparison: Comparison, out: Path) -> Iterator[Command]:
    """The commands that measure what is missing; a note on stderr where there is no run to measure.

    Args:
        names: of `study_plan.MEASUREMENTS`.
        comparison: whose first seed is measured.
        out: folder of the study's figures.
    """
    pair = [*first_pair(comparison).values()]
    if names and not all((run.folder / CHECKPOINTS).is_dir() for run in pair):
        collected = next(run.folder for run in pair if not (run.folder / CHECKPOINTS).is_dir())
        print(f"note: no {' and '.join(names)}: {collected} has no checkpoints", file=sys.stderr)
        return
    if "relearning" in names:
        for run in pair:
            if not is_measured(run):
                yield "evaluate", ["--checkpoint", str(run.folder), "--relearn"]
    if "probes" in names and pair and find_probes(pair, pair)[0] is None:
        keys = sorted({*comparison.plan.varied, *comparison.plan.own_keys})
        varied = [word for key in keys for word in ("--varied", key)]
        yield "probe", [*(str(run.folder) for run in pair), "--out", str(out / "probes"), *varied]
