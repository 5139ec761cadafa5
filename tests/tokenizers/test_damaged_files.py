"""Damaged files of tokenizers: one line that names key and file, whatever the library raises."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer

# Contents that are no JSON, or JSON of another form.
NOT_OURS = (b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe{", b"\x00" * 64, b'{"model": 3}', b'{"model": {"x": 1}}')
OTHERS = (
    b'{"model": {"codes": "many"}}',
    b'{"model": {"codes": -1}}',
    b'{"_class_name": "VQModel"}',
    b"version https://git-lfs",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16], codes=8)), tmp_path / "vq", torch.float32)
    return tmp_path / "vq"


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=rf"image_tokenizer\.path.*{folder}") as caught:
        open_image_tokenizer(folder, 32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [*NOT_OURS, *OTHERS])
def test_a_config_of_an_image_tokenizer(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b'{"a": 1}', b"version https://git-lfs"])
def test_weights_of_an_image_tokenizer(content: bytes, folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damage in (content, whole[: len(whole) // 2], whole[:100], b"x" + whole):
        file.write_bytes(damage)
        assert "model.safetensors" in refused(folder)


def test_weights_of_another_shape_or_number(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(iter(state))
    for other in ({**state, name: state[name][:1]}, {**state, "x": state[name]}, dict(list(state.items())[1:])):
        save_file({key: value.clone() for key, value in other.items()}, folder / "model.safetensors")
        assert "does not match its config" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\x03\x04", b"version https://git-lfs"])
def test_a_movqgan_checkpoint(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "movqgan.ckpt"
    file.write_bytes(content)
    refused(file)
    others: tuple[object, ...] = ({}, {"state_dict": {}}, [1, 2], {"state_dict": [1]}, torch.zeros(3))
    for saved in others:
        torch.save(saved, file)
        refused(file)


@pytest.mark.parametrize("content", [*NOT_OURS, b'{"model": {"type": "BPE"}}', json.dumps("text").encode()])
@pytest.mark.parametrize("name", ["tokenizer.json", "text.model"])
def test_a_text_tokenizer(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"text_tokenizer\.path.*{file}") as caught:
        open_text_tokenizer(file)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "text.model"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"text_tokenizer\.path: no .* at {tmp_path / name}"):
            open_text_tokenizer(tmp_path / name)
