from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel

from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.tokenizers.image import describe_pixels, open_image_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ, VQTokenizer, save_tokenizer, to_uint8, to_unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("vq")
    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16, 32], codes=64)), out, torch.float32)
    return out


def make_images(count: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_ids_are_a_row_major_grid(folder: Path) -> None:
    tokenizer = VQTokenizer.from_folder(folder, 64)
    assert tokenizer.grid == (8, 8)
    ids_BN = tokenizer.encode(make_images())
    assert ids_BN.shape == (3, 64)
    assert ids_BN.dtype == torch.int64
    # A change in the top right corner changes ids in the top right, not in the bottom left.
    changed = make_images()
    changed[:, :, :8, -8:] = 255 - changed[:, :, :8, -8:]
    moved = (tokenizer.encode(changed) != ids_BN).view(3, 8, 8).any(dim=0)
    assert moved[:3, 5:].any()
    assert not moved[5:, :3].any()


def test_a_batch_equals_its_images_one_by_one(folder: Path) -> None:
    tokenizer = VQTokenizer.from_folder(folder, 64)
    together = tokenizer.encode(make_images())
    assert torch.equal(together, torch.cat([tokenizer.encode(image[None]) for image in make_images()]))


def test_decoding_depends_on_the_codes_alone(folder: Path) -> None:
    tokenizer = VQTokenizer.from_folder(folder, 64)
    ids_BN = tokenizer.encode(make_images())
    again = tokenizer.decode(ids_BN)
    assert again.shape == (3, 3, 64, 64)
    assert again.dtype == torch.uint8
    assert torch.equal(again, VQTokenizer.from_folder(folder, 64).decode(ids_BN))


def test_a_tokenizer_works_at_other_sizes(folder: Path) -> None:
    tokenizer = VQTokenizer.from_folder(folder, 128)
    assert tokenizer.encode(make_images(size=128)).shape == (3, 256)


def test_nearest_is_the_euclidean_nearest(folder: Path) -> None:
    model = VQTokenizer.from_folder(folder, 64).model
    latents = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    expected = torch.cdist(flat.double(), model.codebook.double()).argmin(dim=1)
    assert torch.equal(model.nearest(latents).flatten(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.nearest(latents).flatten(), expected)


@pytest.mark.parametrize("chosen", ["tf32", "ieee"])
def test_convolutions_of_float32_are_not_rounded_to_tf32(folder: Path, chosen: str) -> None:
    tokenizer, seen, cudnn = VQTokenizer.from_folder(folder, 16), list[str](), cast(Any, torch.backends.cudnn)
    for layer in tokenizer.model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda *_: seen.append(cudnn.conv.fp32_precision))
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = chosen
    try:
        tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)))
        assert cudnn.conv.fp32_precision == chosen
    finally:
        cudnn.conv.fp32_precision = before
    assert len(seen) > 2
    assert "tf32" not in seen


def test_pixels_survive_the_round_trip_through_floats() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit(every)), every)


def test_wrong_ids_and_files_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = VQTokenizer.from_folder(folder, 64)
    for bad in (torch.zeros(1, 63, dtype=torch.int64), torch.full((1, 64), 64), torch.full((1, 64), -1)):
        with pytest.raises(ValueError, match="64 ids in"):
            tokenizer.decode(bad)
    with pytest.raises(ValueError, match=r"no config\.json"):
        VQTokenizer.from_folder(tmp_path, 64)
    with pytest.raises(ValueError, match=r"image_tokenizer\.size=60"):
        VQTokenizer.from_folder(folder, 60)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text().replace("64", "65"))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not match"):
        VQTokenizer.from_folder(tmp_path, 64)


def test_a_diffusers_folder_gives_the_same_ids_as_diffusers_own_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vq = VQModel(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                 up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=32)  # fmt: skip
    vq.save_pretrained(tmp_path)
    tokenizer = open_image_tokenizer(tmp_path, 32)
    assert tokenizer.grid == (16, 16)
    images = make_images(2, 32)
    ids_BN = tokenizer.encode(images)
    _, _, (_, _, expected) = vq.eval().quantize(vq.encode(to_unit(images)).latents)
    assert torch.equal(ids_BN.flatten(), expected.flatten())
    assert describe_pixels(tokenizer).endswith("black to white are [-1, 1] (diffusers' convention)")
    halved = open_image_tokenizer(tmp_path, 32, pixel_range=[0, 1])
    _, _, (_, _, expected) = vq.quantize(vq.encode(images.float() / 255).latents)
    assert torch.equal(halved.encode(images).flatten(), expected.flatten())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"image_tokenizer\.path: {tmp_path} cannot be read: "):
        open_image_tokenizer(tmp_path, 32)


def test_a_pixel_range_of_ones_own_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=32)), tmp_path, torch.float32)
    assert describe_pixels(open_image_tokenizer(tmp_path, 32)).endswith("[-1, 1] (by definition)")
    with pytest.raises(ValueError, match=r"image_tokenizer\.pixel_range=\[0, 1\]: expected null"):
        open_image_tokenizer(tmp_path, 32, pixel_range=[0, 1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "diffusion_pytorch_model.bin"])
def test_a_file_of_a_folder_is_answered_with_the_folder(name: str, tmp_path: Path) -> None:
    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=32)), tmp_path, torch.float32)
    torch.save({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"{name}: a file of a model's folder; set image_tokenizer\.path={tmp_path}$"):
        open_image_tokenizer(tmp_path / name, 32)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_tokenizer\.path=.*movqgan\.ckpt: no such file or folder"):
        open_image_tokenizer(tmp_path / "movqgan.ckpt", 32)
