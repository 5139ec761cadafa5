"""What was found, in sentences that are made from the runs' numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t2i_lm.comparison.comparability import IncomparableError, config_values
from t2i_lm.comparison.compare import DIFFERENCE, EQUIVALENT, SMALL, Result
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.endpoints import FORGETTING, RELEARNING, TOKENS_SAVED, Endpoint
from t2i_lm.comparison.measurement import require_one_measurement
from t2i_lm.comparison.statistics import paired_statistics
from t2i_lm.comparison.tables import interval_text, sentence, value_text
from t2i_lm.evaluation.forgetting import completion_rows
from t2i_lm.plots.captions import SPLITS
from t2i_lm.plots.groups import arm_of
from t2i_lm.plots.pairing import RunPair
from t2i_lm.plots.panels import arm_style
from t2i_lm.plots.published import own_systems
from t2i_lm.plots.relearning import relearning_curves
from t2i_lm.plots.tradeoff import point_of
from t2i_lm.runtime.tables import upper_first, with_error
from t2i_lm.storage.run_folder import Run

ONE_RUN = "One run of each: no interval over seeds."
# Parts of an endpoint of forgetting in words.
TEXTS = {"text": "plain text", "second_text": "a second plain text"}
ROWS = {"text_rows": "text rows", "all_rows": "all rows"}
EARLY = 0.1  # share of the steps at which a curve is read for its plateau


def arm_label(experiment: str) -> str:
    """An arm in words: as in the figures' legends, but for "random weights", which is short enough for a table."""
    arm = arm_of(experiment)
    return "random weights" if arm == "scratch" else arm_style(arm).label


def endpoint_label(name: str) -> str:
    """An endpoint in words: held-out image loss; other names stay as they are."""
    source, *path = name.split(".")
    if source == TOKENS_SAVED:
        return f"tokens saved by {path[-1]} loss"
    if source == FORGETTING and path[-1] == "nll" and path[0] in TEXTS and path[1] in ROWS:
        at = ", best temperature" if "best_temperature" in path else ""
        return f"loss of {TEXTS[path[0]]} after training ({ROWS[path[1]]}{at})"
    if source == RELEARNING:
        return f"loss of plain text after {path[0].removeprefix('step_')} steps of relearning"
    kind, _, split = source.partition("/")
    if kind == "val" and len(path) == 2 and path[1] in ("nll", "ppl"):
        modality = "total" if path[0] == "all" else path[0]
        measure = "loss" if path[1] == "nll" else "perplexity"
        return f"held-out {modality} {measure}" + (f" ({SPLITS.get(split, split)})" if split else "")
    return name


def verdict_heading(comparison: Comparison) -> str:
    """The primary endpoint's verdict in a few words."""
    result = comparison.results[0]
    what = endpoint_label(result.endpoint.name)
    if result.verdict == DIFFERENCE:
        first, second = comparison.plan.parsed
        if result.endpoint.of_pair:
            saver = first if result.statistics.mean > 0 else second
            return f"A difference: fewer tokens are needed from {_from(saver)} for an equal loss."
        lower = first if result.statistics.mean < 0 else second
        return f"A difference: the {what} is lower from {_from(lower)}."
    if result.verdict == EQUIVALENT:
        return f"Equivalent: the {what} differs by less than the margin."
    if result.verdict == SMALL:
        return f"A difference below the margin: the {what} differs, but by less than matters."
    if result.statistics.equal:
        return "Undecided: every pair is equal; the runs may be copies."
    missing = result.missing and result.statistics.n > 1
    return "Undecided: seeds of the plan are missing." if missing else "Undecided: n too small."


def _from(experiment: str) -> str:
    label = arm_label(experiment)
    return f"{label} weights" if label == "pre-trained" else label


def result_sentence(comparison: Comparison, result: Result) -> str:
    """A result with its interval, number of pairs, margin and verdict."""
    first, second = map(arm_label, comparison.plan.parsed)
    statistics, unit = result.statistics, result.endpoint.unit
    words = f"{endpoint_label(result.endpoint.name)}: "
    if result.means is not None:
        one, two = (value_text(result, mean) for mean in result.means)
        words += f"{first} {one}, {second} {two}{f' {unit}' if unit else ''}; difference "
    words += value_text(result, statistics.mean, signed=True)
    if result.means is not None and result.means[1]:
        words += f" ({100 * statistics.mean / result.means[1]:+z.1f} % of {second})"
    level = f"{100 * (1 - comparison.plan.alpha):g} %"
    if statistics.t_interval is None:
        words += f", no interval with n = {statistics.n}"
    else:
        words += f", {level} interval {interval_text(result, statistics.t_interval)}, n = {statistics.n} pairs"
    if result.margin is not None:
        words += f", margin {value_text(result, result.margin)}"
    verdict = sentence(comparison.plan, result, arm_label)
    return f"{upper_first(words)}. Verdict: {verdict}{'' if verdict.endswith('?') else '.'}"


def comparison_sentences(
    comparison: Comparison | None, pair: Mapping[str, Run], modalities: Sequence[str]
) -> list[str]:
    """The results of some modalities' losses over seeds; of the pair alone where they were not compared."""
    sentences = []
    for modality in modalities:
        results = [
            result
            for result in (comparison.results if comparison else ())
            if result.endpoint.name.startswith("val") and result.endpoint.name.split(".")[1:] == [modality, "nll"]
        ]
        if comparison is not None and results:
            sentences += [result_sentence(comparison, result) for result in results]
        else:
            sentences += _pair_sentences(pair, modality)
    return sentences


def _pair_sentences(arms: Mapping[str, Run], modality: str) -> list[str]:
    losses = {arm: last_nll(run, modality) for arm, run in arms.items()}
    if set(losses) != {"pretrained", "scratch"} or None in losses.values():
        return []
    mine, other = losses["pretrained"], losses["scratch"]
    assert mine is not None
    assert other is not None
    what = endpoint_label(f"val.{modality}.nll")
    return [
        f"{upper_first(what)}: pre-trained {mine:.4f}, random weights {other:.4f} nats/token; difference "
        f"{mine - other:+z.4f} ({100 * (mine - other) / other:+z.1f} % of random weights), no interval with n = 1."
    ]


def start_sentence(arms: Mapping[str, Run]) -> list[str]:
    """Text loss of both arms before the first step."""
    words = []
    for arm, run in arms.items():
        lines = [line for line in run.validations() if line["step"] == 0 and "text" in line["val"]]
        if not lines:
            return []
        words.append(f"{arm_label(arm)} {lines[0]['val']['text']['nll']:.4f}")
    return [f"Held-out text loss before the first step: {', '.join(words)} nats/token."]


def own_fid_sentences(runs: Sequence[Run]) -> list[str]:
    """The FIDs of some runs."""
    own = own_systems(run.folder for run in runs)
    if not own:
        return ["No run here has been measured: the points are published values."]
    return [
        f"{one.name}: {one.fid:.2f}" + ("" if one.canonical else f", not by the usual protocol ({one.note})") + "."
        for one in own
    ]


def group_sentences(arms: Mapping[str, Run]) -> list[str]:
    """The arms with the lowest and the highest loss of images at the end, on each validation split."""
    sentences = []
    first = next(iter(arms))
    for split in arms[first].validation_splits or (None,):
        losses = {arm: nll for arm, run in arms.items() if (nll := last_nll(run, "image", split)) is not None}
        if len(losses) > 1:
            low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
            what = endpoint_label(f"val/{split}.image.nll" if split else "val.image.nll")
            sentences.append(
                f"Lowest {what}: {arm_label(low)}, {losses[low]:.4f} nats/token; highest: {arm_label(high)}, "
                f"{losses[high]:.4f}."
            )
    return [*sentences, ONE_RUN] if sentences else []


def group_rows(arms: Mapping[str, Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and rows of a table: every arm's losses at its last validation, and their distance from the first's."""
    first = next(iter(arms))
    names = arms[first].validation_splits or (None,)
    header = ["arm"]
    columns: list[dict[str, str]] = []
    for modality in ("image", "text"):
        for split in names:
            losses = {arm: nll for arm, run in arms.items() if (nll := last_nll(run, modality, split)) is not None}
            if first in losses:
                what = endpoint_label(f"val/{split}.{modality}.nll" if split else f"val.{modality}.nll")
                header += [f"{what}, nats/token", f"minus {arm_label(first)}"]
                columns.append({arm: f"{nll:.4f}" for arm, nll in losses.items()})
                columns.append({arm: f"{nll - losses[first]:+z.4f}" for arm, nll in losses.items() if arm != first})
    rows = [(arm_label(arm), *(column.get(arm, "") for column in columns)) for arm in arms]
    return tuple(header), rows if columns else []


def alignment_sentences(arms: Mapping[str, Run]) -> list[str]:
    """The contrastive loss early and at the end beside chance, the temperature at its bound, and the rows' norms."""
    sentences = []
    for arm, run in arms.items():
        lines = [line for line in run.records("train") if "all" in line["train"]]
        if not lines:
            continue
        chance = math.log(config_values(run)["data.batch_size"])
        early = next(line for line in lines if line["step"] >= EARLY * lines[-1]["step"])
        last, held_out = lines[-1]["train"]["all"]["nll"], last_nll(run, "all")
        words = f", held out {held_out:.4f}" if held_out is not None else ""
        sentences.append(
            f"{upper_first(arm_label(arm))}: loss {early['train']['all']['nll']:.4f} nats at step "
            f"{early['step']:,} and {last:.4f} at step {lines[-1]['step']:,}{words}; chance is {chance:.4f}."
        )
        bound = float(config_values(run)["align.logit_scale_max"])
        scales = [(line["step"], line["scalars"]["logit_scale"]) for line in lines if line.get("scalars")]
        clamped = next((step for step, scale in scales if scale >= 0.999 * bound), None)
        if clamped is not None:
            sentences.append(f"Its temperature is at its bound, {bound:g}, from step {clamped:,} on.")
        norms = (run.report or {}).get("row_norms", {})
        if {"image", "text"} <= norms.keys():
            sentences.append(
                f"Mean norm of its image rows {norms['image']:.2f}, of text rows {norms['text']:.2f}: a model "
                "that starts from them differs in scale, too."
            )
    return [*sentences, ONE_RUN] if sentences else []


@dataclass(frozen=True)
class _Forgotten:
    """Loss of a held-out text before and after a run's training (nats/token), of the softmax over the text rows.

    Attributes:
        name: of the text.
        before, after: the losses.
        change_se: standard error of the change over rows of text.
        best: after training, at its best temperature.
    """

    name: str | None
    before: float
    after: float
    change_se: float | None
    best: float | None


def _forgotten(run: Run) -> _Forgotten | None:
    """None for a run that did not measure it before and after training."""
    lines, before = run.records("forgetting"), run.before("forgetting")
    if before is None or len(lines) < 2:
        return None
    first, last = (line["forgetting"].get("text", {}) for line in (before, lines[-1]))
    start, end = (entry.get("text_rows", {}) for entry in (first, last))
    if "nll" not in start or "change" not in end:  # else other rows of text
        return None
    best = end.get("best_temperature", {}).get("nll")
    return _Forgotten(last.get("name"), start["nll"], end["nll"], end.get("change_se"), best)


MEASURED = Endpoint(f"{FORGETTING}.text.text_rows.nll")


def forgetting_sentences(arms: Mapping[str, Sequence[Run]], alpha: float = 0.05) -> list[str]:
    """Loss of held-out text before and after training, of one run or of several seeds of each arm.

    Args:
        arms: runs by arm.
        alpha: level of the interval over seeds.
    """
    sentences, most = [], 1
    measured = [run for runs in arms.values() for run in runs if _forgotten(run) is not None]
    try:
        require_one_measurement(MEASURED, measured)
    except IncomparableError as error:
        return [f"REFUSED: {error}."]
    for arm, runs in arms.items():
        found = [one for one in map(_forgotten, runs) if one is not None]
        if not found:
            continue
        most = max(most, len(found))
        last = found[-1]
        label = upper_first(arm_label(arm)) + (f", {last.name}" if last.name else "")
        change = float(np.mean([one.after - one.before for one in found]))
        words = f"{label}: {np.mean([one.before for one in found]):.4f} before, "
        words += f"{_over_seeds([one.after for one in found], alpha)} after; change "
        words += with_error(f"{change:+.4f}", last.change_se if len(found) == 1 else None, sign="±")
        best = [one.best for one in found if one.best is not None]
        if len(best) == len(found):
            words += f"; {_over_seeds(best, alpha)} after, at its best temperature"
        part = f" of {len(runs)}" if len(found) < len(runs) else ""
        sentences.append(f"{words}{f' (n = {len(found)}{part} seeds)' if len(runs) > 1 else ''}.")
    if not sentences:
        return []
    spread = (
        f"in brackets: {100 * (1 - alpha):g} % interval over seeds" if most > 1 else "±: standard error over its rows"
    )
    what = f"Loss of held-out text, nats/token, softmax over the text rows; {spread}."
    return [what, *sentences, *([ONE_RUN] if most == 1 else [])]


def _over_seeds(values: Sequence[float], alpha: float) -> str:
    statistics = paired_statistics(values, alpha=alpha)
    interval = statistics.t_interval
    return f"{statistics.mean:.4f}" + (f" [{interval[0]:.4f} to {interval[1]:.4f}]" if interval is not None else "")


def relearning_sentences(arms: Mapping[str, Run]) -> list[str]:
    """Held-out text loss before and after the last step on text."""
    steps, curves = relearning_curves(RunPair(arms["pretrained"], arms["scratch"]))
    words = [f"{arm_label(arm)} {losses[0]:.4f} and {losses[-1]:.4f}" for arm, losses in curves.items()]
    what = f"Held-out text loss, nats/token, before and after {steps[-1]:,} steps on text"
    return [f"{what}: {'; '.join(words)}.", ONE_RUN]


def remedy_sentences(arms: Mapping[str, Run]) -> list[str]:
    """The remedy that forgets least and the one with the lowest image loss, beside the untouched arm."""
    points = [point_of(arm, run) for arm, run in arms.items() if arm != "scratch"]
    if len(points) < 2:
        return []
    chosen = {
        "Untouched": points[0],
        "Least forgotten": min(points[1:], key=lambda point: point.text_increase),
        "Lowest image loss of a remedy": min(points[1:], key=lambda point: point.image),
    }
    return [
        *(
            f"{what}: {point.label}, text loss "
            f"{with_error(f'{point.text_increase:+.4f}', point.text_increase_se, sign='±')}, image loss "
            f"{point.image:.4f} nats/token."
            for what, point in chosen.items()
        ),
        ONE_RUN,
    ]


def completions(arms: Mapping[str, Run]) -> list[tuple[str, ...]]:
    """Arm, prompt, and its completion at the first and at the last measurement of forgetting."""
    return [
        (arm_label(arm), row["prompt"], row["original"], [*row.values()][-1])
        for arm, run in arms.items()
        if len(run.records("forgetting")) > 1
        for row in completion_rows(run)
        if row["rows"] == "text rows"
    ]


# By figure of the catalogue: sentences on its arms.
FINDINGS: dict[str, Callable[[Mapping[str, Run]], list[str]]] = {
    "5": group_sentences,
    "6": alignment_sentences,
    "inits": group_sentences,
    "forgetting": lambda arms: forgetting_sentences({arm: [run] for arm, run in arms.items()}),
    "relearning": relearning_sentences,
    "remedies": remedy_sentences,
}


def last_nll(run: Run, modality: str, split: str | None = None) -> float | None:
    """Loss of a modality (nats/token) at the last validation; None without one, and where some were not finite."""
    lines = run.validations(split)
    entry = lines[-1]["val"].get(modality, {}) if lines else {}
    return float(entry["nll"]) if "nll" in entry and not run.nonfinite else None
