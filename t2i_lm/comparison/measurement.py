"""Whether the values of an endpoint were measured alike: on the same text, of as many samples, with equal settings."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t2i_lm.comparison.comparability import IncomparableError, config_values, environment_value
from t2i_lm.comparison.endpoints import (
    FID,
    FORGETTING,
    LOSSES,
    MODALITIES,
    PROMPTS,
    RELEARNING,
    SAMPLING,
    TOKENS_SAVED,
    Endpoint,
)
from t2i_lm.comparison.relearning import relearning_of, way_of
from t2i_lm.comparison.study_plan import STEPS
from t2i_lm.storage.run_folder import Run

# Tokenizers that the loss of a modality depends on.
TOKENIZERS = {"text": ("text",), "image": ("image",)}
BITS_PER_BYTE = "bits_per_byte"
# Of a record of FID: what it depends on beside the model.
FID_KEYS = (*SAMPLING, *(f"fid.{name}" for name in ("coco", "weights", "features", "prompts")))


def require_one_measurement(endpoint: Endpoint, runs: Sequence[Run], varied: tuple[str, ...] = ()) -> None:
    """Checks that runs were measured alike.

    Forgetting: on equal rows of one text, or on equally many questions. Relearning: on the same texts. FID, samples and
    caption preference: with equal settings and, during training, at the same step.

    Args:
        endpoint: what is compared.
        runs: the runs to compare.
        varied: config keys in which runs differ by design.

    Raises:
        IncomparableError: naming what each was measured on, or with.
    """
    keys = [key for key in (FID_KEYS if endpoint.source == FID else endpoint.setting_keys) if key not in varied]
    ways = _settings(runs, keys)
    if endpoint.source in (FID, PROMPTS) and STEPS not in varied:
        steps = [next((one.get("step") for one in reversed(run.records(endpoint.source))), None) for run in runs]
        ways = [way | {"step": step} for way, step in zip(ways, steps, strict=True)]
    if endpoint.source == FORGETTING:
        ways = [way | found for way, found in zip(ways, _held_out(endpoint, runs), strict=True)]
    if endpoint.source == RELEARNING:
        ways = [way | way_of(relearning_of(run)) for way, run in zip(ways, runs, strict=True)]
    for key, values in _unequal(ways).items():
        counts = _counts(values)
        raise IncomparableError(f"endpoint {endpoint.name}: the runs were not measured alike: {key} {counts}")


def require_one_tokenizer(endpoint: Endpoint, runs: Sequence[Run]) -> None:
    """Checks that losses per token are of equal tokens.

    Raises:
        IncomparableError: if the tokenizers of the endpoint's modality differ.
    """
    for kind in _tokenizers_of(endpoint):
        hashes = [environment_value(run, f"tokenizers.{kind}") for run in runs]
        if len({str(one) for one in hashes if one is not None}) > 1:
            advice = f"; {BITS_PER_BYTE} compares" if endpoint.source == FORGETTING else ""
            raise IncomparableError(
                f"endpoint {endpoint.name}: is per token, and runs have different {kind} tokenizers: "
                f"{_counts(hashes)}{advice}"
            )


def unequal_settings(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, list[Any]]:
    """Each run's value of the config keys in which they differ, neutral ones too."""
    return _unequal(_settings(runs, tuple(keys)))


def _settings(runs: Sequence[Run], keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{key: config.get(key) for key in keys} for config in map(config_values, runs)]


def _counts(values: Iterable[Any]) -> str:
    return ", ".join(f"{value} ({count} runs)" for value, count in Counter(map(str, values)).items())


def _unequal(ways: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    values = {key: [way.get(key) for way in ways] for key in dict.fromkeys(key for way in ways for key in way)}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _tokenizers_of(endpoint: Endpoint) -> tuple[str, ...]:
    if endpoint.source == RELEARNING:
        return ("text",)
    *_, before, last = endpoint.name.split(".")
    if endpoint.source == FORGETTING:
        return ("text",) if endpoint.path[0].endswith("text") and last != BITS_PER_BYTE else ()
    modality = last if endpoint.source == TOKENS_SAVED else before if last in LOSSES else ""
    return TOKENIZERS.get(modality, ("text", "image")) if modality in MODALITIES else ()


def _held_out(endpoint: Endpoint, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What tells apart the texts, or questions, of each run's last measurement; an older run may lack some."""
    found = [_measured_on(endpoint, run) for run in runs]
    if len({str(environment_value(run, "tokenizers.text")) for run in runs}) > 1:
        found = [{"name": one.get("name")} for one in found]  # the others depend on the tokenizer
    if all("unigram loss" in one for one in found):
        found = [{key: value for key, value in one.items() if key != "name"} for one in found]
    # What an older run does not say is no difference.
    known = {key: [one[key] for one in found if one.get(key) is not None] for one in found for key in one}
    return [{key: one.get(key, next(iter(values), None)) for key, values in known.items()} for one in found]


def _measured_on(endpoint: Endpoint, run: Run) -> dict[str, Any]:
    entry: Any = endpoint.tree(run)
    for name in endpoint.path[: 2 if endpoint.path[0] == "tasks" else 1]:
        entry = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(entry, dict):
        return {}
    unigram = entry.get("floors", {}).get("unigram", {}).get("nll")
    known = {key: entry.get(key) for key in ("rows", "targets", "questions", "name")}
    known["unigram loss"] = None if unigram is None else f"{unigram:.5f}"
    return {key: value for key, value in known.items() if value is not None}
