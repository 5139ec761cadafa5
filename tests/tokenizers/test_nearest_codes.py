import copy
import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i_lm.assets import find
from t2i_lm.data.scenes.scene import render
from t2i_lm.data.scenes.space import draw_scene
from t2i_lm.tokenizers.nearest_codes import ExactIds
from t2i_lm.tokenizers.vq import VQTokenizer, to_unit

IMAGES = 192


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    folder = find("asset:image_tokenizer")
    assert folder is not None
    return VQTokenizer.from_folder(folder, 64)


@pytest.fixture(scope="module")
def images() -> Tensor:
    scenes = [np.asarray(render(draw_scene(0, "train", index))) for index in range(IMAGES)]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def float64_ids(tokenizer: VQTokenizer, images: Tensor) -> Tensor:
    model = copy.deepcopy(tokenizer.model).double()
    codes = model.codebook.detach()
    with torch.no_grad():
        latents_BEhw = torch.cat([model.latents(part.double() / 127.5 - 1) for part in images.split(64)])
    return torch.cdist(latents_BEhw.permute(0, 2, 3, 1).flatten(1, 2), codes[None]).argmin(dim=2)


@pytest.mark.parametrize("batch", [64, 1])
def test_ids_are_those_of_float64_at_any_batch_size(
    batch: int, tokenizer: VQTokenizer, images: Tensor, float64_ids: Tensor
) -> None:
    count = IMAGES if batch > 1 else 24
    ids_BN = torch.cat([tokenizer.encode(part) for part in images[:count].split(batch)])
    assert torch.equal(ids_BN, float64_ids[:count])


def test_ids_are_the_same_on_every_machine(tokenizer: VQTokenizer, images: Tensor) -> None:
    ids_BN = torch.cat([tokenizer.encode(part) for part in images.split(64)])
    assert hashlib.sha256(ids_BN.numpy().astype("<u2").tobytes()).hexdigest()[:16] == "0420e59d3803c6fa"


@pytest.mark.parametrize("error", [0.4, 0.8])
def test_errors_of_float32_change_no_id(
    error: float, tokenizer: VQTokenizer, images: Tensor, float64_ids: Tensor
) -> None:
    """Latents with an error of a given part of `ExactIds.ERROR`, as of another processor."""
    exact, pixels_BCHW = ExactIds(tokenizer.model), to_unit(images)
    with torch.no_grad():
        latents_BEhw = torch.cat([tokenizer.model.latents(part) for part in pixels_BCHW.split(64)])
        noise_BEhw = torch.randn(latents_BEhw.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        largest_B111 = latents_BEhw.norm(dim=1, keepdim=True).amax(dim=(2, 3), keepdim=True)
        noise_BEhw *= error * ExactIds.ERROR * largest_B111 / noise_BEhw.norm(dim=1).amax()
        other_BEhw = latents_BEhw + noise_BEhw
        assert torch.equal(exact(pixels_BCHW, other_BEhw), float64_ids)


def test_images_near_a_boundary_are_encoded_again(tokenizer: VQTokenizer) -> None:
    exact = ExactIds(tokenizer.model)
    codes_KE = tokenizer.model.codebook.detach().double()
    one = codes_KE[0]
    other = codes_KE[torch.cdist(codes_KE[:1], codes_KE)[0].topk(2, largest=False).indices[1]]
    direction = (other - one) / (other - one).norm()
    middle = (one + other) / 2
    reach = ExactIds.ERROR * middle.norm()
    for distance, expected in ((0.5, True), (-0.5, True), (2.0, False), (-2.0, False)):
        latent_E = middle + distance * reach * direction
        _, unsure_B = exact._nearest(latent_E.view(1, -1, 1, 1))
        assert bool(unsure_B) is expected
