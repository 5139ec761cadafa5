"""Curves and progress of a run, read from the lines of its metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from t2i_lm.storage.run_folder import VAL, Run


@dataclass(frozen=True)
class Series:
    """One arm's curve of one quantity: training values, their EMA and validation values against `tokens`.

    The axis is positions seen, or samples where a figure requests them. `val` is of the primary validation split;
    `others` holds the tokens and values of the other splits by name.
    """

    tokens: list[float]
    raw: list[float]
    ema: list[float]
    val_tokens: list[float]
    val: list[float]
    others: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done and positions seen, with (`tokens`) and without (`real`) padding."""

    step: int
    tokens: int
    real: int


def series(run: Run, modality: str, unit: str = "ppl", axis: str = "tokens_nominal") -> Series:
    """The curve of a modality as perplexity (`ppl`) or loss (`nll`); intervals without targets are left out."""
    train = [line for line in run.records("train") if unit in line["train"].get(modality, {})]
    tokens, values = _validation(run, None, modality, unit, axis)
    return Series(
        [line[axis] for line in train],
        [line["train"][modality][unit] for line in train],
        [line["train"][modality][f"{unit}_ema"] for line in train],
        tokens,
        values,
        {name: _validation(run, name, modality, unit, axis) for name in run.validation_splits[1:]},
    )


def _validation(run: Run, split: str | None, modality: str, unit: str, axis: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the validations of a split."""
    lines = [line for line in run.validations(split) if unit in line[VAL].get(modality, {})]
    return [line[axis] for line in lines], [line[VAL][modality][unit] for line in lines]


def floor_nll(runs: Iterable[Run], modality: str) -> float | None:
    """The floor of a modality's loss in nats/token, the entropy of the data; None where no report has it."""
    reports = [run.report for run in runs if run.report is not None]
    found = [report[name] for report in reports if report.get(name := f"{modality}_floor_nll") is not None]
    return float(found[0]) if found else None


def scalar_series(run: Run, name: str, axis: str = "tokens_nominal") -> Series:
    """The curve of a scalar that is logged beside the training loss, unsmoothed."""
    lines = [line for line in run.records("train") if name in line.get("scalars", {})]
    values = [line["scalars"][name] for line in lines]
    return Series([line[axis] for line in lines], values, values, [], [])


def text_series(run: Run, rows: str, text: str = "text") -> Series:
    """Perplexity of held-out text at every forgetting measurement, over `text_rows` or `all_rows`.

    The raw curve is that at the best temperature, where a run measured it.
    """
    lines = [line for line in run.records("forgetting") if rows in line["forgetting"].get(text, {})]
    tokens = [line["tokens_nominal"] for line in lines]
    entries = [line["forgetting"][text][rows] for line in lines]
    values = [entry["ppl"] for entry in entries]
    best = [math.exp(entry["best_temperature"]["nll"]) for entry in entries if "best_temperature" in entry]
    return Series(tokens, best if len(best) == len(values) else values, values, tokens, values)


def progress(run: Run) -> Progress:
    """A run's progress at its last line."""
    last = run.metrics[-1]
    return Progress(last["step"], last["tokens_nominal"], last["tokens_real"])
