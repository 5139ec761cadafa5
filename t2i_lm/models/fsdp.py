"""Sharding a language model with torch's FSDP2: every process holds a part of each parameter."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from t2i_lm.models.backbone import Backbone


def blocks_of(model: Backbone) -> list[nn.Module]:
    """The transformer blocks, in order.

    Raises:
        ValueError: if they are not in one `ModuleList`.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for candidates in lists:
        if len(candidates) == model.config.n_layers:
            return list(candidates)
    raise ValueError("backbone: no list of blocks found, so it can be neither sharded nor compiled by block")


def shard(model: Backbone, mesh: DeviceMesh) -> None:
    """Shards the model in place: each block, then embedding and output, then the rest.

    Token rows are whole only inside the forward methods of their module, which is why the loss is one of them. Tied
    rows belong to the rest, which is whole during the model's own forward methods. Frozen parameters are sharded too.

    Args:
        model: already expanded and frozen.
        mesh: one dimension shards; of two, the first replicates and the second shards.
    """
    settings: dict[str, Any] = {"mesh": mesh}
    for block in blocks_of(model):
        fully_shard(block, **settings)
    if not model.config.weight_tying:
        fully_shard(model.tok_embeddings, **settings)
        fully_shard(model.output, **settings)
    fully_shard(model, **settings)
    for module in (model.output, model):
        register_fsdp_forward_method(module, "loss")  # no-op for a module that is not sharded itself
