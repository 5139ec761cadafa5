"""Text around the figures: captions, notes and tables of final values."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_lm.comparison.arms import precision_note
from t2i_lm.comparison.comparability import differences, revision_note
from t2i_lm.plots.curves import Progress, progress
from t2i_lm.plots.pairing import RunPair, run_label
from t2i_lm.runtime.tables import compact, text_table, upper_first
from t2i_lm.storage.run_folder import VAL, Run

# Names of the arms of a pair in a sentence.
ARM_NAMES = {"pretrained": "pre-trained", "scratch": "random"}
# What the validation splits are: of scenes, and with data.second_val_path.
SPLITS = {
    "iid": "new images of trained color-shape pairs",
    "compositional": "color-shape pairs that training never shows",
    "first": "the first held-out set",
    "second": "the second held-out set",
}
HELD_OUT = "held-out data"
NAMED = 4  # most arms that a sentence lists by name
# Names of data sources in a caption; `{}` is the last part of data.path.
SOURCES = {
    "scenes": "procedural scenes",
    "image_folder": "image folder {}",
    "parquet": "parquet files {}",
    "webdataset": "tar files {}",
    "hub": "{} (Hugging Face)",
    "hub_stream": "{} (Hugging Face)",
    "shards": "token shards {}",
}


def smoothing(run: Run) -> str:
    """Legend text of the smoothed curves."""
    return f"EMA {run.config['log']['ema']:g}"


def lag(run: Run) -> str:
    """How far the smoothed curves are behind: the mean age of what they average, in optimizer steps."""
    log = run.config["log"]
    steps = log["interval"] * log["ema"] / (1 - log["ema"])
    return f", about {steps:,.0f} steps behind the raw loss" if steps else ""


def final_note(pair: RunPair, modality: str) -> str:
    """Both arms' perplexity at their last common validation, in two lines; empty without one."""
    _, gaps = pair.final_gaps([modality])
    if not gaps:
        return ""
    ppl = gaps[-1]
    return f"pre-trained {_perplexity(ppl.pretrained)}\nrandom {_perplexity(ppl.scratch)} (gap {ppl.percent:+z.1f} %)"


def validation_sentence(splits: Sequence[str]) -> str:
    """What the validation markers show."""
    if not splits:
        return "Validation: held-out data."
    first, *others = splits
    return (
        f"Validation: {first}, {SPLITS.get(first, HELD_OUT)} (filled)"
        + "".join(f"; {name}, {SPLITS.get(name, HELD_OUT)} (hollow)" for name in others)
        + "."
    )


def _validation(pair: RunPair) -> str:
    return " ".join([*pair.validation_splits[:1], "validation"])


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def pair_caption(pair: RunPair, by_design: tuple[str, ...] = ()) -> str:
    """Sentences on smoothing, scale, seed, model, length, dates, differences and data of a pair.

    Args:
        pair: the runs.
        by_design: config keys, or their beginnings, in which they differ by design.
    """
    run, config = pair.pretrained, pair.pretrained.config
    log = config["log"]
    step, _ = pair.final_gaps()
    seen = {arm: progress(arm_run) for arm, arm_run in pair.arms.items()}
    sentences = [
        f"Raw: mean loss of {log['interval']} steps, exponentiated. EMA: constant {log['ema']:g}, "
        f"updated every {log['interval']} steps with that loss, bias-corrected, exponentiated{lag(run)}. "
        f"{validation_sentence(pair.validation_splits)}",
        *([] if step is None else [f"Upper right: {_validation(pair)} at step {step:,}, gap in percent of random."]),
        f"Scale {config['scale']}, seed {config['seed']}, {_rates(pair.arms.values())}, "
        f"backbone {_model(run)}, {_length(seen)}; runs of {_dates(pair.arms.values())}.",
        *[
            f"UNFINISHED: {ARM_NAMES[arm]} at step {seen[arm].step:,} of {config['trainer']['max_steps']:,}."
            for arm in pair.unfinished()
        ],
        *_nonfinite({ARM_NAMES[arm]: arm_run for arm, arm_run in pair.arms.items()}),
    ]
    differing: dict[str, list[str]] = {"By design": [], "NOT CONTROLLED": []}
    for key, (one, two) in pair.uncontrolled().items():
        kind = "By design" if key.startswith(by_design) else "NOT CONTROLLED"
        differing[kind].append(f"{key}: {_short(one)} and {_short(two)}")
    sentences += [
        f"{kind}, the arms (pre-trained and random) also differ in {'; '.join(words)}."
        for kind, words in differing.items()
        if words
    ]
    sentences += [*_revisions(pair.arms.values()), _data(run)]
    return " ".join(sentences)


def group_caption(
    arms: Mapping[str, Run], expected: Iterable[str] = (), varied: tuple[str, ...] = (), how: str | None = None
) -> str:
    """Sentences on scale, seeds, length, dates, missing arms, uncontrolled differences and data of several arms.

    Args:
        arms: runs by arm, the reference first.
        expected: arms that the figure should have; missing ones are named.
        varied: config keys, or their beginnings, in which arms differ by design.
        how: the first sentences; None for those on curves and their smoothing.
    """
    run = next(iter(arms.values()))
    log, config = run.config["log"], run.config
    seeds = sorted({arm_run.config["seed"] for arm_run in arms.values()})
    seen = {arm: progress(arm_run) for arm, arm_run in arms.items()}
    absent = [arm for arm in expected if arm not in arms]
    unfinished = [arm for arm, arm_run in arms.items() if arm_run.report is None]
    differing = _differences(arms, varied)
    return " ".join(
        [
            how
            or f"Raw: mean loss of {log['interval']} steps. EMA: constant {log['ema']:g}, updated every "
            f"{log['interval']} steps, bias-corrected{lag(run)}. {validation_sentence(run.validation_splits)}",
            f"Scale {config['scale']}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}, "
            f"{_rates(arms.values())}, {_length(seen)}; runs of {_dates(arms.values())}.",
            *([f"NO RUN OF THIS SETTING: {', '.join(absent)}."] if absent else []),
            *([f"UNFINISHED: {', '.join(unfinished)}."] if unfinished else []),
            *_nonfinite(arms),
            *(f"{upper_first(note)}." for note in precision_note(arms.values())),
            *([f"NOT CONTROLLED, arms also differ from {next(iter(arms))} in {differing}."] if differing else []),
            *_revisions(arms.values()),
            _data(run),
        ]
    )


def _rates(runs: Iterable[Run]) -> str:
    rates = sorted({run.config["optim"]["lr"] for run in runs})
    return f"learning rate{'s' if len(rates) > 1 else ''} {', '.join(f'{rate:g}' for rate in rates)}"


def _nonfinite(arms: Mapping[str, Run]) -> list[str]:
    """A sentence for each run whose validation losses leave some out."""
    return [f"LEFT OUT of {arm}: {run.nonfinite_words}." for arm, run in arms.items() if run.nonfinite]


def _revisions(runs: Iterable[Run]) -> list[str]:
    """A sentence where runs are of several code revisions."""
    return [f"{upper_first(note)}." for note in revision_note(runs)]


def _differences(arms: Mapping[str, Run], varied: tuple[str, ...]) -> str:
    """Uncontrolled differences from the first arm: `key: its value and another (arms with that)`; empty if none."""
    others = list(arms)[1:]
    differing: dict[str, dict[str, list[str]]] = {}
    for key, (own, *values) in differences(list(arms.values()), varied, paired=True).items():
        for arm, value in zip(others, values, strict=True):
            if value != own:
                differing.setdefault(f"{key}: {_short(own)}", {}).setdefault(_short(value), []).append(arm)
    return "; ".join(
        f"{key} and {', '.join(f'{value} ({_listed(names)})' for value, names in values.items())}"
        for key, values in differing.items()
    )


def _listed(arms: Sequence[str]) -> str:
    return ", ".join(arms) if len(arms) <= NAMED else f"{', '.join(arms[: NAMED - 1])} and {len(arms) - NAMED + 1} more"


def loss_table(arms: Mapping[str, Run], modality: str, unit: str = "nats/token") -> str:
    """Every arm's held-out loss at its last validation and its distance from the first arm's; a table per split."""
    first, reference = next(iter(arms.items()))
    tables = []
    for split in reference.validation_splits or (None,):
        last = {arm: records[-1] for arm, run in arms.items() if (records := run.validations(split))}
        if first not in last:
            return f"no validation of {first} yet"
        losses = {arm: record[VAL].get(modality, {}).get("nll") for arm, record in last.items()}
        base = losses[first]
        rows = [
            (
                arm,
                "not finite" if nll is None else f"{nll:.4f}",
                "" if nll is None or base is None else f"{nll - base:+z.4f}",
                f"{last[arm]['step']:,}",
            )
            for arm, nll in losses.items()
        ]
        what = " ".join(filter(None, [split, "validation"]))
        tables.append(text_table((f"{modality} nll ({unit})", what, f"- {first}", "step"), rows))
    return "\n\n".join(tables)


def gap_table(pair: RunPair) -> str:
    """Both arms' final held-out values and the gap; a table per validation split."""
    tables = []
    for split in pair.validation_splits or (None,):
        step, gaps = pair.final_gaps(split=split)
        if step is None:
            return "no validation that both arms have reached"
        rows = [
            (
                gap.quantity + (" (nats/token)" if gap.quantity.endswith("nll") else ""),
                f"{gap.pretrained:.4f}",
                f"{gap.scratch:.4f}",
                f"{gap.absolute:+z.4f}",
                f"{gap.percent:+z.2f}",
            )
            for gap in gaps
        ]
        title = " ".join(filter(None, [split, f"validation at step {step}"]))
        tables.append(text_table((title, "pretrained", "random", "gap", "gap %"), rows))
    last = [
        "gap: pretrained minus random, in percent of random",
        f"runs: {', '.join(map(run_label, pair.arms.values()))}",
    ]
    return "\n".join(["\n\n".join(tables), *last])


def _model(run: Run) -> str:
    """The backbone's name: its preset, or the last part of its path."""
    backbone = run.config["backbone"]
    name = str(backbone.get("config") or backbone.get("path") or "unnamed")
    return Path(name.removeprefix("asset:")).name


def _length(seen: Mapping[str, Progress]) -> str:
    """Steps and tokens, once if all arms are equally long; tokens without pads may differ (replayed text has none)."""
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
    if len(spans) > NAMED:
        steps, tokens = ({getattr(one, name) for one in seen.values()} for name in ("step", "tokens"))
        return f"{_range(steps, '{:,}'.format)} steps and {_range(tokens, compact)} tokens"
    return ", ".join(f"{ARM_NAMES.get(arm, arm)}: {span}" for arm, span in spans.items())


def _range(values: Collection[int], write: Callable[[int], str]) -> str:
    least, most = min(values), max(values)
    return write(least) if least == most else f"{write(least)} to {write(most)}"


def _data(run: Run) -> str:
    """Name, size and hash of the data, and the difference from the paper's."""
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
    """A config value in at most 12 characters: the last part of a path, the beginning of a hash."""
    text = Path(value).name if isinstance(value, str) else str(value)
    return text[:12]


def _dates(runs: Iterable[Run]) -> str:
    """The first and the last day in the names of run folders."""
    names = [run.folder.name for run in runs]
    days = sorted({f"{name[:4]}-{name[4:6]}-{name[6:8]}" if name[:8].isdigit() else name for name in names})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
