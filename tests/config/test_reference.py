"""docs/configuration.md."""

from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import flatten
from t2i_lm.config.reference import PATH, reference

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / PATH).read_text(encoding="utf-8") == reference(), f"{PATH} is stale: make docs"


def test_every_key_has_a_row() -> None:
    rows = {line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")}
    assert rows == flatten(ExperimentConfig()).keys()
