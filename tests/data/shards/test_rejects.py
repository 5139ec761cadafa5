"""Rejected samples are judged as they come: no split that would pass is refused, and none that cannot is read on."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from t2i_lm.data.pairs import Pair, RejectedPairError, Sample
from t2i_lm.data.shards import rejects
from t2i_lm.data.shards.rejects import Rejects
from t2i_lm.data.shards.tokenize import PairRows


class Letters:
    """A text tokenizer without a file."""

    path, vocab_size, document_end, sha256 = Path(), 256, 0, "letters"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: object) -> str:
        raise NotImplementedError


class Codes:
    """An image tokenizer of two codes per image, from its first two red values, out of `vocab_size`."""

    image_size, sha256, low_precision, grid, decodes = 2, "codes", False, (1, 2), False
    codebook = torch.empty(0)

    def __init__(self, vocab_size: int = 256) -> None:
        self.vocab_size = vocab_size

    def to(self, device: torch.device) -> None:
        pass

    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        return images_uint8_BCHW[:, 0, 0].long() * (self.vocab_size // 256)

    def decode(self, ids_BN: Tensor) -> Tensor:
        raise NotImplementedError


def bad() -> Pair:
    raise RejectedPairError("broken", "x.jpg")


def good() -> Pair:
    return Pair("x", Image.new("RGB", (2, 2)), ["a"], None)


def rows_of(samples: list[bool], judge: Rejects) -> tuple[list[object], int]:
    """The rows of a part, and how many samples were read."""
    read = 0

    def stream() -> Iterator[Sample]:
        nonlocal read
        for usable in samples:
            read += 1
            yield good if usable else bad

    return list(PairRows(stream(), Letters(), Codes(), lambda _: None, judge)()), read


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.floats(0, 1), st.integers(1, 10))
def test_a_split_is_refused_exactly_if_its_share_is_too_large(samples: list[bool], share: float, ahead: int) -> None:
    judge = Rejects(share, "train", len(samples), "data.path=x")
    too_many = samples.count(False) / len(samples) > share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t2i_lm.data.shards.tokenize.LOOK_AHEAD", ahead)
        if too_many:
            with pytest.raises(ValueError, match=r"train samples.* cannot be used: \d+ broken \(first: x\.jpg"):
                rows_of(samples, judge)
        else:
            rows, read = rows_of(samples, judge)
            assert (len(rows), read) == (samples.count(True), len(samples))


def test_reading_stops_soon_after_a_split_cannot_pass() -> None:
    judge = Rejects(0.01, "train", 1000, "data.path=x")
    samples = [number % 10 > 0 for number in range(1000)]
    with pytest.raises(ValueError, match=r"11 of 101 train samples read so far cannot be used: 11 broken"):
        rows_of(samples, judge)


def test_rejects_of_other_parts_count() -> None:
    judge = Rejects(
        0.1, "train", 40, "data.path=x", counts=Counter(broken=4), examples={"broken": "y: broken"}, rows=16
    )
    with pytest.raises(ValueError, match=r"5 of 40 train samples cannot be used: 5 broken \(first: y: broken\)"):
        rows_of([False, *[True] * 19], judge)


def test_a_stream_is_judged_at_its_end_and_noted_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rejects, "NOTE_AFTER", 10)
    judge = Rejects(0.2, "train", None, "data.path=x")
    rows, _ = rows_of([False] * 20 + [True] * 80, judge)
    assert len(rows) == 80
    assert "10 of 10 train samples read so far cannot be used: 10 broken" in capsys.readouterr().err
    judge.counts, judge.examples, judge.rows = Counter(broken=20), {"broken": "x"}, 80
    judge.require_usable()
    judge.rows = 79
    with pytest.raises(ValueError, match=r"20 of 99 train samples cannot be used"):
        judge.require_usable()


@pytest.mark.parametrize("rejected", [0, 3])
def test_a_split_without_usable_samples_is_refused_whatever_is_allowed(rejected: int) -> None:
    judge = Rejects(1.0, "val", None, "data.path=x", counts=Counter(broken=rejected), examples={"broken": "y: broken"})
    with pytest.raises(ValueError, match=r"data\.path=x: no usable val sample" + "; 3 of 3" * (rejected > 0)):
        judge.require_usable()
