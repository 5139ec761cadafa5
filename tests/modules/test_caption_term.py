"""The contrastive term of an image tokenizer, and training with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig, VQModelConfig
from t2i_lm.config.sections import AlignConfig, DataConfig, OptimConfig, TrainerConfig
from t2i_lm.modules.caption_term import CaptionTerm
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule
from t2i_lm.tokenizers.vq import PatchedVQ
from t2i_lm.tokenizers.words import WordVQ

MODEL = VQModelConfig(block_out_channels=[16, 16], codes=16, code_dim=4)
STEPS, BATCH = 8, 4
ROWS_VD = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
MEAN_D = ROWS_VD[:8].mean(dim=0)


def config(words: str | None, steps: int = STEPS) -> ExperimentConfig:
    return ExperimentConfig(
        task="image_tokenizer",
        init="random",
        image_tokenizer=ImageTokenizerConfig(
            model=MODEL, warmup_fraction=0.25, restart_every=2, caption_weight=0.5, words=words
        ),
        data=DataConfig(batch_size=BATCH),
        optim=OptimConfig(lr=5e-3, warmup_steps=1, decay="matrices"),
        trainer=TrainerConfig(max_steps=steps),
    )


def module(words: str | None) -> ImageTokenizerModule:
    """Words are the rows themselves: word k is text id k."""
    torch.manual_seed(0)
    model = PatchedVQ(MODEL) if words is None else WordVQ(MODEL, [f"w{number}" for number in range(16)], ROWS_VD)
    return ImageTokenizerModule(model, config(words), CaptionTerm(ROWS_VD, MEAN_D, 4, AlignConfig()))


def batches(count: int = STEPS) -> list[dict[str, Any]]:
    """Images of one color each, whose caption is two ids that the color decides."""
    made = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        kinds_B = torch.randperm(8, generator=draw)[:BATCH]
        images = torch.stack([kinds_B * 30, 255 - kinds_B * 30, kinds_B * 10], dim=1)[:, :, None, None]
        made.append(
            {
                "images_BCHW": images.expand(-1, -1, 16, 16).to(torch.uint8),
                "samples": BATCH,
                "is_compared": True,
                "text_ids_L": torch.stack([kinds_B, kinds_B + 8], dim=1).flatten(),
                "text_starts_B": torch.arange(BATCH) * 2,
                "hashes_B2": torch.stack([kinds_B, kinds_B], dim=1),
            }
        )
    return made


def fit(one: ImageTokenizerModule, folder: Path, until: int = STEPS, start: Path | None = None) -> Path:
    """Trains to a step, from a checkpoint or from the beginning; the checkpoint at the end."""
    done = 0 if start is None else int(torch.load(start, weights_only=False)["global_step"])
    trainer = pl.Trainer(
        max_steps=until,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=-1,
        gradient_clip_val=1.0,
    )
    left = batches()[done:] + batches()[:done]
    train: DataLoader[Any] = DataLoader(left, batch_size=None)  # Lightning counts those that are done as read
    val: DataLoader[Any] = DataLoader(batches(1), batch_size=None)
    trainer.fit(one, train, val, ckpt_path=start)
    trainer.save_checkpoint(folder / f"{until}.ckpt")
    return folder / f"{until}.ckpt"


def test_the_term_falls_where_images_show_the_words_of_their_captions_and_not_where_those_of_others() -> None:
    """With a head that gives each code the row of its word."""
    term, words_KD = CaptionTerm(ROWS_VD, MEAN_D, 4, AlignConfig()), ROWS_VD
    codes_KE = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(term.head.parameters(), lr=0.05)
    first = float(term.mismatch(codes_KE, words_KD).detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = term.mismatch(codes_KE, words_KD)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 5
    (batch,) = batches(1)
    codes_BN = torch.stack([batch["text_ids_L"].view(BATCH, 2)] * 2, dim=2)  # each word in two of four cells
    latents_BEhw = codes_KE[codes_BN].permute(0, 3, 1, 2)
    with torch.no_grad():
        right = term.nll(term.images_of_codes(latents_BEhw), batch).mean()
        wrong = term.nll(term.images_of_codes(latents_BEhw.roll(1, dims=0)), batch).mean()
    assert right < wrong - 1


@pytest.mark.parametrize("words", [None, "frequent"])
def test_the_gradient_of_the_term_reaches_encoder_and_map_but_no_row(words: str | None) -> None:
    one = module(words)
    assert one.captions is not None
    (batch,) = batches(1)
    latents_BEhw = one.model.latents(batch["images_BCHW"].float() / 127.5 - 1)
    loss = one.captions.nll(one.captions.images_of_codes(latents_BEhw), batch).mean()
    if isinstance(one.model, WordVQ):
        loss = loss + one.captions.mismatch(one.model.codebook, one.model.rows_KD)
    loss.backward()
    encoder = [parameter.grad for parameter in one.model.vq.encoder.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in encoder)
    assert any(grad.abs().max() > 0 for grad in encoder if grad is not None)
    trained = one.model.word_map if isinstance(one.model, WordVQ) else one.captions.head[0]
    assert trained.weight.grad is not None
    assert trained.weight.grad.abs().max() > 0
    assert one.captions.log_scale.grad is not None
    assert not any("rows_VD" in name for name in one.state_dict())


def test_without_negatives_that_are_no_negatives_equal_pairs_are_left_out() -> None:
    (batch,) = batches(1)
    term = CaptionTerm(ROWS_VD, MEAN_D, 4, AlignConfig())
    image_BD = term.images_of_codes(torch.randn(BATCH, 4, 2, 2))
    same = batch | {"hashes_B2": torch.zeros(BATCH, 2, dtype=torch.int64)}
    assert term.nll(image_BD, same).abs().max() < 1e-6
    unmasked = CaptionTerm(ROWS_VD, MEAN_D, 4, replace(AlignConfig(), mask_duplicates=False))
    assert unmasked.nll(image_BD, same).mean() > 0.1


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("words", [None, "frequent"])
def test_a_resumed_run_is_equal_and_codes_stay_tied(words: str | None, tmp_path: Path) -> None:
    whole, half = module(words), module(words)
    fit(whole, tmp_path)
    middle = fit(half, tmp_path, until=5)
    resumed = module(words)
    fit(resumed, tmp_path, start=middle)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if isinstance(resumed.model, WordVQ):
        assert torch.equal(resumed.model.rows_KD, ROWS_VD)
        map_ = resumed.model.word_map
        assert torch.allclose(resumed.model.codebook, ROWS_VD @ map_.weight.T + map_.bias, atol=1e-6)
        assert not torch.equal(map_.weight, module(words).model.word_map.weight)


@torch.no_grad()
def test_validation_reports_the_term_of_full_batches_alone() -> None:
    one = module("frequent")
    batch = batches(1)[0]
    one.validation_step(batch, 0)
    expected = one.validation_summary()["caption_nll"]
    assert expected > 0
    one.validation_step(batches(2)[1] | {"is_compared": False}, 1)
    assert one.validation_summary()["caption_nll"] == expected
