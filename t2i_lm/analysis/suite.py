"""The probes by name, run one after the other."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from t2i_lm.analysis.attention import probe_attention
from t2i_lm.analysis.base import NotAvailableError, ProbedRun, ProbeResult, Settings, open_runs
from t2i_lm.analysis.gradients import probe_gradients
from t2i_lm.analysis.rows import probe_rows
from t2i_lm.analysis.similarity import probe_similarity
from t2i_lm.analysis.tokens import probe_tokens

PROBES: dict[str, Callable[[Sequence[ProbedRun], Settings], ProbeResult]] = {
    "tokens": probe_tokens,
    "rows": probe_rows,
    "similarity": probe_similarity,
    "attention": probe_attention,
    "gradients": probe_gradients,
}


def run_probes(
    paths: Sequence[Path],
    folder: Path,
    only: Sequence[str] = (),
    settings: Settings | None = None,
    varied: Sequence[str] = (),
) -> None:
    """Runs probes, prints a sentence and the files of each; a probe that is not available is a line on stderr.

    Args:
        paths: run folders, or folders of runs.
        folder: where to write.
        only: names of probes, all required; empty for every one.
        settings: sizes.
        varied: keys in which runs differ by design.

    Raises:
        ValueError: if a run cannot be probed, runs cannot be compared, or a required probe is not available.
    """
    settings = settings or Settings()
    runs = open_runs(paths, varied)
    for name in dict.fromkeys(only or PROBES):
        try:
            result = PROBES[name](runs, settings)
        except NotAvailableError as error:
            if only:
                raise NotAvailableError(f"{name}: {error}") from error
            print(f"note: {name} is left out: {error}", file=sys.stderr)
            continue
        written = result.write(folder, name, runs, settings, varied)
        print(f"{name}: {result.sentence}", *(f"  {path}" for path in written), sep="\n", flush=True)
