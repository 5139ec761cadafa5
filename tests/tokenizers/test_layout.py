import numpy as np
import pytest
import torch

from t2i_lm.modules.base import split_sums
from t2i_lm.tokenizers.joint_vocab import SPECIALS, JointVocab
from t2i_lm.tokenizers.layout import BOUNDARY, IMAGE, PAD, TEXT, Layout, modality_of_target

VOCAB = JointVocab(text_size=100, image_size=16)
LAYOUT = Layout(VOCAB, image_tokens=4, length=16)


def test_ids_are_text_then_special_then_image() -> None:
    assert [VOCAB.special(token) for token in SPECIALS] == list(range(100, 107))
    assert VOCAB.image_offset == 107
    assert VOCAB.size == 123


def test_sequences_have_the_papers_layout() -> None:
    row_T = LAYOUT.pack([np.array([5, 6])], np.array([[0, 15, 3, 3]]))[0].tolist()
    doc, end_doc, text, end_text, image, end_image, pad = range(100, 107)
    assert row_T == [doc, text, 5, 6, end_text, image, 107, 122, 110, 110, end_image, end_doc, *[pad] * 4]


def test_long_captions_are_cut_to_the_budget() -> None:
    assert LAYOUT.text_budget == 6
    assert LAYOUT.prompt_budget == len(LAYOUT.prompt(np.arange(50)))
    row_T = LAYOUT.pack([np.arange(50)], np.zeros((1, 4), dtype=np.int64))[0]
    assert (row_T == VOCAB.pad).sum() == 0
    assert row_T[2:8].tolist() == list(range(6))


def test_modalities_are_those_of_the_targets() -> None:
    ids_BT = LAYOUT.pack([np.array([5, 6])], np.array([[0, 15, 3, 3]]))
    modality = modality_of_target(ids_BT[:, 1:], VOCAB)[0].tolist()
    assert modality == [BOUNDARY, TEXT, TEXT, BOUNDARY, BOUNDARY, *[IMAGE] * 4, BOUNDARY, BOUNDARY, *[PAD] * 4]


def test_split_sums_reproduce_the_total() -> None:
    nll_N = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    class_N = torch.arange(1000) % 3
    nll_sum_M, count_M = split_sums(nll_N, class_N, 3)
    assert nll_sum_M.sum().item() == pytest.approx(nll_N.double().sum().item(), rel=1e-12)
    assert count_M.tolist() == [334, 333, 333]
    assert nll_sum_M[1].item() == pytest.approx(nll_N[1::3].double().sum().item(), rel=1e-12)


def test_a_length_without_room_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.length > 10"):
        Layout(VOCAB, image_tokens=4, length=10)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 4\)"):
        LAYOUT.pack([np.array([1])], np.zeros((1, 5), dtype=np.int64))
