"""The shipped models meet what they are shipped for: their cards, and the image tokenizer measured again."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from t2i_lm.assets import find
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.evaluation.probes.heldout import heldout_text, text_losses
from t2i_lm.models.open_lm import load_open_lm
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer


def card(name: str) -> dict[str, Any]:
    folder = find(f"asset:{name}")
    assert folder is not None
    content: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return content


def test_both_language_models_read_the_same_tokens_and_learned_english() -> None:
    cards = [card("lm_rotary"), card("lm_head_rotary")]
    assert cards[0]["data_hash"] == cards[1]["data_hash"]
    assert cards[0]["seed"] == cards[1]["seed"], "one order of the data"
    assert cards[0]["tokenizer_sha256"] == cards[1]["tokenizer_sha256"]
    for one in cards:
        assert one["tokens"] >= 50e6
        assert one["held_out_bits_per_byte"] < 1.6
        assert one["held_out_bits_per_byte"] < one["other_domain_bits_per_byte"] < 3.2
        assert len(one["completions"]) >= 10


@pytest.mark.parametrize(
    ("name", "novels", "nonfiction"), [("lm_rotary", 3.627, 3.931), ("lm_head_rotary", 3.706, 4.057)]
)
def test_a_language_model_has_the_loss_from_which_forgetting_is_measured(
    name: str, novels: float, nonfiction: float
) -> None:
    """The numbers of docs/results.md; 48 rows of 112 ids, as the demo measures."""
    folder = find(f"asset:{name}")
    assert folder is not None
    decoder, text = load_open_lm(folder).eval(), open_text_tokenizer("asset:lm_rotary/text_tokenizer.model")
    for path, expected in (("novels", novels), ("nonfiction", nonfiction)):
        rows = heldout_text(f"asset:text/{path}.txt.gz", text, 48, 112).ids_RT
        assert rows.shape == (48, 113)
        with torch.no_grad():
            losses = text_losses(decoder, rows)["text_rows"]
        assert sum(losses) / len(losses) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(
    ("name", "codes"), [("image_tokenizer", 0.9), ("image_tokenizer_aligned", 0.9), ("image_tokenizer_words", 0.7)]
)
def test_an_image_tokenizer_reconstructs_scenes_and_uses_its_codes(name: str, codes: float) -> None:
    shipped = card(name)
    assert shipped["psnr_db"] >= 26
    assert shipped["codes_used"] >= codes
    tokenizer = open_image_tokenizer(f"asset:{name}", 64)
    scenes = SceneSource(192, "every_pair_val", 0)
    images_BCHW = torch.from_numpy(np.stack([np.asarray(scenes[i].image) for i in range(192)])).permute(0, 3, 1, 2)
    ids_BN = tokenizer.encode(images_BCHW)
    error = float((tokenizer.decode(ids_BN).float() - images_BCHW.float()).square().mean()) / 255**2
    assert abs(-10 * math.log10(error) - shipped["psnr_db"]) < 0.5, "the card has 1,000 held-out scenes"
    assert len(ids_BN.unique()) / tokenizer.vocab_size >= codes - 0.1
