"""Results of a comparison as text, JSON and LaTeX."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from t2i_lm.comparison.arms import Arms
from t2i_lm.comparison.comparability import revisions
from t2i_lm.comparison.compare import DIFFERENCE, SMALL, UNDECIDED, Result
from t2i_lm.comparison.plan import Plan
from t2i_lm.comparison.statistics import BOOTSTRAP_MIN, POWER
from t2i_lm.runtime.tables import compact, latex_table, text_table


def text(plan: Plan, arms: Arms, results: Sequence[Result]) -> str:
    """Two tables, differences and sizes of the samples, and notes below them."""
    first, second = plan.parsed
    level = f"{100 * (1 - plan.alpha):g} %"
    header = ("endpoint", first, second, "difference", f"{level} t-interval", "bootstrap", "p", "margin", "TOST p", "")
    tested = [
        (
            _name(one),
            *(_value_texts(one, one.means) if one.means else ("", "")),
            value_text(one, one.statistics.mean, signed=True),
            interval_text(one, one.statistics.t_interval),
            interval_text(one, one.statistics.bootstrap_interval),
            p_text(one.statistics.p_difference),
            "" if one.margin is None else value_text(one, one.margin),
            p_text(one.statistics.p_equivalence),
            sentence(plan, one),
        )
        for one in results
    ]
    sizes = [
        (
            one.endpoint.name,
            str(one.statistics.n),
            "" if one.statistics.sd is None else value_text(one, one.statistics.sd),
            "" if one.rounding_sd is None else value_text(one, one.rounding_sd),
            _needed_text(one.needed_difference),
            _needed_text(one.needed_equivalence),
        )
        for one in results
    ]
    power = f"for {100 * POWER:g} % power"
    head = ("endpoint", "pairs", "SD of differences", "SD of rounding", f"pairs {power}", "for equivalence")
    return "\n".join(
        [
            f"{first} - {second}, paired by seed: {setting(plan, arms)}",
            "",
            text_table(header, tested, left=(0, len(header) - 1)),
            "",
            text_table(head, sizes),
            "",
            *notes(plan, arms, results),
        ]
    )


def sentence(plan: Plan, result: Result, label: Callable[[str], str] = str) -> str:
    """The verdict of a result in words; `label` names an arm."""
    first, second = map(label, plan.parsed)
    if result.verdict in (DIFFERENCE, SMALL):
        lower = first if (result.statistics.mean < 0) != result.endpoint.of_pair else second
        words = f"{lower} saves tokens" if result.endpoint.of_pair else f"{lower} is lower"
        return f"{words}, by less than the margin" if result.verdict == SMALL else words
    if result.statistics.n < 2:
        return f"{UNDECIDED}, one pair"
    if result.missing:
        return f"{UNDECIDED}, {_missing(result)}"
    if result.statistics.equal:
        return f"{UNDECIDED}, equal in every pair: copies?"
    return result.verdict


def as_json(plan: Plan, arms: Arms, results: Sequence[Result]) -> str:
    """Plan, results, revisions and run folders as JSON."""
    content = {
        "plan": asdict(plan),
        "seeds": arms.seeds,
        "data_hash": arms.runs[0].environment.get("data_hash"),
        "git": revisions(arms.runs),
        "notes": arms.notes,
        "results": [
            {
                "endpoint": one.endpoint.name,
                "unit": one.endpoint.unit,
                "primary": one.primary,
                "means": one.means,
                "differences": one.differences,
                "margin": one.margin,
                **asdict(one.statistics),
                "rounding_sd": one.rounding_sd,
                "needed_difference": one.needed_difference,
                "needed_equivalence": one.needed_equivalence,
                "verdict": one.verdict,
            }
            for one in results
        ],
        "runs": sorted(str(run.folder) for run in arms.runs),
    }
    return json.dumps(content, indent=2)


def latex(plan: Plan, arms: Arms, results: Sequence[Result]) -> str:
    """A `tabular` in the style of booktabs, under a comment with the setting."""
    level = f"{100 * (1 - plan.alpha):g} % interval"
    header = ("endpoint", *plan.parsed, "difference", level, "p", "TOST p", "verdict")
    rows = [
        (
            _name(one),
            *(_value_texts(one, one.means) if one.means else ("", "")),
            value_text(one, one.statistics.mean, signed=True),
            interval_text(one, one.statistics.t_interval),
            p_text(one.statistics.p_difference),
            p_text(one.statistics.p_equivalence),
            sentence(plan, one),
        )
        for one in results
    ]
    comments = [f"% {line}" for line in (setting(plan, arms), *notes(plan, arms, results))]
    return "\n".join([*comments, latex_table(header, rows, "lrrrrrrl")])


FORMATS: dict[str, Callable[[Plan, Arms, Sequence[Result]], str]] = {"text": text, "json": as_json, "latex": latex}


def setting(plan: Plan, arms: Arms) -> str:
    """Seeds, scale, values of `where` and data of a comparison, in a line."""
    seeds = ", ".join(map(str, arms.seeds))
    return (
        f"{len(arms.seeds)} seed{'s' * (len(arms.seeds) > 1)} ({seeds}), scale {plan.scale}{plan.values_words}, "
        f"data hash {arms.runs[0].environment.get('data_hash')}"
    )


def notes(plan: Plan, arms: Arms, results: Sequence[Result]) -> list[str]:
    """Sentences below the tables: what the verdict rests on, and what was left out."""
    notes = [
        f"primary endpoint: {plan.primary}, margin {plan.margin}; p-values of the others are corrected for their "
        "number (Holm), intervals are not"
    ]
    if len(arms.seeds) < BOOTSTRAP_MIN:
        notes.append(f"bootstrap: requires {BOOTSTRAP_MIN} seeds")
    primary = results[0]
    if primary.missing and primary.statistics.n > 1:
        notes.append(f"no verdict: {_missing(primary)}, and a part of the planned seeds is no test at this level")
    elif primary.statistics.equal:
        notes.append(f"no verdict: {plan.primary} is equal in all {primary.statistics.n} pairs: copies?")
    elif primary.verdict == UNDECIDED:
        needed = " or ".join(
            f"{pairs:,} to {what}"
            for pairs, what in (
                (primary.needed_difference, "find this difference"),
                (primary.needed_equivalence, "show equivalence"),
            )
            if pairs is not None
        )
        enough = f"; pairs for {100 * POWER:g} % power: {needed}" if needed else ""
        notes.append(f"n = {primary.statistics.n} is too small for a verdict on {plan.primary}{enough}")
    return [*notes, *arms.notes]


def _missing(result: Result) -> str:
    return f"{result.missing} of {result.missing + result.statistics.n} seeds missing"


def _name(result: Result) -> str:
    unit = f" ({result.endpoint.unit})" if result.endpoint.unit else ""
    return f"{result.endpoint.name}{unit}{' *' if result.primary else ''}"


def _value_texts(result: Result, values: Sequence[float]) -> tuple[str, ...]:
    """Values of a result's endpoint, each as `value_text`."""
    return tuple(value_text(result, value) for value in values)


def value_text(result: Result, value: float, signed: bool = False) -> str:
    """A value of a result's endpoint, in its usual digits."""
    sign = "+" if signed and value >= 0 else ""
    return f"{sign}{compact(value) if result.endpoint.of_pair else f'{value:.4f}'}"


def interval_text(result: Result, interval: tuple[float, float] | None) -> str:
    """An interval of a result's endpoint; empty for None."""
    return "" if interval is None else f"{value_text(result, interval[0])} to {value_text(result, interval[1])}"


def p_text(value: float | None) -> str:
    """A p-value; empty for None."""
    return "" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _needed_text(pairs: int | None) -> str:
    """A number of pairs; empty for None."""
    return "" if pairs is None else f"{pairs:,}"
