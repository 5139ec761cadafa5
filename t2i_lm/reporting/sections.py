"""Sections of the page: the paper's claim, what was found here, figures, tables, samples, and where they come from."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from t2i_lm.comparison.comparability import OF_RESULTS, IncomparableError, config_values, mismatches, pair_values
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.decay import decay_sentences
from t2i_lm.comparison.gap import gap_text
from t2i_lm.comparison.grid_tables import grid_table
from t2i_lm.comparison.tables import notes as table_notes
from t2i_lm.reporting.claims import CLAIMS, PAIR, Claim, claim_of_figure
from t2i_lm.reporting.comparison_table import ComparisonTable, comparison_table
from t2i_lm.reporting.figures import FigureBlock
from t2i_lm.reporting.findings import (
    FINDINGS,
    ONE_RUN,
    arm_label,
    comparison_sentences,
    completions,
    forgetting_sentences,
    group_rows,
    own_fid_sentences,
    result_sentence,
    start_sentence,
)
from t2i_lm.reporting.probes import find_probes, probe_command
from t2i_lm.reporting.provenance import RunFacts
from t2i_lm.reporting.request import (
    ReportRequest,
    by_arm,
    by_seed,
    compare_command,
    facts,
    figures_command,
    missing_runs,
    setting_of,
    short_notes,
    table1_command,
)
from t2i_lm.reporting.samples import SampleBlock, sample_blocks, sampling_notes, score_rows
from t2i_lm.reporting.setup import positions_of
from t2i_lm.reporting.sweeps import find_sweeps
from t2i_lm.runtime.tables import upper_first
from t2i_lm.storage.run_folder import SAMPLES, Run, is_collected
from t2i_lm.training.study_results import Results, figures_of


@dataclass
class Section:
    """A section of the page."""

    key: str
    claim: Claim
    found: list[str] = field(default_factory=list)
    figures: list[FigureBlock] = field(default_factory=list)
    tables: list[ComparisonTable] = field(default_factory=list)
    samples: list[SampleBlock] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)
    header: tuple[str, ...] = ()
    numbers: bool = False  # whether the cells beside the first are numbers
    # Header and rows of one run of each arm, beside `rows` over seeds.
    alone: tuple[tuple[str, ...], list[tuple[str, ...]]] | None = None
    notes: list[str] = field(default_factory=list)
    missing: tuple[str, str] | None = None  # reason and command
    command: str = ""
    runs: list[RunFacts] = field(default_factory=list)


def build_sections(request: ReportRequest, blocks: Sequence[FigureBlock], arms: Mapping[str, Run]) -> list[Section]:
    """The sections in order; a figure that no section names has its own at the end."""
    sections = {key: Section(key, claim) for key, claim in CLAIMS.items()}
    for block in blocks:
        key = claim_of_figure(block.name)
        if key is None:
            key = f"figure_{block.name}"
            title = block.title or f"Figure {block.name}"
            sections[key] = Section(key, Claim(title, "", "", f"python -m t2i_lm.figures --figure {block.name}"))
        sections[key].figures.append(block)
    for key, section in sections.items():
        for block in section.figures:
            if block.image is None:
                continue
            section.found += _found(block, request)
            if block.name in ("5", "inits"):
                section.header, section.rows = group_rows(block.arms)
                section.numbers = True
            section.notes += [*block.notes, *_left_out(request, section.claim, block)]
        if section.figures and all(block.image is None for block in section.figures):
            section.missing = missing_runs(section.figures[0].problem, section.claim.command)
        section.figures = [block for block in section.figures if block.image is not None]
        section.notes += _notes_on(request.pool.notes, section.claim)
        if section.figures:
            section.command = figures_command(request, section.figures)
        section.runs = facts(request, {arm: run for block in section.figures for arm, run in block.arms.items()})
        if key == "samples":
            _add_samples(request, section, arms)
        if key == "probes":
            _add_probes(request, section, arms)
        if key == "table1":
            _add_completions(request, section, blocks)
    _add_sweeps(request, sections)
    _add_grids(request, sections)
    _add_comparisons(request, sections)
    for section in sections.values():
        section.notes = list(dict.fromkeys(section.notes))
        if not (section.figures or section.tables or section.samples or section.rows) and section.missing is None:
            section.missing = ("no finished runs for this section", section.claim.command)
    return list(sections.values())


def _experiments(comparison: Comparison) -> set[str]:
    return {arm.experiment for arm in comparison.plan.parsed.values()}


def _found(block: FigureBlock, request: ReportRequest) -> list[str]:
    """Sentences on a figure."""
    primary = request.comparisons[0] if request.comparisons else None
    shown = {run.name for run in block.arms.values()}
    if primary is not None and (primary.arms is None or shown != _experiments(primary)):
        primary = None
    if block.name == "2":
        return own_fid_sentences(request.pool.runs)
    if block.name == "3":
        return comparison_sentences(primary, block.arms, ["all"])
    if block.name == "4":
        return [*start_sentence(block.arms), *comparison_sentences(primary, block.arms, ["text", "image"])]
    if block.name == "forgetting" and primary is not None:
        return forgetting_sentences(by_arm(primary), primary.plan.alpha)
    if block.name in FINDINGS and block.arms:
        return FINDINGS[block.name](block.arms)
    return []


def _left_out(request: ReportRequest, claim: Claim, block: FigureBlock) -> list[str]:
    """Finished runs of a section's experiments on other data than the runs shown.

    Raises:
        IncomparableError: if `strict`, and an arm is missing because its runs are on other data.
    """
    if not block.arms:
        return []
    reference = next(iter(block.arms.values()))
    notes = []
    for arm, name in claim.experiments.items():
        for run in request.pool.runs:
            if run.folder.parent.name != name or "data hash" not in mismatches(reference, run):
                continue
            values = [pair_values(one)["data hash"] for one in (run, reference)]
            note = f"left out, another data version: {run.folder}: data hash {values[0]} instead of {values[1]}"
            if request.strict and arm not in block.arms:
                raise IncomparableError(f"figure {block.name}: {note}")
            notes.append(note)
    return notes


def _notes_on(notes: Sequence[str], claim: Claim) -> list[str]:
    """Notes on runs of a section's experiments."""
    return [note for note in notes if any(f"/{name}/" in note for name in claim.experiments.values())]


def _add_samples(request: ReportRequest, section: Section, arms: Mapping[str, Run]) -> None:
    """The samples of the compared runs, or of the newest run that has any."""
    sampled = {name: run for name, run in arms.items() if (run.folder / SAMPLES).is_dir()}
    if not sampled:
        newest = [run for run in request.pool.runs if any((run.folder / SAMPLES).glob("grid*"))][-1:]
        sampled = {run.folder.parent.name: run for run in newest}
    if not sampled:
        return
    section.samples, notes = sample_blocks(sampled)
    section.notes += notes
    section.rows = score_rows(sampled)
    section.header = ("captions", "measure", *(arm_label(name) for name in sampled), "reconstructions: at most")
    section.notes += sampling_notes(sampled)
    seeds = {run.config["seed"] for run in sampled.values()}
    same = "; both arms sample with the same seeds" if len(sampled) > 1 and len(seeds) == 1 else ""
    section.found.append(f"Each row is of one caption{same}.")
    if section.rows:
        section.found.append(
            "Sample shows: share of generated scenes, and of reconstructions, that a checker reads as their caption "
            "says. True caption preferred: share of held-out images that are likelier under their own "
            "caption than under one with a single attribute altered; chance is 50 %. ± is the standard error over "
            f"images. {ONE_RUN}"
        )
    folder = next(iter(sampled.values())).folder
    again = ["python", "-m", "t2i_lm.evaluate", "--checkpoint", str(folder), "--report"]
    section.command = "" if is_collected(folder) else shlex.join(again)
    section.runs = facts(request, {arm_label(name): run for name, run in sampled.items()})


def _add_sweeps(request: ReportRequest, sections: Mapping[str, Section]) -> None:
    """Sweeps of one key and of two, each in its section."""
    found, notes = find_sweeps(request.search.sweep_pool())
    for number, key in enumerate(("sweeps", "grids"), start=1):
        section, sweeps = sections[key], [sweep for sweep in found if len(sweep.keys) == number]
        section.notes += notes if key == "sweeps" else []
        section.figures = [sweep.figure() for sweep in sweeps]
        section.found = [sentence for sweep in sweeps for sentence in sweep.sentences()]
        section.command = "; ".join(filter(None, (sweep.command(request.experiments) for sweep in sweeps)))
        section.runs = facts(request, {arm: run for block in section.figures for arm, run in block.arms.items()})
    if found and not sections["sweeps"].figures:
        sections["sweeps"].missing = "every sweep here is over two keys, in the next section", CLAIMS["sweeps"].command


def _add_probes(request: ReportRequest, section: Section, arms: Mapping[str, Run]) -> None:
    pool = {run.folder: run for run in (*arms.values(), *request.pool.runs)}
    probes, notes = find_probes([*pool.values()], list(arms.values()))
    section.notes += notes
    if probes is None and any(is_collected(run.folder) for run in arms.values()):
        remedy = "probe the runs themselves and collect them again with --images"
        section.missing = f"no probe of these runs: {OF_RESULTS}; {remedy}", ""
    elif probes is None:
        section.missing = "no probe of these runs", probe_command(run.folder for run in arms.values())
    else:
        section.figures = probes.figures
        section.command = "" if any(is_collected(run.folder) for run in probes.runs.values()) else probes.command
        section.found = [*probes.sentences, ONE_RUN]
        section.runs = facts(request, {arm_label(arm): run for arm, run in probes.runs.items()})


def _add_completions(request: ReportRequest, section: Section, blocks: Sequence[FigureBlock]) -> None:
    """Completions before and after training, from the measurements of forgetting."""
    block = next(block for block in blocks if block.name == "forgetting")
    section.rows = completions(block.arms)
    section.header = ("arm", "prompt", "before training", "after training")
    if section.rows:
        section.found.append("Greedy completions among the text rows, at the first and at the last measurement.")
        section.command = table1_command(block.arms, section.claim.command)
        section.runs = facts(request, block.arms)
    elif block.image is None:
        section.missing = missing_runs(block.problem, section.claim.command)


def _add_grids(request: ReportRequest, sections: dict[str, Section]) -> None:
    """The comparisons over a grid: of the arms of a claim in its section, others in their own."""
    results = request.results
    if results and results.refused and request.strict:
        raise IncomparableError(results.refused[0])
    for grid in results.grids if results else ():
        key = None if grid.family.keys else _claim_of(grid.comparisons)
        command = compare_command(request, grid.comparisons[0])
        if key is None:
            title = f"{grid.name.replace('_', ' ')}: by {' and '.join(grid.family.keys) or 'arm'}"
            key = f"grid-{grid.name}"
            sections[key] = Section(key, Claim(upper_first(title), "", "", command))
        section = sections[key]
        table = grid_table(grid)
        made = [one for one in grid.comparisons if one.arms is not None]
        curves = tuple(curve for curve in results.curves if curve.family == grid.name) if results else ()
        if made:
            if section.rows:
                section.alone = section.header, section.rows
            section.header, section.rows, section.numbers = table.header, list(table.rows), False
            section.found = [f"{upper_first(table.title)}."]  # in place of sentences on one run of each
            section.command, section.missing = command, None
        section.found += [
            *table.lines,
            *(line for one in curves for line in decay_sentences(one.decay, one.plan.alpha)),
        ]
        section.notes += table.notes
        _add_facts(
            request, section, {f"{one.name}, {label}": run for one in made for label, run in by_seed(one).items()}
        )
        tables = {f"{curve.name}_gap": gap_text(curve) for curve in curves}
        for name, heading, figure, caption in figures_of(Results((), (grid,), curves)):
            table_text = tables.get(name, "")
            section.figures.append(FigureBlock.drawn(name, heading, figure, caption, table=table_text))


def _claim_of(comparisons: Sequence[Comparison]) -> str | None:
    """The section of the paper's claim on experiments that are compared; None for others and for arms of other names.

    That is Figure 5 and initializations: the pair of Figures 3 and 4 is in several.
    """
    arms = [arm for one in comparisons for arm in one.plan.parsed.values()]
    names = {arm.experiment for arm in arms}
    if any(arm.name != arm.experiment for arm in arms) or names <= {*PAIR.values()}:
        return None
    return next((key for key in ("figure5", "inits") if names <= {*CLAIMS[key].experiments.values()}), None)


def _add_facts(request: ReportRequest, section: Section, runs: Mapping[str, Run]) -> None:
    """The facts of runs that the section does not have yet."""
    known = {one.folder for one in section.runs}
    section.runs += [one for one in facts(request, runs) if one.folder not in known]


def _add_comparisons(request: ReportRequest, sections: dict[str, Section]) -> None:
    """The comparisons beside the first one, each in the section of its subject."""
    points = {one.name for grid in (request.results.grids if request.results else ()) for one in grid.comparisons}
    for comparison in request.comparisons[1:]:
        if comparison.name in points:  # a row of its grid's table
            continue
        section = _section_of(request, comparison, sections)
        if comparison.arms is None:
            reason, command = missing_runs(str(comparison.problem), section.claim.command)
            if section.figures:
                section.notes.append(f"{comparison.name}: {reason}")
            elif section.missing is None:
                section.missing = reason, command
            continue
        first = request.comparisons[0]
        compared = [comparison]
        if section.key == "positions" and first.arms is not None and not section.tables:
            compared.insert(0, first)
        sentences = [
            (f"{setting_of(one)}: " if section.key == "positions" or one.plan.where else "")
            + result_sentence(one, one.results[0])
            for one in compared
        ]
        section.found = [*sentences, *section.found] if section.figures else [*section.found, *sentences]
        section.tables += map(comparison_table, compared)
        section.notes += short_notes(table_notes(comparison.plan, comparison.arms, comparison.results))
        section.command = section.command or compare_command(request, comparison)
        _add_facts(request, section, by_seed(comparison))


def _other_positions(first: Comparison, comparison: Comparison) -> bool:
    """Whether a comparison is of other positions than the first, as far as both are known; of missing runs, by plan."""
    usual, own = (
        positions_of(config_values(one.arms.runs[0]) if one.arms is not None else one.plan.where)
        for one in (first, comparison)
    )
    return own is not None and own != usual and (usual is not None or first.arms is None)


def _section_of(request: ReportRequest, comparison: Comparison, sections: dict[str, Section]) -> Section:
    """The section of a comparison's subject, or a new one."""
    if _other_positions(request.comparisons[0], comparison):
        return sections["positions"]
    if key := _claim_of([comparison]):
        return sections[key]
    claim = Claim(f"Comparison: {comparison.name}", "", "", compare_command(request, comparison))
    key = f"comparison-{len(sections)}"
    return sections.setdefault(key, Section(key, claim))
