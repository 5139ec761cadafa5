"""The image tokenizer whose ids name what a cell shows."""

import numpy as np
import pytest
import torch

from t2i_lm.data.scenes.oracle import CODES, GROUNDS, open_oracle
from t2i_lm.data.scenes.scene import COLOURS, render
from t2i_lm.data.scenes.space import draw_scene
from t2i_lm.tokenizers.image import open_image_tokenizer


def images(split: str, count: int) -> torch.Tensor:
    pixels = [np.array(render(draw_scene(0, split, index))) for index in range(count)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("split", ["iid", "compositional"])
def test_scenes_are_reconstructed_and_different_ones_have_different_ids(split: str) -> None:
    oracle, images_BCHW = open_oracle(None, 64), images(split, 40)
    ids_BN = oracle.encode(images_BCHW)
    assert len(ids_BN.unique(dim=0)) == len(ids_BN)
    assert (oracle.decode(ids_BN).int() - images_BCHW.int()).abs().max() <= 2


def test_a_cell_of_a_shape_without_its_first_cell_is_a_square_of_its_color() -> None:
    oracle = open_oracle(None, 64)
    ids_1N = torch.full((1, 64), GROUNDS.index("white"))
    ids_1N[0, 27] = len(GROUNDS)  # the first color
    image_HW3 = oracle.decode(ids_1N)[0].permute(1, 2, 0)
    assert image_HW3[28, 28].tolist() == list(next(iter(COLOURS.values())))
    assert (image_HW3 != image_HW3[0, 0]).any(dim=-1).sum() == 64


def test_any_ids_are_decoded_and_other_numbers_refused() -> None:
    oracle = open_oracle(None, 64)
    ids_BN = torch.randint(CODES, (8, 64), generator=torch.Generator().manual_seed(0))
    assert oracle.decode(ids_BN).shape == (8, 3, 64, 64)
    for wrong in (ids_BN + CODES, ids_BN[:, 1:], ids_BN - CODES):
        with pytest.raises(ValueError, match="ids="):
            oracle.decode(wrong)
    with pytest.raises(ValueError, match=r"^image_tokenizer\.size=128"):
        open_oracle(None, 128)


def test_codes_of_shapes_and_grounds_have_different_features() -> None:
    used = open_oracle(None, 64).codebook
    assert used.shape[0] == CODES
    named = used[used.any(dim=1)]
    assert len(named.unique(dim=0)) == len(named) == 8 + 4 * 96


def test_it_is_opened_as_a_plug_in() -> None:
    found = open_image_tokenizer("code:t2i_lm.data.scenes.oracle:open_oracle", 64)
    assert found.vocab_size == CODES
