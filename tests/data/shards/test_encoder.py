"""Encoding on a device with little memory: batches are halved, and ids and their order stay."""

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i_lm.data.shards.tokenize import ENCODE_BATCH, Encoder, encode_images


class SmallDevice:
    """An image tokenizer whose device holds `most` images; an id is the image's first value."""

    image_size, grid, vocab_size = 4, (1, 1), 256

    def __init__(self, most: int, message: str = "CUDA error: out of memory") -> None:
        self.most, self.message, self.batches = most, message, list[int]()

    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        self.batches.append(len(images_uint8_BCHW))
        if len(images_uint8_BCHW) > self.most:
            raise RuntimeError(self.message)
        return images_uint8_BCHW[:, 0, 0, :1].long()


IMAGES = [np.full((4, 4, 3), number, dtype=np.uint8) for number in range(100)]


def test_a_batch_that_does_not_fit_is_halved_for_good(capsys: pytest.CaptureFixture[str]) -> None:
    device = SmallDevice(20)
    assert encode_images(device, IMAGES)[:, 0].tolist() == list(range(100))
    assert device.batches[:3] == [ENCODE_BATCH, 32, 16]
    assert max(device.batches[2:]) == 16
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"note: out of memory with {two} images of 4 pixels; {two // 2} are encoded at a time" for two in (64, 32)
    ]


def test_a_single_image_that_does_not_fit_ends_in_one_line() -> None:
    encoder = Encoder(SmallDevice(0))
    with pytest.raises(MemoryError, match="out of memory with a single image of 4 pixels"):
        encoder(IMAGES[:3])


def test_other_errors_are_not_hidden() -> None:
    encoder = Encoder(SmallDevice(0, "sizes differ"))
    with pytest.raises(RuntimeError, match="sizes differ"):
        encoder(IMAGES[:3])


def test_batches_that_fit_are_encoded_whole() -> None:
    device = SmallDevice(64)
    encode_images(device, IMAGES)
    assert device.batches == [ENCODE_BATCH, 100 - ENCODE_BATCH]
    assert torch.equal(Encoder(device)(IMAGES[:5])[:, 0], torch.arange(5))


class PlugIn(SmallDevice):
    """An image tokenizer that makes other ids than it says."""

    grid = (2, 1)

    def __init__(self, ids: Tensor) -> None:
        super().__init__(64)
        self.ids = ids

    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        return self.ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 70_000]], r"ids in \[0, 70000\]; expected ids in \[0, 256\), its vocab_size"),
        ([[-1, 255]], r"ids in \[-1, 255\]"),
        (
            [[0, 1, 2]],
            r"1 images as torch\.int64 of shape \(1, 3\); expected integers of shape \(1, 2\), its grid of 2 x 1",
        ),
        ([[[0], [1]]], r"of shape \(1, 2, 1\)"),
        ([[0.0, 1.0]], r"1 images as torch\.float32"),
    ],
)
def test_ids_that_a_tokenizer_cannot_have_are_refused_by_its_key(ids: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^image_tokenizer\.path: encodes .*{message}"):
        Encoder(PlugIn(torch.tensor(ids)))(IMAGES[:1])
