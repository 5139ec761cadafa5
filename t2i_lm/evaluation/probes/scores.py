"""Likelihood of text ids over all rows of a model's vocabulary, and renormalized to its text rows.

After training on images, a model may lose on text because its image and boundary rows take probability, or because it
no longer predicts the text: the two numbers separate these, and one pass computes both.

Shapes: `B` sequences, `T` positions, `N` targets, `D` width, `V` vocabulary, `P` with pads; `C` targets of one chunk.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.padded_rows import join_rows, padded_count

# Logits in memory at once.
LOGITS = 2**22
# Positions per forward pass.
POSITIONS = 2**13


class TargetScores(NamedTuple):
    """Scores of N targets, on the CPU.

    Attributes:
        all_rows_N: negative log-likelihood under the softmax over the whole vocabulary, nats, float64.
        text_rows_N: the same, renormalized to the text rows; never larger than `all_rows_N`.
        best_of_all_N: whether the target is the likeliest id.
        best_of_text_N: whether it is the likeliest text id.
    """

    all_rows_N: Tensor
    text_rows_N: Tensor
    best_of_all_N: Tensor
    best_of_text_N: Tensor


class TargetFeatures(NamedTuple):
    """Hidden states that predict N targets, on the model's device; their products with the rows are the logits.

    Attributes:
        x_ND: hidden states, widened where the output has a bias (`models/token_rows.py`).
        weight_PD: rows of the whole vocabulary, those of text first, and pads.
        rows: rows of the vocabulary, V.
        text_size: number of text rows.
        target_N: text ids.
    """

    x_ND: Tensor
    weight_PD: Tensor
    rows: int
    text_size: int
    target_N: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (C, V) in float32 and targets (C,), a part at a time."""
        size = max(1, LOGITS // self.rows)
        for x_CD, target_C in zip(torch.split(self.x_ND, size), torch.split(self.target_N, size), strict=True):
            yield F.linear(x_CD, self.weight_PD)[:, : self.rows].float(), target_C


@torch.no_grad()
def target_features(decoder: Backbone, ids_BT: Tensor, target_BT: Tensor) -> TargetFeatures:
    """What predicts the ids where `target_BT` holds (never the first of a sequence), in row-major order.

    Args:
        decoder: expanded or not; without expansion, all rows are text rows.
        ids_BT: text ids.
        target_BT: mask of the targets.
    """
    device = decoder.output.text.device
    ids_BT, mask_BT = ids_BT.to(device), target_BT.to(device)[:, 1:]
    x_ND, blocks = decoder.output.factors(decoder.hidden(ids_BT[:, :-1])[mask_BT])
    rows = sum(map(len, blocks))
    weight_PD = join_rows(blocks, padded_count(rows, x_ND.device))
    return TargetFeatures(x_ND, weight_PD, rows, len(decoder.output.text), ids_BT[:, 1:][mask_BT])


@torch.no_grad()
def score_features(features: TargetFeatures) -> TargetScores:
    """Scores of the targets."""
    text_size, parts = features.text_size, []
    for logits_CV, target_C in features.chunks():
        own_C = logits_CV.gather(1, target_C[:, None])[:, 0].cpu().double()
        text_C = logits_CV[:, :text_size].logsumexp(dim=1).cpu().double()
        all_C = text_C
        if features.rows > text_size:  # from the text rows' sum, so never below it
            all_C = torch.logaddexp(text_C, logits_CV[:, text_size:].logsumexp(dim=1).cpu().double())
        best_C = (logits_CV.argmax(dim=1) == target_C).cpu()
        best_text_C = (logits_CV[:, :text_size].argmax(dim=1) == target_C).cpu()
        parts.append((all_C - own_C, text_C - own_C, best_C, best_text_C))
    return TargetScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score_targets(decoder: Backbone, ids_BT: Tensor, target_BT: Tensor) -> TargetScores:
    """Scores of the ids where `target_BT` holds; arguments as of `target_features`."""
    return score_features(target_features(decoder, ids_BT, target_BT))


def score_continuations(decoder: Backbone, sequences: Sequence[tuple[list[int], int]]) -> list[TargetScores]:
    """Scores the ids of each sequence from its first target on, in batches of similar length.

    Args:
        decoder: expanded or not.
        sequences: (text ids, index of the first target, at least 1).
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number][0]))
    scored: dict[int, TargetScores] = {}
    while order:
        longest = len(sequences[order[-1]][0])
        size = max(1, POSITIONS // longest)
        members, order = order[-size:], order[:-size]
        ids_BT = torch.zeros(len(members), longest, dtype=torch.int64)  # padding is invisible to a causal decoder
        target_BT = torch.zeros(len(members), longest, dtype=torch.bool)
        for row, number in enumerate(members):
            ids, first = sequences[number]
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            target_BT[row, first : len(ids)] = True
        counts = target_BT.sum(dim=1).tolist()
        columns = (torch.split(column, counts) for column in score_targets(decoder, ids_BT, target_BT))
        for number, values in zip(members, zip(*columns, strict=True), strict=True):
            scored[number] = TargetScores(*values)
    return [scored[number] for number in range(len(sequences))]
