"""Endpoints: the one number of a run, or of a pair of runs, that a comparison is about.

Names:

    val.image.nll                         metrics.jsonl: the last validation, in it image, nll; of the primary split
    val/compositional.image.nll           the same of a named split
    forgetting.text.text_rows.nll         the last record with `forgetting`
    relearning.step_60.nll                the newest `evaluate --relearn` of the run: held-out text loss after 60 steps
    report.iid.preference.color.preferred report.json
    tokens_saved.image                    of a pair: tokens that the second run needs beyond the first for an equal loss
                                          of the primary split
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2i_lm.comparison.comparability import IncomparableError, config_values
from t2i_lm.comparison.relearning import relearning_of, way_of
from t2i_lm.evaluation.relearning import POINTS
from t2i_lm.storage.run_folder import VAL, Run

REPORT, TOKENS_SAVED, FORGETTING, RELEARNING = "report", "tokens_saved", "forgetting", "relearning"
# Of a validation: modalities and aggregates, and what is known of each.
MODALITIES, LOSSES = ("text", "image", "boundary", "all", "all_no_boundary"), ("nll", "ppl")
NONFINITE = "nonfinite"  # number of losses that an entry leaves out
# Config keys that measures of the report depend on, by their part of it.
SAMPLING = ("temperature", "top_k", "top_p", "guidance", "prompts")
SETTINGS = {
    "samples": tuple(f"samples.{name}" for name in SAMPLING),
    "preference": ("samples.preference_scenes",),
}
# Units of what a name ends with; other endpoints have none.
UNITS = {"nll": "nats/token", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Endpoint:
    """A named endpoint."""

    name: str

    def __post_init__(self) -> None:
        source, *path = self.name.split(".")
        if not path:
            raise ValueError(f"endpoint {self.name!r}: expected a dotted name, such as val.image.nll")
        is_loss = len(path) == 2 and path[0] in MODALITIES and path[1] in LOSSES
        if source.partition("/")[0] == VAL and not is_loss:
            raise ValueError(
                f"endpoint {self.name!r}: expected {source}.MODALITY.nll or .ppl, MODALITY one of "
                f"{', '.join(MODALITIES)}"
            )
        steps = [f"step_{step}" for step in POINTS]
        if source == RELEARNING and (len(path) != 2 or path[0] not in steps or path[1] != "nll"):
            raise ValueError(f"endpoint {self.name!r}: expected {source}.STEP.nll, STEP one of {', '.join(steps)}")
        if source == TOKENS_SAVED and (len(path) > 1 or path[0] not in MODALITIES):
            raise ValueError(f"endpoint {self.name!r}: expected {source}. and one of {', '.join(MODALITIES)}")

    @property
    def source(self) -> str:
        """What it is read from: the first part of its name."""
        return self.name.partition(".")[0]

    @property
    def of_pair(self) -> bool:
        """Whether it is of a pair of runs rather than the difference of two values."""
        return self.source == TOKENS_SAVED

    @property
    def unit(self) -> str:
        """Unit of its values; may be empty."""
        return "tokens" if self.of_pair else UNITS.get(self.name.rpartition(".")[2], "")

    @property
    def is_loss(self) -> bool:
        """Whether lower is better."""
        return self.name.rpartition(".")[2] in UNITS and not self.of_pair

    def value(self, run: Run) -> float:
        """The value of a finished run.

        Raises:
            ValueError: if the run does not have it; names what is there instead.
        """
        source, *path = self.name.split(".")
        tree: Any = SOURCES[source](run) if source in SOURCES else _last(run, source, self.name)
        read = [source]
        for name in path:
            if not isinstance(tree, dict) or name not in tree:
                there = ", ".join(sorted(tree)) if isinstance(tree, dict) else "nothing"
                raise ValueError(f"endpoint {self.name}: {run.folder} has {there} in {'.'.join(read)}, not {name}")
            if tree.get(NONFINITE):
                raise ValueError(
                    f"endpoint {self.name}: {run.folder} has {tree[NONFINITE]:,} losses that are not finite"
                )
            tree, read = tree[name], [*read, name]
        if isinstance(tree, bool) or not isinstance(tree, int | float) or not np.isfinite(tree):
            raise ValueError(f"endpoint {self.name}: {run.folder} has {tree!r} there, expected a finite number")
        return float(tree)

    def require_one_measurement(self, runs: Sequence[Run], varied: tuple[str, ...] = ()) -> None:
        """Checks that the runs were measured alike.

        Forgetting: on equal rows of one text, or on equally many questions. Samples and caption preference of the
        report: with equal settings.

        Args:
            runs: the runs to compare.
            varied: config keys in which runs differ by design.

        Raises:
            IncomparableError: naming what each was measured on, or with.
        """
        self._require_one_setting(runs, varied)
        if self.source == RELEARNING:
            self._require_one_way(runs)
        if self.source != FORGETTING:
            return
        found = [self._measured_on(run) for run in runs]
        if len({_text_tokenizer(run) for run in runs}) > 1:
            found = [{"name": one.get("name")} for one in found]  # the others depend on the tokenizer
        if all("unigram loss" in one for one in found):
            found = [{key: value for key, value in one.items() if key != "name"} for one in found]
        for key in dict.fromkeys(key for one in found for key in one):
            counts = Counter(str(one[key]) for one in found if one.get(key) is not None)
            if len(counts) > 1:
                words = ", ".join(f"{value} ({count} runs)" for value, count in counts.items())
                raise IncomparableError(
                    f"endpoint {self.name}: forgetting was not measured on the same text: {key} {words}"
                )

    @property
    def setting_keys(self) -> tuple[str, ...]:
        """Config keys of sampling that it depends on; empty where it is measured without samples and preference."""
        source, *path = self.name.split(".")
        return next((SETTINGS[part] for part in path if source == REPORT and part in SETTINGS), ())

    def _require_one_setting(self, runs: Sequence[Run], varied: tuple[str, ...]) -> None:
        keys = [key for key in self.setting_keys if key not in varied]
        for key, values in unequal_settings(runs, keys).items():
            words = ", ".join(f"{value} ({count} runs)" for value, count in Counter(values).items())
            raise IncomparableError(f"endpoint {self.name}: the runs were not measured alike: {key} {words}")

    def _require_one_way(self, runs: Sequence[Run]) -> None:
        ways = [way_of(relearning_of(run)) | {"text tokenizer": _text_tokenizer(run)} for run in runs]
        for key in dict.fromkeys(key for way in ways for key in way):
            if len(counts := Counter(str(way.get(key)) for way in ways)) > 1:
                words = ", ".join(f"{value} ({count} runs)" for value, count in counts.items())
                raise IncomparableError(f"endpoint {self.name}: relearning was not measured in one way: {key} {words}")

    def _measured_on(self, run: Run) -> dict[str, Any]:
        """What tells apart the texts, or questions, of a run's last measurement; an older run may lack some."""
        path = self.name.split(".")[1:]
        entry: Any = _last(run, FORGETTING, self.name)
        for name in path[: 2 if path[0] == "tasks" else 1]:
            entry = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(entry, dict):
            return {}
        unigram = entry.get("floors", {}).get("unigram", {}).get("nll")
        known = {key: entry.get(key) for key in ("rows", "targets", "questions", "name")}
        known["unigram loss"] = None if unigram is None else f"{unigram:.5f}"
        return {key: value for key, value in known.items() if value is not None}

    def difference(self, first: Run, second: Run) -> float:
        """The first run's value minus the second's; of `tokens_saved`, the tokens that the first one saves."""
        if not self.of_pair:
            return self.value(first) - self.value(second)
        modality = self.name.removeprefix(f"{TOKENS_SAVED}.")
        one, two = _curve(first, modality), _curve(second, modality)
        if one[-1][0] != two[-1][0]:
            raise ValueError(
                f"endpoint {self.name}: {first.folder} and {second.folder} saw {one[-1][0]:,.0f} and {two[-1][0]:,.0f} "
                "tokens: expected equal numbers; leave it out of `secondary`"
            )
        return tokens_saved(one, two)


def unequal_settings(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, list[Any]]:
    """Each run's value of the config keys in which they differ, neutral ones too."""
    configs = [config_values(run) for run in runs]
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


# Points (tokens seen, loss) of a curve, by tokens.
Curve = Sequence[tuple[float, float]]


def tokens_saved(first: Curve, second: Curve) -> float:
    """Tokens that the second run needs beyond the first for the same loss (Hernandez et al., 2021).

    Both end at the same number of tokens. Compared at the larger of the two final losses, which both reach: at the
    end of one run, and where the running minimum of the other, interpolated between its points, first falls to it.
    Negative where the second run is the better one.
    """
    better, worse, sign = (first, second, 1) if first[-1][1] <= second[-1][1] else (second, first, -1)
    return sign * (worse[-1][0] - _tokens_to(better, worse[-1][1]))


def _tokens_to(curve: Curve, loss: float) -> float:
    """Tokens after which a curve's running minimum is first at or below a loss, which it reaches."""
    tokens, losses = np.asarray(curve, dtype=np.float64).T
    lowest = np.minimum.accumulate(losses)
    after = int(np.argmax(lowest <= loss))
    if after == 0:
        return float(tokens[0])
    share = (lowest[after - 1] - loss) / (lowest[after - 1] - lowest[after])
    return float(tokens[after - 1] + share * (tokens[after] - tokens[after - 1]))


def _curve(run: Run, modality: str) -> Curve:
    points = [
        (float(record["tokens_nominal"]), float(record[VAL][modality]["nll"]))
        for record in run.validations()
        if modality in record[VAL]
    ]
    if run.nonfinite:
        raise ValueError(f"endpoint {TOKENS_SAVED}.{modality}: {run.folder} has {run.nonfinite_words}")
    if len(points) < 2:
        raise ValueError(
            f"endpoint {TOKENS_SAVED}.{modality}: {run.folder} has {len(points)} validations of {modality}"
        )
    return points


def _text_tokenizer(run: Run) -> str:
    return str((run.environment.get("tokenizers") or {}).get("text"))


def _report(run: Run) -> Any:
    return run.report


def _relearning(run: Run) -> dict[str, Any]:
    result = relearning_of(run)
    return {
        f"step_{step}": {"nll": nll} for step, nll in zip(result["steps"], result["nll"]["run"]["nll"], strict=True)
    }


# Sources other than the last record of metrics.jsonl.
SOURCES: dict[str, Callable[[Run], Any]] = {REPORT: _report, RELEARNING: _relearning}


def _last(run: Run, kind: str, endpoint: str) -> Any:
    records = run.validations() if kind == VAL else run.records(kind)
    if not records:
        kinds = sorted({key for record in run.metrics for key, value in record.items() if isinstance(value, dict)})
        raise ValueError(f"endpoint {endpoint}: {run.folder} has no {kind} in metrics.jsonl; it has {', '.join(kinds)}")
    return records[-1][kind]
