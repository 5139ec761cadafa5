"""Random weights that share statistics with pre-trained ones: controls of what pre-training gives.

From few statistics to many: mean and standard deviation of each tensor (`draw_entries`), with the structure of
attention (`draw_mimetic`), all values of each tensor in another order (`shuffle_entries`).
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from t2i_lm.models.decoder import Attention


@torch.no_grad()
def shuffle_entries(model: nn.Module, generator: Generator) -> None:
    """Permutes the entries within each tensor; in place."""
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))


@torch.no_grad()
def draw_entries(model: nn.Module, generator: Generator) -> None:
    """Replaces each tensor by normal entries of its mean and standard deviation; in place."""
    for parameter in model.parameters():
        values = parameter.float()
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.copy_(values.mean() + values.std(correction=0) * drawn)


@torch.no_grad()
def draw_mimetic(model: nn.Module, generator: Generator) -> None:
    """As `draw_entries`, but each head's attention matrices keep their similarities; in place.

    Pre-trained heads have query and key matrices, and value and output matrices, whose product is near a multiple of
    the identity, which is most of what a closed-form initialization copies from them (Trockman and Kolter, 2023). Here
    the keys of a head are mixed with its queries, and its output with its values, such that each pair of matrices has
    the cosine similarity of the pre-trained pair; each tensor keeps its standard deviation.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    trained = [similarities(layer) for layer in layers]
    draw_entries(model, generator)
    for layer, (queries_keys_H, values_outs_H) in zip(layers, trained, strict=True):
        query_HKD, key_HKD, value_HKD, out_HKD = matrices_of_heads(layer)
        key_HKD.copy_(_mix(query_HKD, key_HKD, queries_keys_H))
        out_HKD.copy_(_mix(value_HKD, out_HKD, values_outs_H))


def matrices_of_heads(attention: Attention) -> list[Tensor]:
    """Query, key, value and transposed output matrices (H, K, D) of the heads of a layer; views of its weights."""
    blocks = [*attention.in_proj.weight.chunk(3), attention.out_proj.weight.T]
    return [block.view(attention.n_heads, -1, block.shape[1]) for block in blocks]


def similarities(attention: Attention) -> tuple[Tensor, Tensor]:
    """Cosine similarity (H,) of the query and key matrices of each head, and of its value and output matrices.

    It is the trace of their product, relative to its largest possible value.
    """
    query_HE, key_HE, value_HE, out_HE = (matrix.float().flatten(1) for matrix in matrices_of_heads(attention))
    return F.cosine_similarity(query_HE, key_HE), F.cosine_similarity(value_HE, out_HE)


def _mix(first_HKD: Tensor, second_HKD: Tensor, cosine_H: Tensor) -> Tensor:
    """The second matrices turned towards independent first ones, to a cosine similarity, at their own scale."""
    cosine_H11 = cosine_H[:, None, None].to(first_HKD)
    scale = second_HKD.std(correction=0) / first_HKD.std(correction=0)
    return cosine_H11 * scale * first_HKD + (1 - cosine_H11.square()).sqrt() * second_HKD
