"""A change of arithmetic shows: the losses of every shipped experiment are those of golden_losses.json."""

import json

import pytest
import torch

from tests.golden_losses import FILE, NAMES, STEPS, train_all

GOLDEN = json.loads(FILE.read_text())
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return train_all(tmp_path_factory.mktemp("golden"))


def test_every_shipped_experiment_has_golden_losses() -> None:
    assert sorted(GOLDEN["losses"]) == NAMES
    assert all(len(losses) == STEPS for losses in GOLDEN["losses"].values())


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_golden_ones(name: str, found: dict[str, list[float]]) -> None:
    if name not in found:
        pytest.skip("requires peft")
    expected = GOLDEN["losses"][name]
    assert found[name] == pytest.approx(expected, rel=1e-4), (
        f"{name} computes other losses than when {FILE.name} was written (torch {GOLDEN['torch']}, now "
        f"{torch.__version__}); if that is meant: {GOLDEN['command']}"
    )
