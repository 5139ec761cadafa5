"""Image tokenizers of Emu3, Chameleon and Janus against transformers' own calls."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_lm.tokenizers.image import describe_pixels, open_image_tokenizer
from t2i_lm.tokenizers.transformers_vq import TransformersVQ, stated_range
from t2i_lm.tokenizers.vq import to_unit
from t2i_lm.train import main

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1}
KINDS: dict[str, dict[str, Any]] = {
    "Emu3": SMALL | {"codebook_size": 40, "attn_resolutions": [2], "hidden_size": 64},
    "Chameleon": SMALL | {"num_embeddings": 40, "embed_dim": 8, "latent_channels": 8, "resolution": 32},
    "Janus": SMALL | {"num_embeddings": 40, "embed_dim": 8, "latent_channels": 8, "num_patches": 8},
}


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    kind = request.param
    config = getattr(transformers, f"{kind}VQVAEConfig")(**KINDS[kind])
    getattr(transformers, f"{kind}VQVAE")(config).save_pretrained(tmp_path / kind)
    return tmp_path / kind


def test_ids_equal_transformers_and_images_are_decoded(folder: Path) -> None:
    tokenizer = open_image_tokenizer(folder, 32)
    assert isinstance(tokenizer, TransformersVQ)
    assert (tokenizer.vocab_size, tokenizer.grid) == (40, (8, 8))
    ids_BN = tokenizer.encode(images())
    sizes = {"image_sizes": [(32, 32)] * 2} if folder.name == "Emu3" else {}
    expected = tokenizer.model.encode(to_unit(images()), **sizes).image_tokens
    assert torch.equal(ids_BN, torch.stack(list(expected)).reshape(2, 64) if sizes else expected.reshape(2, 64))
    assert torch.equal(ids_BN, torch.cat([tokenizer.encode(image[None]) for image in images()]))
    if folder.name == "Chameleon":
        assert not tokenizer.decodes
        with pytest.raises(ValueError, match="ChameleonVQVAE of transformers has no decoder"):
            tokenizer.decode(ids_BN)
    else:
        again = tokenizer.decode(ids_BN)
        assert (again.shape, again.dtype) == ((2, 3, 32, 32), torch.uint8)


def test_images_of_another_size_are_decoded(folder: Path) -> None:
    tokenizer = open_image_tokenizer(folder, 48)
    ids_BN = tokenizer.encode(images(size=48))
    assert ids_BN.shape == (2, 144)
    if tokenizer.decodes:
        again = tokenizer.decode(ids_BN)
        assert again.shape == (2, 3, 48, 48)
        ids_BN[:, -1] = (ids_BN[:, -1] + 1) % 40  # of the last row and column
        change_BCHW = (tokenizer.decode(ids_BN).float() - again.float()).abs()
        assert change_BCHW[..., 24:, 24:].mean() > 2 * change_BCHW[..., :24, :24].mean()


# preprocessor_config.json -> values of black and white.
PROCESSORS: list[tuple[dict[str, Any], float, float]] = [
    ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, -1, 1),
    ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0.00392156862745098}, -1, 1),
    ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0, 1),
    ({"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 0.0078}, -1, 0.989),  # Chameleon's
    ({"do_rescale": False, "do_normalize": False}, 0, 255),
    ({"image_mean": 0.25, "image_std": 0.5}, -0.5, 1.5),
]


@pytest.mark.parametrize(("processor", "black", "white"), PROCESSORS)
def test_the_pixel_range_is_that_of_the_image_processor(
    processor: dict[str, Any], black: float, white: float, tmp_path: Path
) -> None:
    assert stated_range(tmp_path).is_unit
    assert "no preprocessor_config.json, the usual range" in str(stated_range(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    pixels = stated_range(tmp_path)
    assert (pixels.black[0], pixels.white[0]) == pytest.approx((black, white))
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    values = pixels.to_model(every)
    assert values.amin().item() == pytest.approx(black)
    assert values.amax().item() == pytest.approx(white)
    assert torch.equal(pixels.to_uint8(values), every)
    assert torch.equal(values, to_unit(every)) == pixels.is_unit == ((black, white) == (-1, 1))
    assert (pixels.identity("hash") == "hash") == pixels.is_unit


def test_ids_are_those_of_the_models_own_image_processor(folder: Path) -> None:
    usual = open_image_tokenizer(folder, 32)
    config = {"rescale_factor": 1 / 255, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    tokenizer = open_image_tokenizer(folder, 32)
    assert isinstance(tokenizer, TransformersVQ)
    mean, std = (torch.tensor(config[f"image_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    sizes = {"image_sizes": [(32, 32)] * 2} if folder.name == "Emu3" else {}
    expected = tokenizer.model.encode((images().float() / 255 - mean) / std, **sizes).image_tokens
    assert torch.equal(tokenizer.encode(images()).flatten(), torch.stack(list(expected)).flatten())
    assert "preprocessor_config.json" in describe_pixels(tokenizer)
    assert tokenizer.sha256 != usual.sha256
    chosen = open_image_tokenizer(folder, 32, pixel_range=[-1, 1])
    assert torch.equal(chosen.encode(images()), usual.encode(images()))
    assert chosen.sha256 == usual.sha256
    assert describe_pixels(chosen).endswith("[-1, 1] (image_tokenizer.pixel_range)")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"image_mean": "x", "image_std": 1}', '{"image_mean": 0, "image_std": 0}']
)
def test_a_processor_that_states_no_range_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"image_tokenizer\.path: .*preprocessor_config\.json states no pixel range"):
        stated_range(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0, "image_std": -1}')
    with pytest.raises(ValueError, match=r"states \(-?0.0,\) for black and \(-1.0,\) for white"):
        stated_range(tmp_path)


def test_damage_and_wrong_sizes_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"image_tokenizer\.size=30: expected a multiple of 4"):
        open_image_tokenizer(folder, 30)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read by transformers"):
        open_image_tokenizer(folder, 32)


@pytest.mark.slow
def test_a_tokenizer_without_a_decoder_is_refused_before_the_run(
    folder: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [*tiny, f"image_tokenizer.path={folder}", "image_tokenizer.size=32", f"run.dir={tmp_path}/runs"]
    experiment = str(ROOT / "experiments" / "t2i_scratch.yaml")
    code = main([experiment, *changes, f"data.cache_dir={tmp_path}/cache", "samples.preference_scenes=0"])
    if folder.name == "Chameleon":
        assert code == 2
        assert "set samples.prompts=0" in capsys.readouterr().err
        assert main([experiment, *changes, f"data.cache_dir={tmp_path}/cache", "samples.prompts=0"]) == 0
    else:
        assert code == 0


@pytest.mark.parametrize("part", ["quantize.embedding", "encoder.conv_in"])
def test_a_folder_with_missing_tensors_is_refused_by_their_names(folder: Path, part: str) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if not name.startswith(part)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder.name} has missing tensors: {part}"):
        open_image_tokenizer(folder, 32)


def test_weights_of_more_blocks_than_the_config_has_are_refused_by_their_names(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    decoder = {"decoder.more.weight": torch.zeros(1), "post_quant_conv.more": torch.zeros(1)}
    save_file(state | decoder, file, {"format": "pt"})
    if folder.name == "Chameleon":  # whose decoder transformers does not have
        open_image_tokenizer(folder, 32)
    else:
        with pytest.raises(ValueError, match=r"has unexpected tensors: .*post_quant_conv\.more"):
            open_image_tokenizer(folder, 32)
    save_file(state | {"encoder.down.0.block.1.norm1.weight": torch.zeros(32)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder.name} has unexpected tensors: encoder\.down\.0\.block\.1"):
        open_image_tokenizer(folder, 32)
