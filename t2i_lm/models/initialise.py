"""Initialisations between pre-trained and random: what of a pre-trained model helps, its statistics, body or rows?

Each is made from two whole backbones of one architecture, so whatever is random in an arm is what the random arm has.
"""

import torch
from torch import Generator, nn

from t2i_lm.models.backbone import Backbone


@torch.no_grad()
def shuffle_entries(model: nn.Module, generator: Generator) -> None:
    """Permutes the entries of every tensor within it: the same statistics, no knowledge."""
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))


@torch.no_grad()
def copy_text_rows(source: Backbone, target: Backbone) -> None:
    """Gives `target` the embedding and output rows of `source`, both unexpanded."""
    target.tok_embeddings.text.copy_(source.tok_embeddings.text)
    target.output.text.copy_(source.output.text)
