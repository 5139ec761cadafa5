"""What a report is made from, and the words that its sections share: commands, notes, facts of runs."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2i_lm.comparison.comparability import OF_RESULTS
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.plan import setting_words
from t2i_lm.plots.catalogue import OF_PAIR
from t2i_lm.plots.pairing import ARMS
from t2i_lm.reporting.figures import FigureBlock
from t2i_lm.reporting.findings import arm_label
from t2i_lm.reporting.provenance import RunFacts, run_facts
from t2i_lm.reporting.search import Pool, RunSearch
from t2i_lm.storage.run_folder import Run
from t2i_lm.training.study_results import Results


@dataclass(frozen=True)
class ReportRequest:
    """What a report is made from.

    Attributes:
        comparisons: of the plan; the first one answers the question.
        pool: the runs of the figures.
        search: in the folder of runs.
        plan: the plan file; None for the default plan.
        experiments: folder of experiments, for commands.
        strict: whether incomparable runs are refused; else they are named.
        results: grids and curves of the comparisons; None for none.
        varied: config keys in which the arms of figures differ by design.
    """

    comparisons: Sequence[Comparison]
    pool: Pool
    search: RunSearch
    plan: Path | None
    experiments: Path
    strict: bool
    results: Results | None = None
    varied: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder of runs."""
        return self.search.root


def first_pair(comparison: Comparison | None) -> dict[str, Run]:
    """The runs of a comparison's first seed by experiment; empty without any."""
    if comparison is None or comparison.arms is None:
        return {}
    seed = comparison.arms.seeds[0]
    return {name: by_seed[seed][0] for name, by_seed in comparison.runs.items()}


def named_pair(arms: Mapping[str, Run]) -> tuple[Run, Run] | None:
    """The runs of Figures 3 and 4, if those are what is compared; not arms with names and keys of their own."""
    inits = {
        str(run.config.get("init")): run
        for arm, run in arms.items()
        if run.config.get("task") == "text_to_image" and arm == run.config.get("name")
    }
    return (inits["pretrained"], inits["random"]) if set(inits) == {"pretrained", "random"} else None


def by_arm(comparison: Comparison) -> dict[str, list[Run]]:
    """A comparison's runs by experiment, the first one of every seed; empty without any."""
    return {name: [by_seed[seed][0] for seed in sorted(by_seed)] for name, by_seed in comparison.runs.items()}


def by_seed(comparison: Comparison) -> dict[str, Run]:
    """Every run of a comparison by arm and seed, in words."""
    return {
        f"{arm_label(name)}, seed {seed}" + (f" ({number + 1})" if number else ""): run
        for name, runs in comparison.runs.items()
        for seed in sorted(runs)
        for number, run in enumerate(runs[seed])
    }


def setting_of(comparison: Comparison) -> str:
    """The setting of a comparison: its own values, or the backbone."""
    if comparison.plan.where:
        return " ".join(setting_words(comparison.plan.where))
    run = next(iter(first_pair(comparison).values()))
    backbone = run.config.get("backbone") or {}
    return f"backbone.path={backbone.get('path')}" if backbone.get("path") else f"backbone {backbone.get('config')}"


def facts(request: ReportRequest, arms: Mapping[str, Run]) -> list[RunFacts]:
    """The facts of runs, each once."""
    labels: dict[Path, list[str]] = {}
    runs: dict[Path, Run] = {}
    for arm, run in arms.items():
        labels.setdefault(run.folder, []).append(arm)
        runs[run.folder] = run
    return [run_facts(labels[folder], run, request.experiments) for folder, run in runs.items()]


def missing_runs(problem: str, command: str) -> tuple[str, str]:
    """Why a section has no runs, in one line, and the command that makes them; empty where none does."""
    first, *rest = problem.splitlines() or [""]
    if OF_RESULTS in first:
        return first, ""
    if not rest and (found := re.match(r"(.*?)(?:; to make (?:them|it): (?=\S)|: (?=python -m ))(.*)", first)):
        return found[1], found[2]
    own = next((line.partition(": ")[2] for line in rest if line.startswith("to make them: ")), "")
    return first or "no finished runs for this section", own or command


def short_notes(notes: Sequence[str]) -> list[str]:
    """Notes with the missing seeds of an arm in one."""
    missing: dict[str, list[str]] = {}
    others = []
    for note in notes:
        if found := re.fullmatch(r"MISSING: seed (-?\d+) of (.*)", note):
            missing.setdefault(found[2], []).append(found[1])
        else:
            others.append(note)
    words = [f"MISSING: seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} of {arm}" for arm, seeds in missing.items()]
    return [*others, *words]


def figures_command(request: ReportRequest, blocks: Sequence[FigureBlock]) -> str:
    """What draws figures of the catalogue from the runs that they are drawn from here."""
    names: dict[tuple[str, ...], list[str]] = {}
    for block in blocks:
        names.setdefault(_runs_options(request, block), []).append(block.name)
    return "; ".join(
        shlex.join(
            ["python", "-m", "t2i_lm.figures", *(word for name in several for word in ("--figure", name)), *options]
        )
        if options
        else report_command(request)
        for options, several in names.items()
    )


def table1_command(arms: Mapping[str, Run], default: str) -> str:
    """What writes Table 1 of both arms; the default where one is missing."""
    options = _pair_options(arms)
    return shlex.join(["python", "-m", "t2i_lm.figures", "--table", *options]) if {*arms} == {*ARMS} else default


def _runs_options(request: ReportRequest, block: FigureBlock) -> tuple[str, ...]:
    """The options that find a figure's runs; empty where these lie in several folders, of which none finds all."""
    own = _pair_options(block.arms) if block.name in OF_PAIR else ()
    places = {run.folder.parents[1] for run in block.arms.values() or request.pool.runs}
    if len(places) == 1:
        return ("--runs", str(*places), *own)
    return own or (() if block.arms else ("--runs", str(request.root)))


def _pair_options(arms: Mapping[str, Run]) -> tuple[str, ...]:
    return tuple(word for arm, run in arms.items() if arm in ARMS for word in (f"--{arm}", str(run.folder)))


def report_command(request: ReportRequest) -> str:
    """What writes the page."""
    plan = [] if request.plan is None else ["--plan", str(request.plan)]
    return shlex.join(["python", "-m", "t2i_lm.report", "--runs", str(request.root), *plan])


def compare_command(request: ReportRequest, comparison: Comparison) -> str:
    """What prints a comparison: the study, or `compare` with the default plan."""
    if request.plan is not None:
        return shlex.join(["python", "-m", "t2i_lm.study", str(request.plan)])
    words = setting_words(comparison.plan.where)
    return shlex.join(["python", "-m", "t2i_lm.compare", "--runs", str(request.root), *words])
