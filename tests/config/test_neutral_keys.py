"""Keys that change the computation: for pairs of arms, for equal runs, and on resume."""

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import PLACES, REPORTED, RESUMABLE, is_neutral, is_reported
from t2i_lm.config.load import flatten

KEYS = flatten(ExperimentConfig())


@pytest.mark.parametrize(
    "key",
    [
        "trainer.devices",
        "trainer.threads",
        "trainer.packing",
        "trainer.activation_checkpointing",
        "data.workers",
        "data.cache_dir",
        "data.pad_to_multiple_of",
        "samples.guidance",
        "fid.interval",
        "forgetting.prompts",
        "run.dir",
        "allow_code",
    ],
)
def test_neutral_keys(key: str) -> None:
    assert is_neutral(key)


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "init",
        "seed",
        "data.batch_size",
        "data.part_size",  # cuts the shards, whose hashes the data hash is made of
        "trainer.fp8",
        "trainer.compile",
        "trainer.precision",
        "log.interval",
        "log.ema",
        "optim.lr",
        "backbone.path",
        "image_tokenizer.path",
    ],
)
def test_keys_that_change_curves(key: str) -> None:
    assert not is_neutral(key)


def test_measured_results_are_neutral_to_curves_but_reported() -> None:
    for key in ("samples.prompts", "fid.prompts", "forgetting.interval", "trainer.packing"):
        assert is_neutral(key)
        assert is_reported(key)
    assert not any(is_reported(key) for key in (*RESUMABLE, "run.dir", "data.cache_dir"))


def test_every_listed_key_exists_in_one_group() -> None:
    groups = (RESUMABLE, PLACES, REPORTED)
    for entry in (entry for group in groups for entry in group):
        matches = [key for key in KEYS if key == entry or (entry.endswith(".") and key.startswith(entry))]
        assert matches, entry
        assert sum(entry in group for group in groups) == 1
