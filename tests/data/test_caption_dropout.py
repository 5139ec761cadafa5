"""`data.caption_dropout`: the choice of emptied captions, and guidance with the same empty caption."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import DataConfig, OptimConfig, TrainerConfig
from t2i_lm.data.datamodules import PairBatches, PairDataModule, make_sampler
from t2i_lm.data.sampler import Draw
from t2i_lm.data.shards.format import pair_features, part_folder, read_part, write_index, write_part
from t2i_lm.experiment.build import ImageExperiment, build
from t2i_lm.generation.images import caption_prompts, generate_codes
from t2i_lm.models.generate import Sampling
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(JointVocab(100, 8), image_tokens=4, length=24)
ROWS = 1500
SHARE = 0.1


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images with two non-empty captions each."""
    folder = tmp_path_factory.mktemp("pairs")
    splits = {}
    for split, count in (("train", ROWS), ("val", 200)):

        def rows(count: int = count) -> Iterator[dict[str, Any]]:
            for row in range(count):
                texts = [np.arange(1 + row % 9), np.arange(2 + row % 9)]
                yield {"id": str(row), "image_ids": np.full(4, row % 8), "text_ids": texts, "meaning": ""}

        target = part_folder(folder, split, 0)
        target.parent.mkdir(parents=True)
        write_part(target, rows, pair_features(100, 4, 8), dict)
        splits[split] = {"rows": count, "parts": [read_part(target)["sha256"]]}
    write_index(folder, {"tokenizers": {}, "splits": splits})
    return folder


def config_of(share: float, seed: int = 0, batch_size: int = 60, devices: int = 1, accumulate: int = 1) -> Any:
    """Config of a run over three epochs of the shards."""
    steps = 3 * ROWS // batch_size
    return ExperimentConfig(
        seed=seed,
        data=DataConfig(length=LAYOUT.length, batch_size=batch_size, caption_dropout=share),
        optim=OptimConfig(warmup_steps=1),
        trainer=TrainerConfig(max_steps=steps, devices=devices, accumulate_grad_batches=accumulate),
    )


def data_of(shards: Path, config: ExperimentConfig) -> PairDataModule:
    data = PairDataModule(config, shards, LAYOUT)
    data.setup("fit")
    return data


def without_caption(batch: Any) -> list[bool]:
    """Which rows begin with guidance's empty prompt."""
    null = torch.from_numpy(LAYOUT.prompt(np.empty(0, np.int64)))
    return (batch["ids_BT"][:, : len(null)] == null).all(dim=1).tolist()


def dropped(shards: Path, config: ExperimentConfig, rank: int = 0, consumed: int = 0) -> dict[Draw, bool]:
    """Whether the caption of each draw is empty, for one rank and from a position of the run on."""
    train = data_of(shards, config).train_set
    sampler = make_sampler(config, len(train), rank, config.trainer.devices)
    sampler.consumed = consumed
    return {
        draw: empty
        for draws in sampler
        for draw, empty in zip(draws, without_caption(train.__getitems__(draws)), strict=True)
    }


@pytest.mark.parametrize("share", [SHARE, 0.5])
def test_training_empties_the_configured_share_of_captions(shards: Path, share: float) -> None:
    choice = dropped(shards, config_of(share))
    assert len(choice) == 3 * ROWS
    for epoch in range(3):
        count = sum(empty for (at, _), empty in choice.items() if at == epoch)
        assert abs(count - share * ROWS) < 4 * np.sqrt(share * (1 - share) * ROWS)


def test_the_choice_differs_between_epochs_and_seeds(shards: Path) -> None:
    choice, other = dropped(shards, config_of(SHARE)), dropped(shards, config_of(SHARE, seed=1))
    chosen = [{index for (at, index), empty in choice.items() if empty and at == epoch} for epoch in range(3)]
    chosen.append({index for (epoch, index), empty in other.items() if empty and epoch == 0})
    for one in range(4):
        for two in range(one):
            assert len(chosen[one] & chosen[two]) < 0.3 * len(chosen[one])  # a tenth by chance


@pytest.mark.parametrize(("batch_size", "devices", "accumulate"), [(20, 1, 1), (60, 2, 1), (60, 2, 3), (150, 1, 5)])
def test_the_choice_does_not_depend_on_batch_size_devices_or_accumulation(
    shards: Path, batch_size: int, devices: int, accumulate: int
) -> None:
    config = config_of(SHARE, batch_size=batch_size, devices=devices, accumulate=accumulate)
    joined: dict[Draw, bool] = {}
    for rank in range(devices):
        joined |= dropped(shards, config, rank)
    assert joined == dropped(shards, config_of(SHARE))


def test_a_resumed_run_makes_the_same_choice(shards: Path) -> None:
    whole = dropped(shards, config_of(SHARE))
    for consumed in (60, 1560, 4440):
        rest = dropped(shards, config_of(SHARE), consumed=consumed)
        assert len(rest) == 3 * ROWS - consumed
        assert rest.items() <= whole.items()


def test_dropout_applies_when_every_caption_is_a_sample(shards: Path) -> None:
    split = data_of(shards, config_of(SHARE)).train_set
    assert isinstance(split, PairBatches)
    config = config_of(SHARE)
    config = replace(config, data=replace(config.data, captions="all"))
    train = data_of(shards, config).train_set
    assert len(train) == 2 * len(split)
    empty = without_caption(train.__getitems__([(0, index) for index in range(len(train))]))
    assert abs(sum(empty) - SHARE * len(train)) < 4 * np.sqrt(SHARE * (1 - SHARE) * len(train))


def test_images_and_other_captions_do_not_change(shards: Path) -> None:
    plain, dropped = (data_of(shards, config_of(share)).train_set for share in (0.0, SHARE))
    draws = [(0, index) for index in range(200)]
    one, other = (data.__getitems__(draws)["ids_BT"] for data in (plain, dropped))
    pad, image = LAYOUT.vocab.pad, LAYOUT.vocab.image_offset
    for mine_T, other_T, empty in zip(one, other, without_caption({"ids_BT": other}), strict=True):
        if empty:
            assert other_T[other_T >= image].tolist() == mine_T[mine_T >= image].tolist()
            assert not bool((other_T < LAYOUT.vocab.text_size).any())
        else:
            assert other_T[other_T != pad].tolist() == mine_T[mine_T != pad].tolist()


def test_validation_and_a_share_of_0_drop_no_captions(shards: Path) -> None:
    assert not any(dropped(shards, config_of(0.0)).values())
    val = data_of(shards, config_of(0.9)).val_set
    draws = [(0, index) for index in range(len(val))]
    assert not any(without_caption(val.__getitems__(draws)))
    plain = data_of(shards, config_of(0.0)).val_set
    assert torch.equal(val.__getitems__(draws)["ids_BT"], plain.__getitems__(draws)["ids_BT"])


@pytest.fixture(scope="module")
def experiment(tiny: list[str]) -> ImageExperiment:
    file = ROOT / "experiments" / "t2i_sampling.yaml"
    built = build(load_experiment(file, "demo", [*tiny, "data.caption_dropout=0.5"]))
    assert isinstance(built, ImageExperiment)
    built.data.setup("fit")
    return built


def test_guidance_uses_the_empty_caption_of_training(experiment: ImageExperiment) -> None:
    """With a scale of 0 only the empty caption counts: codes equal those from a dropped row's beginning."""
    layout = experiment.layout
    assert isinstance(layout, Layout)
    ids_BT = experiment.data.train_set.__getitems__([(0, index) for index in range(60)])["ids_BT"]
    (empty_prompt,) = caption_prompts(experiment, [""])
    rows = [row_T for row_T in ids_BT if torch.equal(row_T[: len(empty_prompt)], empty_prompt)]
    assert 15 < len(rows) < 45
    seeds = [1, 2, 3, 4]
    prompts = caption_prompts(experiment, ["A red square.", "A small blue star.", "A ring.", "Two crosses."])
    guided_BN = generate_codes(experiment, prompts, seeds, Sampling(guidance=0.0))
    beginning = rows[0][: int((rows[0] >= layout.vocab.image_offset).nonzero()[0])]
    assert torch.equal(beginning, empty_prompt)
    assert torch.equal(guided_BN, generate_codes(experiment, [beginning] * 4, seeds, Sampling()))
    assert not torch.equal(guided_BN, generate_codes(experiment, prompts, seeds, Sampling()))
