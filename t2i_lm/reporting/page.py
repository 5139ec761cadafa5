"""The page: the answer, the set-up and the sections, rendered by a template that escapes every value."""

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.tables import notes as table_notes
from t2i_lm.comparison.tables import sentence
from t2i_lm.config.experiment import KEEPS_LANGUAGE
from t2i_lm.reporting.claims import CLAIMS
from t2i_lm.reporting.comparison_table import comparison_table
from t2i_lm.reporting.figures import FigureBlock, draw_figures
from t2i_lm.reporting.findings import arm_label, forgetting_sentences, result_sentence, verdict_heading
from t2i_lm.reporting.request import (
    ReportRequest,
    by_arm,
    by_seed,
    compare_command,
    facts,
    first_pair,
    missing_runs,
    named_pair,
    short_notes,
)
from t2i_lm.reporting.sections import build_sections
from t2i_lm.reporting.setup import scale_words, setup_rows
from t2i_lm.storage.run_folder import Run, environment
from t2i_lm.storage.writing import write_atomic

QUESTION = (
    "Does a pre-trained language model help auto-regressive text-to-image generation, "
    "and what does it lose by learning to draw?"
)
TEMPLATE = "page.html"


def write_report(request: ReportRequest, file: Path) -> None:
    """Writes the page.

    Raises:
        IncomparableError: if `strict` and runs cannot be compared.
        OSError: if the file cannot be written.
    """
    text = render(request)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text)


def render(request: ReportRequest) -> str:
    """The page as HTML.

    Raises:
        IncomparableError: if `strict` and runs cannot be compared, naming them and the keys.
    """
    for comparison in request.comparisons:
        if request.strict and isinstance(comparison.problem, IncomparableError):
            raise IncomparableError(f"{comparison.name}: {comparison.problem}") from comparison.problem
    primary = request.comparisons[0] if request.comparisons else None
    arms = first_pair(primary)
    own = primary.plan.own_keys if primary is not None else frozenset()
    blocks = draw_figures(request.pool.runs, request.root, request.strict, named_pair(arms), request.varied, own)
    sections = build_sections(request, blocks, arms)
    general = [*(request.results.problems if request.results else ())]
    general += [note for note in request.pool.notes if not any(note in section.notes for section in sections)]
    loader = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {arm_label(arm): run for arm, run in arms.items()}
    images = [run for run in request.pool.runs if run.config.get("task") in KEEPS_LANGUAGE]
    if not shown and images:
        shown = {"newest": images[-1]}
    setup = setup_rows(shown, primary.arms if primary is not None else None)
    return loader.get_template(TEMPLATE).render(
        question=QUESTION,
        answer=_answer(request, primary, arms, blocks),
        setup=setup,
        sections=sections,
        general=general,
        made=_made(request),
    )


def _answer(
    request: ReportRequest, primary: Comparison | None, arms: Mapping[str, Run], blocks: Sequence[FigureBlock]
) -> dict[str, Any]:
    """The verdict in words, its numbers, and what is lost."""
    lost = [] if primary is None else forgetting_sentences(by_arm(primary), primary.plan.alpha)
    if not lost:
        others = next(block for block in blocks if block.name == "forgetting").arms
        lost = forgetting_sentences({arm: [run] for arm, run in others.items()})
        if lost and primary is not None and primary.arms is not None:
            folders = ", ".join(str(run.folder) for run in others.values())
            lost.append(f"Measured in other runs than those compared: {folders}.")
    run = next(iter(arms.values()), None)
    scale = "" if run is None else scale_words(run)
    common = {"lost": lost, "lost_command": CLAIMS["forgetting"].command, "scale": scale}
    if primary is None or primary.arms is None:
        problem = str(primary.problem) if primary is not None else "the plan has no comparison"
        default = CLAIMS["figure4"].command
        if primary is not None and request.plan is not None:
            default = compare_command(request, primary)
        reason, command = missing_runs(problem, default)
        if primary is not None and isinstance(primary.problem, IncomparableError):
            command = ""  # more runs are no remedy
        return {**common, "kind": "missing", "heading": "No answer yet.", "reason": reason, "command": command}
    result = primary.results[0]
    return {
        **common,
        "kind": result.verdict.split()[0],
        "heading": verdict_heading(primary),
        "verdict": sentence(primary.plan, result),
        "sentence": result_sentence(primary, result),
        "table": comparison_table(primary),
        "notes": short_notes(table_notes(primary.plan, primary.arms, primary.results)),
        "command": compare_command(request, primary),
        "runs": facts(request, by_seed(primary)),
    }


def _made(request: ReportRequest) -> dict[str, str]:
    """The footer: version, revision, date and folder of runs."""
    here = environment()
    try:
        own = version("t2i_lm")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "version": own,
        "revision": str(here["git"] or "unknown")[:16] + (" with local changes" if here["git_dirty"] else ""),
        "date": time.strftime("%Y-%m-%d"),
        "runs": str(request.root),
        "plan": str(request.plan or "the default plan"),
    }
