"""Reference numbers of open_lm's variants from upstream's code; weights come from a formula and are not stored.

`python -m tests.models.open_lm_variants > tests/models/open_lm_variants.json` regenerates them on commit 9bb92ef of
mlfoundations/open_lm: as `make open-lm` installs it, or a CHECKOUT, named after the module.
"""

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = {
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "seq_len": 24,
    "vocab_size": 40,
    "post_embed_norm": False,
    "weight_tying": False,
    "model_norm": "default_layer_norm",
    "qk_norm": False,
    "positional_embedding_type": "rotary",
    "ffn_type": "swiglu_torch",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "head_rotary": {"positional_embedding_type": "head_rotary"},
    "llama_rotary": {"positional_embedding_type": "llama_rotary"},
    "none": {"positional_embedding_type": "none"},
    "gelu": {"ffn_type": "gelu"},
    "gemma_geglu": {"ffn_type": "gemma_geglu"},
    "post_embed_norm": {"post_embed_norm": True},
    "no_wb_layer_norm": {"model_norm": "no_wb_layer_norm", "qk_norm": True},
    "lp_layer_norm": {"model_norm": "lp_layer_norm", "qk_norm": True},
    "gain_only_layer_norm": {"model_norm": "gain_only_layer_norm"},
    "rms_norm_qk": {"model_norm": "rms_norm", "qk_norm": True},
    "tied": {"weight_tying": True},
}
IDS_BT = (torch.arange(48) * 7 % 40).view(2, 24)


def formula(shape: torch.Size, number: int) -> Tensor:
    """Weights without a random generator, equal on every machine and in every version."""
    count = shape.numel()
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + number).float().view(shape)
    return 1 + 0.1 * wave if len(shape) == 1 else wave / shape[-1] ** 0.5


def weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor per name; names that upstream registers twice or ties share one."""
    names = sorted(shapes)
    return {name: formula(shapes[name], number) for number, name in enumerate(names)}


def figures(logits_BTV: Tensor, grad_norms: dict[str, float]) -> dict[str, Any]:
    """The numbers to compare: loss, some logits in full precision, gradient norms."""
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten())
    return {
        "loss": float(loss.detach()),
        "logits": logits_BTV[1, ::6, ::9].flatten().tolist(),
        "grad_norms": grad_norms,
    }


def stub_xformers() -> None:
    """Stubs xformers, which upstream imports: upstream's torch SwiGLU replaces its SwiGLU, the rest is unused."""
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.SwiGLU = nn.Identity  # type: ignore[attr-defined]
    ops.LowerTriangularMask = ops.memory_efficient_attention = None  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {"xformers": package, "xformers.ops": ops}


def measure_upstream(checkout: Path | None) -> dict[str, dict[str, Any]]:
    """Every variant's numbers from upstream's code."""
    stub_xformers()
    if checkout is not None:
        sys.path.insert(0, str(checkout))
    from open_lm.attention import torch_attn
    from open_lm.model import Params, Transformer
    from open_lm.norms import get_norm_class

    measured = {}
    for name, changes in VARIANTS.items():
        config = BASE | changes
        model = Transformer(
            Params(
                dim=config["hidden_dim"],
                n_layers=config["n_layers"],
                n_heads=config["n_heads"],
                seq_len=config["seq_len"],
                vocab_size=config["vocab_size"],
                post_embed_norm=config["post_embed_norm"],
                weight_tying=config["weight_tying"],
                norm_type=get_norm_class(config["model_norm"]),
                attn_func=torch_attn,
                apply_qk_norm=config["qk_norm"],
                positional_embedding_type=config["positional_embedding_type"],
                ffn_type=config["ffn_type"],
            )
        )
        named = dict(model.named_parameters())
        for key, tensor in weights({key: value.shape for key, value in named.items()}).items():
            named[key].data.copy_(tensor)
        logits_BTV = model(IDS_BT)[0]
        F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()).backward()
        measured[name] = figures(logits_BTV, {key: float(value.grad.norm()) for key, value in named.items()})
    return measured


if __name__ == "__main__":
    for line in (
        json.dumps(measure_upstream(Path(sys.argv[1]) if sys.argv[1:] else None)).replace("}}, ", "}},\n").splitlines()
    ):
        print(line)
