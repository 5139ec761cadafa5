"""Names in the config equal their implementations."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from callbacks.metrics.inception import WIDTHS
from t2i_lm.config import experiment, image_tokenizer, key_groups, sections
from t2i_lm.config.experiment import SCALES
from t2i_lm.data.code_words import CHOICES
from t2i_lm.data.sources import SOURCES
from t2i_lm.experiment.build import TASKS
from t2i_lm.models.cross_entropy import BACKENDS
from t2i_lm.models.expand import ROW_RULES
from t2i_lm.models.factory import INITIALIZATIONS
from t2i_lm.modules.optim import OPTIMIZERS
from t2i_lm.plots import captions
from t2i_lm.runtime.plugins import KINDS
from t2i_lm.tokenizers.movqgan import SIZES

OVERLAYS = Path(__file__).parents[2] / "experiments" / "scale"
OF_PAIRS = [source for source in sections.SOURCES if source != "text"]


@pytest.mark.parametrize(
    ("names", "implementations"),
    [
        pytest.param(experiment.TASKS, TASKS, id="tasks"),
        pytest.param(experiment.INITS, INITIALIZATIONS, id="inits"),
        pytest.param(experiment.NEW_ROWS, ROW_RULES, id="new rows"),
        pytest.param(OF_PAIRS, SOURCES, id="sources"),
        pytest.param(OF_PAIRS, captions.SOURCES, id="captions of sources"),
        pytest.param(sections.OPTIMIZERS, OPTIMIZERS, id="optimizers"),
        pytest.param(sections.LOSS_BACKENDS, BACKENDS, id="loss backends"),
        pytest.param(image_tokenizer.MOVQGAN_SIZES, SIZES.values(), id="MoVQGAN sizes"),
        pytest.param(image_tokenizer.CODE_WORDS, CHOICES, id="words of codes"),
        pytest.param(sections.FID_FEATURES, WIDTHS, id="FID features"),
        pytest.param(SCALES, [file.stem for file in OVERLAYS.glob("*.yaml")], id="scales"),
        pytest.param(key_groups.PLUGIN_KEYS, KINDS, id="plug-ins"),
    ],
)
def test_names_in_the_config_equal_the_implementations(
    names: Collection[Any], implementations: Collection[Any]
) -> None:
    assert sorted(names) == sorted(implementations)


def test_sources_opened_by_path_are_sources() -> None:
    assert set(sections.OPENED_BY_PATH) < set(sections.SOURCES)


def test_every_section_knows_its_prefix() -> None:
    def check(section: Any, prefix: str) -> None:
        assert section.prefix == prefix
        for key in fields(section):
            if is_dataclass(value := getattr(section, key.name)):
                check(value, f"{prefix}{key.name}.")

    check(experiment.ExperimentConfig(), "")
