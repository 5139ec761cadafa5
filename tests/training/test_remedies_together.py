"""Remedies against forgetting in whole runs, all at once, through the command line."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import build_model
from t2i_lm.experiment.restore import load_trained
from t2i_lm.storage.run_folder import Run
from tests.runs import PRETRAINED, QUICK, curve, losses, resume_from_middle, train, weights
from tests.two_ranks import train_on_two_ranks

pytestmark = pytest.mark.slow

# All remedies that can be combined: adapters leave L2-SP nothing to pull.
TOGETHER = ["loss.text_weight=0.5", "loss.image_weight=2.0", "distil.weight=0.7", "data.replay_ratio=0.25"]
COMBINATIONS = {
    "weights": [
        *TOGETHER,
        "optim.l2_sp=1.0",
        "optim.gradient_projection=true",
        "modality_experts=true",
        "freeze=[norm,text_rows]",
    ],
    "adapters": [*TOGETHER, "lora.rank=2", "lora.image_only=true", "freeze=[text_rows]"],
}
# The language model's own trainable weights under each.
TRAINABLE = {"weights": r"layers\.\d+\.(image\.)?(attention|feed_forward)\.", "adapters": r"\.lora_"}


@pytest.fixture(scope="module", params=COMBINATIONS)
def combination(request: pytest.FixtureRequest) -> str:
    if request.param == "adapters":
        pytest.importorskip("peft")
    return str(request.param)


@pytest.fixture(scope="module")
def remedies(combination: str, book: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    replayed = tmp_path_factory.mktemp("replayed") / "replayed.txt"
    replayed.write_text(
        book.read_text().replace("\f", " once more\f") + " once more"
    )  # no document that is measured on
    return [*COMBINATIONS[combination], f"data.replay_path={replayed}"]


@pytest.fixture(scope="module")
def remedied(tiny: list[str], probing: list[str], remedies: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(PRETRAINED, tmp_path_factory.mktemp("remedied"), *tiny, *QUICK, *probing, *remedies)


def test_only_unfrozen_parameters_are_trained(remedied: Run, combination: str) -> None:
    """Against the model as the run began, built again from its config."""
    initial = build_model(load_experiment(remedied.folder / "config.yaml")).module.state_dict()
    trained = weights(remedied)
    assert set(trained) == set(initial)
    for name, value in trained.items():
        trainable = name.endswith((".special", ".image")) or re.search(TRAINABLE[combination], name) is not None
        assert torch.equal(value, initial[name]) != trainable, name


def test_a_run_with_remedies_is_loaded_with_the_weights_of_its_checkpoint(remedied: Run) -> None:
    loaded, trained = load_trained(remedied.folder).module.state_dict(), weights(remedied)
    assert set(loaded) == set(trained)
    assert all(torch.equal(value, trained[name]) for name, value in loaded.items())


def test_replay_is_a_modality_of_its_own_and_takes_its_share(remedied: Run, pretrained: Run) -> None:
    for line in remedied.records("train"):
        assert line["train"]["replay"]["count"] == 2 * 2 * 111  # two of eight sequences, two steps
        assert line["scalars"]["distil_kl"] > 0
    for line, other in zip(remedied.validations(), pretrained.validations(), strict=True):
        assert line["val"]["replay"]["count"] == 0
        assert line["val"]["all"]["count"] == other["val"]["all"]["count"]
    assert remedied.validations()[0]["val"]["text"] == pretrained.validations()[0]["val"]["text"]  # nothing is weighted
    assert remedied.environment["data_hash"] == pretrained.environment["data_hash"]
    assert remedied.environment["stream_hash"] != pretrained.environment["stream_hash"]


def test_remedies_resume_bit_for_bit(remedied: Run, tmp_path: Path) -> None:
    resumed = resume_from_middle(PRETRAINED, tmp_path, remedied)
    assert curve(resumed) == curve(remedied)
    assert all(torch.equal(value, weights(remedied)[name]) for name, value in weights(resumed).items())


def test_remedies_on_two_processes_equal_one(
    remedied: Run, tiny: list[str], probing: list[str], remedies: list[str], tmp_path: Path
) -> None:
    two = train_on_two_ranks(PRETRAINED, tmp_path, *tiny, *QUICK, *probing, *remedies, "trainer.strategy=ddp")
    assert len(two.metrics) == len(remedied.metrics)
    for ours, theirs in zip(two.metrics, remedied.metrics, strict=True):
        if "forgetting" in ours:
            mine, other = (line["forgetting"]["text"]["all_rows"]["nll"] for line in (ours, theirs))
            assert mine == pytest.approx(other, rel=1e-6)
            continue
        for key, entries in losses(theirs).items():
            for name, entry in entries.items():
                assert ours[key][name]["count"] == entry["count"]
                if entry["count"]:
                    assert ours[key][name]["nll"] == pytest.approx(entry["nll"], rel=1e-6), name


def test_accumulation_weighs_as_one_batch(
    remedied: Run, tiny: list[str], probing: list[str], remedies: list[str], tmp_path: Path
) -> None:
    run = train(PRETRAINED, tmp_path, *tiny, *QUICK, *probing, *remedies, "trainer.accumulate_grad_batches=4")
    for ours, theirs in zip(run.validations(), remedied.validations(), strict=True):
        assert ours["val"]["image"]["nll"] == pytest.approx(theirs["val"]["image"]["nll"], rel=1e-5)


def test_the_stream_of_pairs_is_the_same_but_where_text_takes_a_place(book: Path) -> None:
    from t2i_lm.data.order import ShuffledOrder
    from t2i_lm.data.sampler import REPLAYED, IndexSampler

    plain, replay = (IndexSampler(ShuffledOrder(60, 0), 8, 20, replayed=number) for number in (0, 2))
    numbers = []
    for step in range(20):
        pairs, mixed = plain.global_batch(step * 8), replay.global_batch(step * 8)
        text = mixed[:, 0] == REPLAYED
        assert text.sum() == 2
        assert text.reshape(4, 2).any(axis=1).sum() == 2  # spread over micro-batches and ranks
        assert np.array_equal(mixed[~text], pairs[~text])
        numbers += mixed[text, 1].tolist()
    assert numbers == list(range(40))
