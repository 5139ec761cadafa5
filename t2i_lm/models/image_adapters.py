"""Low-rank adapters that apply to image positions alone (`lora.image_only`).

An adapter adds B(A(x)) to its layer. Where A(x) is multiplied by 0 it adds exactly 0, so that the logits of plain text
stay equal to the bit. peft can gate an adapter by an offset (its "activated LoRA"), not by the modality of a position,
hence the hooks.

Shapes: `B` batch, `T` positions, `R` rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder


class ImageGate:
    """Which positions of the latest ids are images, by hooks on the embedding and on the first factor of adapters.

    A recomputed block (activation checkpointing) reads the ids of the latest forward pass, which is its own.

    Attributes:
        mask_BT1: 1 at image positions; None if all are.
        ids: the latest ones.
    """

    def __init__(self, first_image: int) -> None:
        """`first_image` is the first id of images."""
        self.first_image = first_image
        self.mask_BT1: Tensor | None = None
        self.ids: Tensor | None = None

    def read(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the embedding: its ids are joint ids, or image codes if `image_rows_only`."""
        ids_BT, *rest = arguments
        self.ids = ids_BT
        codes = named.get("image_rows_only", rest[0] if rest else False)
        self.mask_BT1 = None if codes else (ids_BT >= self.first_image)[..., None]

    def apply(self, _: nn.Module, arguments: tuple[Any, ...], low_BTR: Tensor) -> Tensor:
        """After an adapter's first factor.

        Raises:
            ValueError: if the layer computes other positions than the embedding looked up.
        """
        assert self.ids is not None
        mask, positions = self.mask_BT1, self.ids.numel()
        if mask is not None and low_BTR.ndim == 2:  # some layers see the positions of all sequences in a row
            mask = mask.flatten(0, 1)
        computed = low_BTR.shape[:-1]
        if computed.numel() != positions or (mask is not None and mask.shape[:-1] != computed):
            raise ValueError(
                f"lora.image_only=True: expected false, a layer of this backbone computes {tuple(computed)} positions "
                f"for {positions} ids, so that their modality is unknown there"
            )
        return low_BTR if mask is None else low_BTR * mask


def restrict_adapters(model: Backbone, first_image: int) -> None:
    """Restricts the adapters of a model to positions whose id is at least `first_image`.

    Raises:
        ValueError: if routed experts have adapters, which see their tokens in another order, or the model has no cache:
            it computes the caption again at every image token.
    """
    factors = {name: part for name, part in model.named_modules() if name.endswith(".lora_A.default")}
    assert factors
    for name in factors:
        layer: Any = model.get_submodule(name.removesuffix(".lora_A.default"))
        if hasattr(layer, "get_param"):  # peft's adapter of a parameter
            experts = name.removesuffix(".lora_A.default").removesuffix(".base_layer")
            raise ValueError(f"lora.image_only=True: expected false, {experts} holds routed experts")
    gate = ImageGate(first_image)
    model.tok_embeddings.register_forward_pre_hook(gate.read, with_kwargs=True)
    for part in factors.values():
        part.register_forward_hook(gate.apply)
    if not isinstance(model, Decoder) and not model.output.text.is_meta:
        _require_single_steps(model)


@torch.no_grad()
def _require_single_steps(model: Backbone) -> None:
    """Reads two text ids and one image code as in generation, which `ImageGate.apply` refuses where it cannot hold."""
    ids_2 = torch.zeros(2, dtype=torch.int64, device=model.output.text.device)
    training, cache = model.training, model.new_cache(1, 3)
    model.eval()
    model.hidden(ids_2[None], cache)
    model.next_hidden(ids_2[:1], cache, image_rows_only=True)
    model.train(training)


def is_restricted(model: nn.Module) -> bool:
    """Whether adapters of a model apply to image positions alone, and can therefore not be merged into its weights."""
    hooks = [hook for part in model.modules() for hook in part._forward_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), ImageGate) for hook in hooks)
