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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2i_lm.comparison.relearning import relearning_of
from t2i_lm.evaluation.relearning import POINTS, RUN
from t2i_lm.storage.run_folder import VAL, Run

REPORT, TOKENS_SAVED, FORGETTING, RELEARNING = "report", "tokens_saved", "forgetting", "relearning"
FID, PROMPTS = "fid", "prompt_accuracy"  # records made during training
# Of a validation: modalities and aggregates, and what is known of each.
MODALITIES, LOSSES = ("text", "image", "boundary", "all", "all_no_boundary"), ("nll", "ppl")
NONFINITE = "nonfinite"  # number of losses that an entry leaves out
# Config keys that measures of samples depend on, by their part of the report, or source.
SAMPLING = tuple(f"samples.{name}" for name in ("temperature", "top_k", "top_p", "guidance"))
SETTINGS = {
    "samples": (*SAMPLING, "samples.prompts"),
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
        """What it is read from: the first part of its name; of what the report repeats, the record."""
        return self._parts[0]

    @property
    def path(self) -> list[str]:
        """Names in it."""
        return self._parts[1:]

    @property
    def _parts(self) -> list[str]:
        repeated = self.name.startswith(f"{REPORT}.{FORGETTING}.")
        return self.name.removeprefix(f"{REPORT}." if repeated else "").split(".")

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
        tree, read = self.tree(run), [self.source]
        for name in self.path:
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

    def tree(self, run: Run) -> Any:
        """The report, record or result that holds it.

        Raises:
            ValueError: if the run has none.
        """
        if self.source == REPORT:
            return run.report
        if self.source == RELEARNING:
            result = relearning_of(run)
            losses = zip(result["steps"], result["nll"][RUN]["nll"], strict=True)
            return {f"step_{step}": {"nll": nll} for step, nll in losses}
        return _last(run, self.source, self.name)

    @property
    def setting_keys(self) -> tuple[str, ...]:
        """Config keys of sampling that it depends on; empty where it is measured without samples and preference."""
        if self.source == PROMPTS:
            return (*SAMPLING, "samples.grid")
        return next((SETTINGS[part] for part in self.path if self.source == REPORT and part in SETTINGS), ())

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


# Points (tokens seen, loss) of a curve, by tokens.
Curve = Sequence[tuple[float, float]]


def tokens_saved(first: Curve, second: Curve) -> float:
    """Tokens that the second run needs beyond the first for the same loss (Hernandez et al., 2021).

    Both end at the same number of tokens. Compared at the larger of the two final losses, which both reach: each where
    its running minimum, interpolated between its points, first falls to it. Negative where the second run is the better
    one.
    """
    loss = max(curve[-1][1] for curve in (first, second))
    return _tokens_to(second, loss) - _tokens_to(first, loss)


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


def _last(run: Run, kind: str, endpoint: str) -> Any:
    records = run.validations() if kind == VAL else run.records(kind)
    if not records:
        kinds = sorted({key for record in run.metrics for key, value in record.items() if isinstance(value, dict)})
        raise ValueError(f"endpoint {endpoint}: {run.folder} has no {kind} in metrics.jsonl; it has {', '.join(kinds)}")
    return records[-1][kind]
