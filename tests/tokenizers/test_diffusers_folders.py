"""Folders of diffusers' `VQModel` in the forms in which they are published."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_lm.storage.hashing import file_sha256
from t2i_lm.tokenizers.image import open_image_tokenizer

SAFE, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
# Attention's tensors before diffusers 0.12.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("diffusers") / "vq"
    vq = VQModel(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                 up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=32)  # fmt: skip
    vq.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "vq"))


def codes(folder: Path) -> Tensor:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return open_image_tokenizer(folder, 32).encode(images)


def with_old_names(folder: Path) -> None:
    state = load_file(folder / SAFE)
    for new, old in OLD_NAMES.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, folder / SAFE, {"format": "pt"})


def with_pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / SAFE), folder / PICKLED)
    (folder / SAFE).unlink()


def with_pickled_old_names(folder: Path) -> None:
    with_old_names(folder)
    with_pickled_weights(folder)


def with_shards(folder: Path) -> None:
    VQModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / SAFE).unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1


def with_half_precision_beside(folder: Path) -> None:
    state = {name: tensor.half() for name, tensor in load_file(folder / SAFE).items()}
    save_file(state, folder / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})


def with_full_class_name(folder: Path) -> None:
    edit_config(folder, _class_name="diffusers.models.vq_model.VQModel")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FORMS = (
    with_old_names,
    with_pickled_weights,
    with_pickled_old_names,
    with_shards,
    with_half_precision_beside,
    with_full_class_name,
)


@pytest.mark.parametrize("change", FORMS, ids=lambda change: change.__name__)
def test_every_form_gives_the_same_ids(change: Any, original: Path, folder: Path) -> None:
    expected = codes(original)
    change(folder)
    assert torch.equal(codes(folder), expected)


def test_the_hash_is_that_of_the_weights_that_are_read(original: Path, folder: Path) -> None:
    sha256 = file_sha256(original / SAFE)
    assert open_image_tokenizer(original, 32).sha256 == sha256
    with_half_precision_beside(folder)
    assert open_image_tokenizer(folder, 32).sha256 == sha256
    (folder / SAFE).unlink()
    half = open_image_tokenizer(folder, 32)
    assert half.sha256 == file_sha256(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert half.codebook.dtype == torch.float32


@pytest.mark.parametrize("name", ["vqvae", "movq"])
def test_of_a_pipeline_its_tokenizer_is_read(name: str, original: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(original, pipeline / name)
    (pipeline / "unet").mkdir()
    (pipeline / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (pipeline / "model_index.json").write_text('{"_class_name": "P"}')
    assert torch.equal(codes(pipeline), codes(original))
    shutil.copytree(original, pipeline / "second")
    with pytest.raises(ValueError, match=rf"holds .*{name} \(VQModel\).*; expected one VQModel"):
        codes(pipeline)
    shutil.rmtree(pipeline / "second")
    shutil.rmtree(pipeline / name)
    with pytest.raises(ValueError, match=r"holds unet \(UNet2DModel\); expected one VQModel"):
        codes(pipeline)


def test_missing_and_unexpected_tensors_are_named(folder: Path) -> None:
    state = load_file(folder / SAFE)
    bias = state.pop("quant_conv.bias")
    save_file(state, folder / SAFE, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"image_tokenizer\.path: {folder} has missing tensors: quant_conv\.bias$"):
        codes(folder)
    extra = {f"extra.{n}": bias.clone() for n in range(5)}
    save_file({**state, "quant_conv.bias": bias, **extra}, folder / SAFE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected tensors: extra\.0, extra\.1, extra\.2 and 2 more$"):
        codes(folder)
    save_file({**state, "quant_conv.bias": bias[:1].clone()}, folder / SAFE, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder} cannot be read: .*size mismatch"):
        codes(folder)


def test_other_models_are_refused_by_name(folder: Path) -> None:
    edit_config(folder, _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match=r"config\.json is of a AutoencoderKL; expected a VQModel"):
        codes(folder)
    VQModel(in_channels=4, out_channels=4, block_out_channels=(32,)).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"in_channels=4, out_channels=4; expected 3 of each, for RGB"):
        codes(folder)
