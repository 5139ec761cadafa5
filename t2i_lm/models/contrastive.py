"""Contrastive alignment of image-token rows with text-token rows (Section 3.2, Figure 6).

A caption and its image are each represented by the mean of their tokens' embedding rows. CLIP's symmetric loss
classifies each image's caption among the N of a batch, and each caption's image.

Shapes: `B` pairs on this rank, `N` pairs of the global batch, `L` ids of all bags, `D` width, `V` text rows,
`I` image codes, `K` neighbors.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_lm.config.sections import AlignConfig
from t2i_lm.tokenizers.words import bag_means

# Image rows per product.
CHUNK = 1024


def bag_of_words(rows_VD: Tensor, ids_L: Tensor, starts_B: Tensor) -> Tensor:
    """`bag_means`, l2-normalized (B, D); an empty bag is zero."""
    return F.normalize(bag_means(rows_VD, ids_L, starts_B), dim=-1)


def initial_log_scale(config: AlignConfig) -> nn.Parameter:
    """The logarithm of the inverse temperature of the cosines, a 0-d parameter."""
    return nn.Parameter(torch.tensor(math.log(config.logit_scale_init)))


@torch.no_grad()
def clamp_log_scale(log_scale: nn.Parameter, config: AlignConfig) -> None:
    """Bounds the parameter itself, as CLIP does, after a step: clamping in the forward pass would stop its gradient."""
    log_scale.clamp_(max=math.log(config.logit_scale_max))


def contrastive_nll(own_BD: Tensor, others_ND: Tensor, scale: Tensor, first: int, same_BN: Tensor | None) -> Tensor:
    """Nll (B,) in nats of each pair's partner among N candidates.

    Args:
        own_BD: normalized bags of one modality.
        others_ND: normalized bags of the other; the partner of row b is row `first` + b.
        scale: inverse temperature, 0-d.
        first: position of this rank's pairs in the global batch.
        same_BN: candidates to leave out of the negatives; the partner itself always stays.
    """
    target_B = torch.arange(len(own_BD), device=own_BD.device) + first
    logits_BN = scale * own_BD @ others_ND.T
    if same_BN is not None:
        partner_BN = F.one_hot(target_B, len(others_ND)).bool()
        logits_BN = logits_BN.masked_fill(same_BN & ~partner_BN, float("-inf"))
    return F.cross_entropy(logits_BN, target_B, reduction="none")


def symmetric_nll(image_BD: Tensor, text_BD: Tensor, scale: Tensor, hashes_B2: Tensor | None) -> Tensor:
    """Nll (2, B) in nats of each image's caption and of each caption's image, among the pairs of all ranks.

    Every rank must have as many pairs.

    Args:
        image_BD: normalized bags of images.
        text_BD: normalized bags of their captions.
        scale: inverse temperature, 0-d.
        hashes_B2: of each caption and image; pairs that share one are no negatives of each other. None: all are.
    """
    images_ND, texts_ND = gather(image_BD), gather(text_BD)
    first = len(image_BD) * (dist.get_rank() if len(images_ND) > len(image_BD) else 0)
    same_BN = None
    if hashes_B2 is not None:
        same_BN = (hashes_B2[:, None] == gather(hashes_B2)[None]).any(dim=-1)
    return torch.stack(
        [
            contrastive_nll(image_BD, texts_ND, scale, first, same_BN),
            contrastive_nll(text_BD, images_ND, scale, first, same_BN),
        ]
    )


class _Gather(torch.autograd.Function):
    """Differentiable all-gather: each rank's loss has gradients for every rank's rows.

    Torch's own, `torch.distributed.nn.functional.all_gather`, is deprecated since 2.15 in favor of a private function.
    """

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Tensor:
        total_ND = grad_ND.clone()
        dist.all_reduce(total_ND)
        return total_ND.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order (N, ...); every rank must have the same number."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


class Neighbors(NamedTuple):
    """The nearest text rows of every image row by cosine, nearest first.

    Attributes:
        ids_IK: text ids.
        cosine_IK: their cosines.
    """

    ids_IK: Tensor
    cosine_IK: Tensor


@torch.no_grad()
def nearest_text_tokens(image_ID: Tensor, text_VD: Tensor, neighbors: int) -> Neighbors:
    """The K nearest text rows of every image row; all-zero rows have a cosine of 0."""
    text_VD = F.normalize(text_VD.float(), dim=-1)
    parts = [
        (F.normalize(part_CD.float(), dim=-1) @ text_VD.T).topk(min(neighbors, len(text_VD)), dim=-1)
        for part_CD in torch.split(image_ID, CHUNK)
    ]
    return Neighbors(torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts]))


@dataclass(frozen=True)
class Hubness:
    """Concentration of the neighbor lists on few text tokens (Radovanovic et al., 2010).

    Attributes:
        skewness: of the number of lists per text token; 0 for a symmetric distribution, large if hubs exist.
        distinct_nearest: number of text tokens that are the nearest of some image id.
        top10_share: share of image ids whose nearest token is one of the ten most frequent nearest ones.
    """

    skewness: float
    distinct_nearest: int
    top10_share: float


def hubness(neighbors: Neighbors, text_size: int) -> Hubness:
    """The hubness of neighbor lists over `text_size` text tokens."""
    occurrences_V = torch.bincount(neighbors.ids_IK.flatten(), minlength=text_size).double()
    centered_V = occurrences_V - occurrences_V.mean()
    deviation = centered_V.square().mean().sqrt()
    skewness = float((centered_V**3).mean() / deviation**3) if deviation > 0 else 0.0
    nearest_V = torch.bincount(neighbors.ids_IK[:, 0], minlength=text_size)
    top10 = int(nearest_V.topk(min(10, text_size)).values.sum())
    return Hubness(skewness, int((nearest_V > 0).sum()), top10 / len(neighbors.ids_IK))
