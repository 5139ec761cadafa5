"""Comparability of runs: the keys that must agree, and the differences that a figure has to name."""

from dataclasses import asdict
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig, is_neutral
from t2i_lm.config.load import flatten_mapping, migrate
from t2i_lm.storage.run_folder import CONFIG, Run

# Runs of one figure agree in these.
PAIR_KEYS = ("data hash", "seed", "scale", "trainer.max_steps", "log.interval", "log.ema")
# The arm itself: every comparison is between values of these.
ARM_KEYS = ("name", "init")
# Paths whose contents the data hash covers.
HASHED = ("data.path", "data.val_path", "text_tokenizer.path", "image_tokenizer.path")
ORDER = "order of the data"
# Entries of env.json that comparable runs share, and their names in a caption.
ENVIRONMENT = {"git": "code revision", "stream_hash": ORDER, "precision": "precision"}


def mismatches(one: Run, two: Run) -> list[str]:
    """PAIR_KEYS in which two runs differ; an unknown value differs from every other."""
    mine, other = pair_values(one), pair_values(two)
    return [key for key in PAIR_KEYS if mine[key] is None or mine[key] != other[key]]


def pair_values(run: Run) -> dict[str, Any]:
    """A run's values of PAIR_KEYS, None where unknown."""
    config = _flatten(run)
    return {key: run.environment.get("data_hash") if key == "data hash" else config.get(key) for key in PAIR_KEYS}


def config_differences(one: Run, two: Run) -> dict[str, tuple[Any, Any]]:
    """Config keys whose values differ, without ARM_KEYS and neutral keys.

    A key that a run's config lacks is newer than the run and counts as its default.
    """
    known = flatten_mapping(asdict(ExperimentConfig()))
    mine, other = _flatten(one), _flatten(two)
    differing = {}
    for key in known | mine | other:
        values = mine.get(key, known.get(key)), other.get(key, known.get(key))
        if values[0] != values[1] and key not in ARM_KEYS and not is_neutral(key):
            differing[key] = values
    return differing


def uncontrolled(one: Run, two: Run, varied: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Differences of config, code and data order beyond the arm; empty in a controlled comparison.

    Args:
        one: a run.
        two: the run to compare with it.
        varied: keys, or their beginnings, in which the two differ by design.
    """
    differing = {key: values for key, values in config_differences(one, two).items() if key not in HASHED}
    for key, name in ENVIRONMENT.items():
        values = one.environment.get(key), two.environment.get(key)
        if None not in values and values[0] != values[1]:
            differing[name] = values
    return {key: values for key, values in differing.items() if not key.startswith(varied)}


def _flatten(run: Run) -> dict[str, Any]:
    """A run's config by dotted keys, with today's names."""
    return flatten_mapping(migrate(run.config, run.folder / CONFIG))
