"""Curves and progress of a run, read from the lines of its metrics.jsonl."""

from dataclasses import dataclass

from t2i_lm.storage.run_folder import Run


@dataclass(frozen=True)
class Series:
    """One arm's curve of one quantity: training values, their EMA and validation values against `tokens`.

    The axis is positions seen, or samples where a figure requests them.
    """

    tokens: list[float]
    raw: list[float]
    ema: list[float]
    val_tokens: list[float]
    val: list[float]


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done and positions seen, with (`tokens`) and without (`real`) padding."""

    step: int
    tokens: int
    real: int


def series(run: Run, modality: str, unit: str = "ppl", axis: str = "tokens_nominal") -> Series:
    """The curve of a modality as perplexity (`ppl`) or loss (`nll`); intervals without targets are left out."""
    train = [line for line in run.records("train") if unit in line["train"].get(modality, {})]
    val = [line for line in run.records("val") if unit in line["val"].get(modality, {})]
    return Series(
        [line[axis] for line in train],
        [line["train"][modality][unit] for line in train],
        [line["train"][modality][f"{unit}_ema"] for line in train],
        [line[axis] for line in val],
        [line["val"][modality][unit] for line in val],
    )


def scalar_series(run: Run, name: str, axis: str = "tokens_nominal") -> Series:
    """The curve of a scalar that is logged beside the training loss, unsmoothed."""
    lines = [line for line in run.records("train") if name in line.get("scalars", {})]
    values = [line["scalars"][name] for line in lines]
    return Series([line[axis] for line in lines], values, values, [], [])


def text_series(run: Run, rows: str) -> Series:
    """Perplexity of held-out text at every forgetting measurement, over `text_rows` or `all_rows`."""
    lines = [line for line in run.records("forgetting") if rows in line["forgetting"]["text"]]
    tokens = [line["tokens_nominal"] for line in lines]
    values = [line["forgetting"]["text"][rows]["ppl"] for line in lines]
    return Series(tokens, values, values, tokens, values)


def progress(run: Run) -> Progress:
    """A run's progress at its last line."""
    last = run.metrics[-1]
    return Progress(last["step"], last["tokens_nominal"], last["tokens_real"])
