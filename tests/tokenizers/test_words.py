"""Words as rows of a language model, and the image tokenizer whose codes are words."""

import json
from pathlib import Path

import pytest
import torch

from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import VQTokenizer, save_tokenizer
from t2i_lm.tokenizers.words import WordVQ, phrase_rows, pieces_of, standardized

CONFIG = VQModelConfig(block_out_channels=[16, 16], codes=32)
WORDS = [f"word{number}" for number in range(32)]


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def word_model(width: int = 12) -> WordVQ:
    torch.manual_seed(0)
    return WordVQ(CONFIG, WORDS, seeded(32, width))


def test_a_phrase_has_the_pieces_that_it_has_inside_a_sentence() -> None:
    text = open_text_tokenizer("asset:lm_rotary/text_tokenizer.model")
    sentence = text.encode("on a blue background")
    assert pieces_of(text, "blue") == [sentence[2]]
    assert pieces_of(text, "blue background") == sentence[2:]
    assert len(pieces_of(text, "background")) > 1


def test_the_row_of_a_phrase_is_the_mean_of_its_pieces_and_zero_without_any() -> None:
    rows_VD = seeded(6, 3)
    found = phrase_rows(rows_VD, [[1, 4], [], [5]])
    assert torch.allclose(found, torch.stack([(rows_VD[1] + rows_VD[4]) / 2, torch.zeros(3), rows_VD[5]]))
    assert not phrase_rows(rows_VD, [[], []]).any()
    unit = standardized(5 * rows_VD + 2)
    assert torch.allclose(unit.mean(dim=0), torch.zeros(3), atol=1e-6)
    assert unit.std() == pytest.approx(1)


def test_codes_stay_the_map_of_their_words_while_they_are_trained() -> None:
    model = word_model()
    rows_KD, before = model.rows_KD.clone(), model.codebook.detach().clone()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    for _ in range(3):
        model.embed(torch.arange(32).view(2, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.codebook - before).abs().max() > 0.01
    assert torch.equal(model.rows_KD, rows_KD)
    map_ = model.word_map
    assert torch.allclose(model.codebook, rows_KD @ map_.weight.T + map_.bias, atol=1e-6)


def test_words_are_placed_near_centers_each_near_another_one() -> None:
    model = word_model()
    centers_KE = (model.rows_KD @ seeded(12, 8, seed=1) + 3)[
        torch.randperm(32, generator=torch.Generator().manual_seed(2))
    ]
    first = torch.cdist(centers_KE, model.codebook).amin(dim=1).mean()
    model.place_words(centers_KE)
    placed = torch.cdist(centers_KE, model.codebook)
    assert placed.amin(dim=1).mean() < first / 2
    assert len(placed.argmin(dim=1).unique()) > 12
    # With the right similarities the map is found.
    alike_KK = -torch.cdist(centers_KE, model.rows_KD @ seeded(12, 8, seed=1) + 3)
    model.place_words(centers_KE, alike_KK)
    assert torch.cdist(centers_KE, model.codebook).amin(dim=1).max() < 0.02  # cdist's own error


def test_words_survive_the_state_and_the_files_of_a_tokenizer(tmp_path: Path) -> None:
    model, other = word_model(), word_model()
    other.words = ["other"] * 32
    other.load_state_dict(model.state_dict())
    assert other.words == WORDS
    save_tokenizer(model, tmp_path, torch.float32, model.words)
    tokenizer = open_image_tokenizer(tmp_path, 64)
    assert isinstance(tokenizer, VQTokenizer)
    assert tokenizer.words == WORDS
    images_BCHW = (seeded(2, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        expected = model.nearest(model.latents(images_BCHW.float() / 127.5 - 1)).flatten(1)
    assert torch.equal(tokenizer.encode(images_BCHW), expected)
    assert torch.equal(tokenizer.codebook, model.codebook.detach())


@pytest.mark.parametrize("words", [["one"], "word", [1] * 32, {"a": "b"}])
def test_words_that_are_not_one_text_for_each_code_are_refused(words: object, tmp_path: Path) -> None:
    save_tokenizer(word_model(), tmp_path, torch.float32)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"words": words}))
    with pytest.raises(ValueError, match=rf"^image_tokenizer\.path: {file}: words: expected a list of 32 texts"):
        open_image_tokenizer(tmp_path, 64)
