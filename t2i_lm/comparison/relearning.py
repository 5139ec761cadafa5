"""What `evaluate --relearn` measured of a run: its newest result, and in which way it was made."""

import shlex
from pathlib import Path
from typing import Any

from t2i_lm.comparison.comparability import OF_RESULTS, MissingRunsError
from t2i_lm.evaluation.base import FINISHED, of_last_checkpoint, read_result
from t2i_lm.storage.run_folder import Run, is_collected


def relearning_command(run: str | Path) -> list[str]:
    """Arguments of `python -m` that measure a run."""
    return ["t2i_lm.evaluate", "--checkpoint", str(run), "--relearn"]


def relearning_of(run: Run) -> dict[str, Any]:
    """The newest result of the last checkpoint.

    Raises:
        ValueError: if there is none, or one is damaged.
    """
    files = sorted(run.folder.glob("evaluations/*/relearn.json"), key=lambda file: file.stat().st_mtime)
    # Copies have other times than their originals.
    results = sorted(map(read_result, files), key=lambda result: result.get(FINISHED, ""))
    own = [one for one in results if of_last_checkpoint(run.folder, one["made_with"].get("checkpoint_sha256", ""))]
    if not own:
        problem = "was measured of other checkpoints than its last one" if results else "was not measured"
        if is_collected(run.folder):
            remedy = "measure the run itself and collect it again"
            raise MissingRunsError(f"relearning of {run.folder} {problem}: {OF_RESULTS}; {remedy}")
        command = shlex.join(["python", "-m", *relearning_command(run.folder)])
        raise MissingRunsError(f"relearning of {run.folder} {problem}: {command}")
    return own[-1]


def is_measured(run: Run) -> bool:
    """Whether there is a result of the last checkpoint, and none is damaged."""
    try:
        return bool(relearning_of(run))
    except (ValueError, OSError):
        return False


def way_of(result: dict[str, Any]) -> dict[str, Any]:
    """Texts, rows, steps and rate of a result: equal for results that may be compared."""
    return {key: value for key, value in result["made_with"].items() if key != "checkpoint_sha256"}
