"""What a study measures after training for its page, of the runs that answer first: relearning and probes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.comparison.comparability import following
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.relearning import is_measured, relearning_command
from t2i_lm.reporting.probes import ORDER, find_probes
from t2i_lm.reporting.request import first_pair
from t2i_lm.storage.run_folder import Run, is_collected


def missing_measurements(names: Sequence[str], comparison: Comparison, out: Path) -> list[list[str]]:
    """Arguments of `python -m` that measure what is missing; a note on stderr on runs that cannot be measured.

    A probe that is not available for the runs counts as missing: all probes are repeated.

    Args:
        names: of `study_plan.MEASUREMENTS`.
        comparison: whose lowest seed with both arms is measured.
        out: folder of the study's figures.
    """
    pair = [*first_pair(comparison).values()]
    missing: dict[str, list[list[str]]] = {}
    if "relearning" in names:
        missing["relearning"] = [relearning_command(run.folder) for run in pair if not is_measured(run)]
    if "probes" in names and pair and not _are_probed(pair):
        keys = sorted({*comparison.plan.varied, *comparison.plan.own_keys, *following(comparison.plan.own_keys)})
        varied = [word for key in keys for word in ("--varied", key)]
        folders = [str(run.folder) for run in pair]
        missing["probes"] = [["t2i_lm.probe", *folders, "--out", str(out / "probes"), *varied]]
    wanted = [name for name, commands in missing.items() if commands]
    if wanted and (without := [str(run.folder) for run in pair if is_collected(run.folder)]):
        print(f"note: no {' and '.join(wanted)}: no checkpoints in {', '.join(without)}", file=sys.stderr)
        return []
    return [command for commands in missing.values() for command in commands]


def _are_probed(pair: Sequence[Run]) -> bool:
    """Whether every probe of these runs together is recorded."""
    probes, _ = find_probes(pair, pair)
    if probes is None or len(probes.figures) < len(ORDER):
        return False
    return {run.folder for run in probes.runs.values()} == {run.folder for run in pair}
