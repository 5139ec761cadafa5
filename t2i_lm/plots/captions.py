"""What is written around the figures: captions, notes and the table of final numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2i_lm.plots.curves import Pair, Progress, progress
from t2i_lm.storage.run_folder import Run

# What a sentence calls each arm.
WORDS = {"pretrained": "pre-trained", "scratch": "random"}
# What a caption calls the data of each source; `{}` is the last part of data.path.
SOURCES = {
    "scenes": "procedural scenes",
    "image_folder": "image folder {}",
    "parquet": "parquet files {}",
    "webdataset": "tar files {}",
    "hub": "{} (Hugging Face)",
    "hub_stream": "{} (Hugging Face)",
}


def compact(number: float) -> str:
    """A count with the field's suffixes: 350k, 1.2M, 100B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def smoothing(pair: Pair) -> str:
    """Legend text of the smoothed curves."""
    return f"EMA {pair.pretrained.config['log']['ema']:g}"


def final_note(pair: Pair, modality: str) -> str:
    """Both arms' perplexity at their last common validation, in two lines; empty where there is none."""
    _, gaps = pair.final_gaps([modality])
    if not gaps:
        return ""
    ppl = gaps[-1]
    return f"pre-trained {_perplexity(ppl.pretrained)}\nrandom {_perplexity(ppl.scratch)} (gap {ppl.percent:+z.1f} %)"


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def pair_caption(pair: Pair) -> str:
    """What every figure of a pair states: smoothing, scale, model, seed, length, date and data."""
    run, config = pair.pretrained, pair.pretrained.config
    log = config["log"]
    step, _ = pair.final_gaps()
    seen = {arm: progress(arm_run) for arm, arm_run in pair.arms.items()}
    dates = " and ".join(sorted({_date(arm_run) for arm_run in pair.arms.values()}))
    sentences = [
        f"Raw: mean loss of {log['interval']} steps, exponentiated. EMA: constant {log['ema']:g}, "
        f"updated every {log['interval']} steps with that loss, bias-corrected, exponentiated. "
        "Validation: held-out data.",
        *([] if step is None else [f"Upper right: validation at step {step:,}, gap in percent of random."]),
        f"Scale {config['scale']}, seed {config['seed']}, backbone {_model(run)}, {_length(seen)}; runs of {dates}.",
        *[
            f"UNFINISHED: {WORDS[arm]} at step {seen[arm].step:,} of {config['trainer']['max_steps']:,}."
            for arm in pair.unfinished()
        ],
    ]
    if differing := pair.other_differences():
        words = "; ".join(f"{key}: {_short(one)} and {_short(two)}" for key, (one, two) in differing.items())
        sentences.append(f"NOT CONTROLLED, the arms (pre-trained and random) also differ in {words}.")
    sentences.append(_data(run))
    return " ".join(sentences)


def group_caption(arms: dict[str, Run], wanted: Sequence[str], how: str | None = None) -> str:
    """What a figure of several arms states: scale, model, seed, length, date, data, and who is missing.

    `how` says what is drawn; by default curves and their smoothing.
    """
    run = next(iter(arms.values()))
    log, config = run.config["log"], run.config
    seeds = sorted({arm_run.config["seed"] for arm_run in arms.values()})
    seen = {arm: progress(arm_run) for arm, arm_run in arms.items()}
    absent = [arm for arm in wanted if arm not in arms]
    unfinished = [arm for arm, arm_run in arms.items() if arm_run.report is None]
    return " ".join(
        [
            how
            or f"Raw: mean loss of {log['interval']} steps. EMA: constant {log['ema']:g}, updated every "
            f"{log['interval']} steps, bias-corrected. Validation: held-out data.",
            f"Scale {config['scale']}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}, "
            f"{_length(seen)}; runs of "
            f"{' and '.join(sorted({_date(arm_run) for arm_run in arms.values()}))}.",
            *([f"NOT RUN: {', '.join(absent)}."] if absent else []),
            *([f"UNFINISHED: {', '.join(unfinished)}."] if unfinished else []),
            _data(run),
        ]
    )


def loss_table(arms: dict[str, Run], modality: str) -> str:
    """Every arm's held-out loss at its last validation and its distance from the first arm's, as text."""
    last = {arm: run.records("val")[-1] for arm, run in arms.items() if run.records("val")}
    first = next(iter(arms))
    if first not in last:
        return f"no validation of {first} yet"
    base = last[first]["val"][modality]["nll"]
    lines = [f"{f'{modality} nll (nats)':<26}{'validation':>12}{f'- {first}':>12}{'step':>9}"]
    for arm, record in last.items():
        nll = record["val"][modality]["nll"]
        lines.append(f"{arm:<26}{nll:>12.4f}{nll - base:>+z12.4f}{record['step']:>9,}")
    return "\n".join(lines)


def _model(run: Run) -> str:
    """The backbone's name: its preset, or the last part of its path."""
    backbone = run.config["backbone"]
    name = str(backbone.get("config") or backbone.get("path") or "unnamed")
    return Path(name.removeprefix("asset:")).name


def _length(seen: dict[str, Progress]) -> str:
    """Steps and tokens, once where all arms are equally long; what is no pad may differ (replayed text has none)."""
    if len(seen) > 1 and len({(one.step, one.tokens) for one in seen.values()}) == 1:
        one, real = next(iter(seen.values())), sorted(arm.real for arm in seen.values())
        range_of = compact(real[0]) if real[0] == real[-1] else f"{compact(real[0])} to {compact(real[-1])}"
        return f"{one.step:,} steps and {compact(one.tokens)} tokens ({range_of} without pads) in each arm"
    spans = {
        arm: f"{one.step:,} steps and {compact(one.tokens)} tokens ({compact(one.real)} without pads)"
        for arm, one in seen.items()
    }
    if len(set(spans.values())) == 1:
        return f"{next(iter(spans.values()))} in each arm"
    return ", ".join(f"{WORDS.get(arm, arm)}: {span}" for arm, span in spans.items())


def _data(run: Run) -> str:
    """Name, size and hash of the data, and that it is not the paper's."""
    data = run.config["data"]
    name = SOURCES.get(data["source"], data["source"]).format(Path(str(data.get("path"))).name)
    pairs = run.environment.get("train_samples")
    size = f", {pairs:,} training pairs" if pairs else ""
    other = "other data" if run.config["scale"] == "paper" else "other data at another size"
    return (
        f"Data: {name}{size}, hash {run.environment['data_hash']}. The paper's data (HQITP-134M) "
        f"are private: these are {other}, so compare orderings and shapes, not values."
    )


def _short(value: Any) -> str:
    """A config value in a few letters: a path by its last part, a hash by its beginning."""
    text = Path(value).name if isinstance(value, str) else str(value)
    return text[:12]


def _date(run: Run) -> str:
    """The day that a run folder is named after."""
    name = run.folder.name
    return f"{name[:4]}-{name[4:6]}-{name[6:8]}" if name[:8].isdigit() else name


def gap_table(pair: Pair) -> str:
    """Both arms' final held-out values and the gap, as text."""
    step, rows = pair.final_gaps()
    if step is None:
        return "no validation that both arms have reached"
    head = f"{f'validation at step {step}':<26}{'pretrained':>12}{'random':>12}{'gap':>12}{'gap %':>9}"
    lines = [head]
    for gap in rows:
        unit = " (nats/token)" if gap.quantity.endswith("nll") else ""
        values = f"{gap.pretrained:>12.4f}{gap.scratch:>12.4f}{gap.absolute:>+z12.4f}"
        lines.append(f"{gap.quantity + unit:<26}{values}{gap.percent:>+z9.2f}")
    return "\n".join([*lines, "gap: pretrained minus random, in percent of random"])
