"""SBER's checkpoints against outputs of SBER's own code, and refused files."""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors.torch import load_file

from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.movqgan import diffusers_config, size_name
from t2i_lm.tokenizers.vq import MoVQGAN


@pytest.fixture
def tiny(shared: Path) -> Path:
    return shared / "reference" / "movqgan" / "tiny_1block"


def test_ids_and_reconstructions_equal_sbers(tiny: Path) -> None:
    reference = load_file(tiny / "reference.safetensors")
    tokenizer = MoVQGAN.from_checkpoint(tiny / "checkpoint.ckpt", image_size=64)
    assert (tokenizer.vocab_size, tokenizer.grid) == (256, (8, 8))
    ids_BN = tokenizer.encode(reference["images_uint8"])
    assert torch.equal(ids_BN, reference["token_ids"].long())
    pixels = tokenizer.model.pixels(tokenizer.model.embed(ids_BN.view(2, 8, 8)))
    assert (pixels - reference["reconstruction"]).abs().max() <= 1e-3 * 2
    assert tokenizer.decode(ids_BN).shape == (2, 3, 64, 64)


def test_ids_are_row_major(tiny: Path) -> None:
    tokenizer = MoVQGAN.from_checkpoint(tiny / "checkpoint.ckpt", image_size=64)
    plain = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    marked = plain.clone()
    marked[:, :, :16, -16:] = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)  # top right
    moved = (tokenizer.encode(marked) != tokenizer.encode(plain)).view(8, 8)
    assert moved[:2, 6:].any()
    # Decoding changes the top right most.
    change = (tokenizer.decode(tokenizer.encode(marked)).float() - tokenizer.decode(tokenizer.encode(plain))).abs()
    assert change[..., :32, 32:].mean() > change[..., 32:, :32].mean()


def test_another_size_than_expected_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"expect='270M'.*32-64-64-128 channels, 1 blocks"):
        open_image_tokenizer(tiny / "checkpoint.ckpt", 64, expect="270M")


def test_averaged_weights_are_not_used_and_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = MoVQGAN.from_checkpoint(tiny / "checkpoint.ckpt", image_size=64)
    assert capsys.readouterr().err == ""
    saved = torch.load(tiny / "checkpoint.ckpt", weights_only=True)
    state = saved.get("state_dict", saved)
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in state.items() if "conv_in" in name}
    averages["model_ema.decay"] = torch.tensor(0.99)  # a number, no weights
    torch.save({"state_dict": {**state, **averages}}, tmp_path / "averaged.ckpt")
    tokenizer = MoVQGAN.from_checkpoint(tmp_path / "averaged.ckpt", image_size=64)
    error = capsys.readouterr().err
    assert error == (
        f"image_tokenizer.path: {tmp_path}/averaged.ckpt: {len(averages) - 1} averaged tensors (EMA) are not used\n"
    )
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(tokenizer.encode(images), plain.encode(images))


def sber_shapes(width: int, blocks: int) -> dict[str, torch.Tensor]:
    """The shapes that distinguish the published models."""
    shapes: dict[str, tuple[int, ...]] = {f"encoder.down.{level}.block.{block}.conv1.weight": (width * m, 3, 3, 3)
              for level, m in enumerate((1, 2, 2, 4)) for block in range(blocks)}  # fmt: skip
    shapes |= {"encoder.down.3.attn.0.q.weight": (1, 1), "quantize.embedding.weight": (16_384, 4)}
    shapes |= {"encoder.conv_out.weight": (4, 1, 3, 3)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("width", "blocks", "name", "millions"), [(128, 2, "67M", 67.8), (128, 4, "102M", 101.6), (256, 2, "270M", 270.7)]
)
def test_the_published_models_are_distinguished(width: int, blocks: int, name: str, millions: float) -> None:
    config = diffusers_config(sber_shapes(width, blocks))
    assert size_name(config) == name
    with torch.device("meta"):
        model = VQModel(**config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["encoder.conv_blocks.0.res.0.norm1.weight"], r"it has no tensors encoder\.down"),  # as LlamaGen's
        (
            ["encoder.down.0.block.0.conv1.weight", "decoder.mid.block_1.norm1.weight"],
            "its decoder is not normalized by",
        ),
    ],
)
def test_other_vq_models_are_told_apart(names: list[str], why: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {name: torch.zeros(2) for name in names}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=f"is not a MoVQGAN checkpoint: {why}.*plug-in"):
        MoVQGAN.from_checkpoint(tmp_path / "other.ckpt")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at"):
        MoVQGAN.from_checkpoint(tmp_path / "none.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not a MoVQGAN"):
        MoVQGAN.from_checkpoint(tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        MoVQGAN.from_checkpoint(tmp_path / "text.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("anything")}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="more than tensors"):
        MoVQGAN.from_checkpoint(tmp_path / "code.ckpt")


def test_a_truncated_checkpoint_is_named(tiny: Path, tmp_path: Path) -> None:
    content = (tiny / "checkpoint.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.ckpt"):
        MoVQGAN.from_checkpoint(tmp_path / "half.ckpt")
