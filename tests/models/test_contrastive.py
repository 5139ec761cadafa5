import importlib.util
import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from t2i_lm.models.contrastive import Neighbors, bag_of_words, contrastive_nll, hubness, nearest_text_tokens


def bags(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_bag_is_the_normalized_mean_of_its_rows() -> None:
    rows_VD = bags(9, 5, 0) * 3
    ids = [[1, 2, 2], [7], [0, 8, 3, 4]]
    bag_BD = bag_of_words(rows_VD, torch.tensor([*chain(*ids)]), torch.tensor([0, 3, 4]))
    for row_D, bag in zip(bag_BD, ids, strict=True):
        assert torch.allclose(row_D, F.normalize(rows_VD[bag].mean(dim=0), dim=0), atol=1e-6)


def test_an_empty_bag_is_zero_and_the_loss_stays_finite() -> None:
    bag_BD = bag_of_words(bags(9, 5, 0), torch.tensor([1]), torch.tensor([0, 1]))
    assert torch.equal(bag_BD[1], torch.zeros(5))
    assert contrastive_nll(bag_BD, bag_BD, torch.tensor(9.0), 0, None).isfinite().all()


def test_the_loss_equals_clips_definition() -> None:
    """The log of the partner's softmax share, written out."""
    image_ND, text_ND, scale = bags(32, 8, 1), bags(32, 8, 2), torch.tensor(1 / 0.07)
    share_NN = (scale * image_ND @ text_ND.T).exp()
    for nll_N, matrix_NN in (
        (contrastive_nll(image_ND, text_ND, scale, 0, None), share_NN),
        (contrastive_nll(text_ND, image_ND, scale, 0, None), share_NN.T),
    ):
        assert torch.allclose(nll_N, -(matrix_NN.diagonal() / matrix_NN.sum(dim=1)).log(), rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
def test_the_loss_equals_open_clips() -> None:
    from open_clip.loss import ClipLoss

    image_ND, text_ND, scale = bags(64, 16, 1), bags(64, 16, 2), torch.tensor(1 / 0.07)
    both = contrastive_nll(image_ND, text_ND, scale, 0, None), contrastive_nll(text_ND, image_ND, scale, 0, None)
    theirs = float(ClipLoss()(image_ND, text_ND, scale))
    assert float(torch.cat(both).mean()) == pytest.approx(theirs, rel=1e-6)


def test_equal_bags_are_at_chance_and_duplicates_are_not_negatives() -> None:
    same_ND = torch.ones(8, 4) / 2
    scale = torch.tensor(5.0)
    assert contrastive_nll(same_ND, same_ND, scale, 0, None).allclose(torch.tensor(math.log(8)))
    pairs_NN = torch.eye(8, dtype=torch.bool)
    pairs_NN[0, 1] = pairs_NN[1, 0] = True
    nll_N = contrastive_nll(same_ND, same_ND, scale, 0, pairs_NN)
    assert nll_N[:2].allclose(torch.tensor(math.log(7)))
    assert nll_N[2:].allclose(torch.tensor(math.log(8)))


def test_a_ranks_pairs_have_their_partners_in_the_global_batch() -> None:
    image_ND, text_ND, scale = bags(12, 8, 1), bags(12, 8, 2), torch.tensor(9.0)
    whole_N = contrastive_nll(image_ND, text_ND, scale, 0, None)
    parts = [contrastive_nll(image_ND[first : first + 4], text_ND, scale, first, None) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole_N)


def test_nearest_tokens_and_hubness_of_known_rows() -> None:
    text_VD = torch.eye(6)
    image_ID = torch.eye(6)[[3, 3, 5]] * 7 + 0.1 * torch.eye(6)[[0, 0, 0]]
    nearest = nearest_text_tokens(image_ID, text_VD, 2)
    assert nearest.ids_IK.tolist() == [[3, 0], [3, 0], [5, 0]]
    assert nearest.cosine_IK[0, 0] > 0.99
    crowd = hubness(nearest, 6)
    assert crowd.distinct_nearest == 2
    even = hubness(Neighbors(torch.arange(6)[:, None], torch.ones(6, 1)), 6)
    assert even.skewness == 0
    assert hubness(Neighbors(torch.zeros(60, 1, dtype=torch.int64), torch.ones(60, 1)), 60).skewness > 5
    assert hubness(Neighbors(torch.zeros(60, 1, dtype=torch.int64), torch.ones(60, 1)), 60).top10_share == 1
