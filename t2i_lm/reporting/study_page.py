"""Figures and report of a study, from its own runs alone."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from t2i_lm.comparison.comparability import MissingRunsError, following
from t2i_lm.comparison.study_plan import Study
from t2i_lm.plots.catalogue import Request, write_figures
from t2i_lm.reporting.figures import named, view
from t2i_lm.reporting.page import write_report
from t2i_lm.reporting.request import ReportRequest, first_pair, named_pair
from t2i_lm.reporting.search import Pool, RunSearch
from t2i_lm.training.study import StudyRun, figure_root, shown_runs
from t2i_lm.training.study_results import Results


def write_page(
    study: Study, runs: Sequence[StudyRun], results: Results, plan: Path, experiments: Path, out: Path, strict: bool
) -> int:
    """Writes the figures of a study's runs and report.html, and prints their paths.

    Args:
        study: the plan.
        runs: its runs.
        results: its comparisons.
        plan: the plan file.
        experiments: folder of experiments, for commands.
        out: folder to write.
        strict: whether incomparable runs are refused.

    Returns:
        0, or 2 if a figure of existing runs cannot be drawn, or none of a plan with both arms, after naming the reason
        on stderr; the page says what is missing.
    """
    finished, notes = shown_runs(runs)
    root, code = figure_root(runs), 0
    own = tuple(sorted({key for one in study.needed() for arm in one.arms for key in arm.own}))
    primary = next(iter(results.answer_first), None)
    pair = named_pair(first_pair(primary))  # as on the page
    pair_keys = primary.plan.own_keys if primary is not None and pair is not None else ()
    with view([*(pair or ()), *finished]) as (folder, links):
        names = {**{str(link): str(run) for link, run in links.items()}, str(folder): str(root)}
        places = {run: link for link, run in links.items()}
        try:
            one, two = (None, None) if pair is None else (places[run.folder] for run in pair)
            drawn = Request(folder, one, two, strict, own, (*pair_keys, *following(pair_keys)))
            code = write_figures(drawn, out, told=partial(named, names=names))
        except ValueError as error:
            if _has_pair(runs) or not isinstance(error, MissingRunsError):
                print(f"figures: {named(str(error), names)}", file=sys.stderr)
                code = 2
    pool = Pool(tuple(finished), tuple(notes))
    request = ReportRequest(results.answer_first, pool, RunSearch(root), plan, experiments, strict, results, own)
    page = out / "report.html"
    write_report(request, page)
    print(page)
    return code


def _has_pair(runs: Sequence[StudyRun]) -> bool:
    """Whether a plan has text-to-image runs from pre-trained and from random weights, which figures are drawn of."""
    configs = [run.job.config for run in runs]
    return {"pretrained", "random"} <= {config.init for config in configs if config.task == "text_to_image"}
