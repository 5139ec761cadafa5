"""Every causal language model of the installed transformers, built small: which of them work as a backbone.

`python -m tests.models.architectures` writes the table into docs/models.md; with names of architectures it prints their
results alone.

Each is saved, read back and compared with the library: logits before and after expansion, a gradient to every
parameter, images drawn with guidance and a cache against ones without, and an export. Sizes below are small enough for
a second each and exceed every window, so that a cache must forget too.
"""

import argparse
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.generate import Sampling, generate
from t2i_lm.models.huggingface import CarriedState, require_transformers
from t2i_lm.models.huggingface_folder import empty_huggingface, load_huggingface, save_huggingface
from t2i_lm.tokenizers.joint_vocab import JointVocab

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- architectures: written by `make architectures` -->\n", "<!-- /architectures -->\n"
VOCAB, CODES, IMAGE_TOKENS = 160, 30, 12
MOST_PARAMETERS = 90_000_000
TOLERANCE = 1e-4
GUIDANCE = 1.5
WORKS, RECOMPUTES, REFUSED, NOT_BUILT, BROKEN = "works", "works without a cache", "refused", "not built", "broken"

# Sizes by their many names; a config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff", "dim_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 96),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim_", "head_dim", "mamba_d_head", "mamba_headdim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "sliding_window", "window_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "mamba_expand"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "pad_token_id"), 1),
    "v_head_dim": 16,
    "attention_types": [[["global", "local"], 1]],
    "mamba_d_ssm": 64,
    "query_pre_attn_scalar": 16,
    "is_decoder": True,
}
MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MAMBA = ["mamba", "attention", "mamba", "attention"]
# What single architectures need besides.
MORE: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": MAMBA, "layers_block_type": MAMBA},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    **{
        kind: {"num_hidden_layers": 4, "layer_types": MIXED}
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "kimi_linear")
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "git": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
        }
    },
    "mimo_v2_flash": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
}


@dataclass(frozen=True)
class Result:
    """What became of one architecture.

    Attributes:
        kind: its `model_type`.
        outcome: one of WORKS, RECOMPUTES, REFUSED, NOT_BUILT, BROKEN.
        reason: in one line; empty where it works.
    """

    kind: str
    outcome: str
    reason: str = ""


class BrokenError(Exception):
    """A result that differs from the library's."""


def build_small(kind: str) -> Any:
    """A small random model of an architecture, in evaluation mode.

    Raises:
        Exception: whatever the library raises.
    """
    library = require_transformers()
    config_class = library.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters) | set(_fields(config_class))
    config = config_class(**{key: value for key, value in SIZES.items() if key in known} | MORE.get(kind, {}))
    auto = library.AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config, dtype=torch.float32).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters at the smallest sizes tried")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin as constants
            parameter.add_(0.02 * torch.randn_like(parameter))
        model(text_ids())
    return model


def _fields(config_class: type) -> Iterator[str]:
    for base in config_class.__mro__:
        yield from vars(base).get("__annotations__", {})


def text_ids() -> Tensor:
    """Ids (2, 12), none of them special."""
    return 2 + torch.arange(24).view(2, 12) * 5 % (VOCAB - 2)


def check(kind: str) -> Result:
    """Builds an architecture and takes it the whole way."""
    try:
        model = build_small(kind)
    except Exception as error:  # whatever a model class raises
        return Result(kind, NOT_BUILT, _line(error))
    try:
        with tempfile.TemporaryDirectory() as folder:
            return Result(kind, RECOMPUTES if whole_way(model, Path(folder)) else WORKS)
    except ValueError as error:
        return Result(kind, REFUSED, _reason(str(error), type(model).__name__, folder))
    except Exception as error:
        return Result(kind, BROKEN, _line(error))


def whole_way(model: Any, folder: Path) -> bool:
    """From a saved model to an export; whether its cache carries nothing.

    Raises:
        ValueError: if the model is refused, in one line.
        BrokenError: if a result is wrong.
    """
    ids_BT = text_ids()
    model.save_pretrained(folder / "model")
    library = require_transformers()  # which zeros the row of a pad when it reads some architectures
    reference = library.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(ids_BT).logits
    backbone = load_huggingface(folder / "model").eval()
    with torch.no_grad():
        _equal("logits", backbone(ids_BT), expected)
    random = empty_huggingface(folder / "model")
    random.reset_parameters(torch.Generator().manual_seed(0))
    vocab = expand_vocabulary(backbone, CODES, torch.Generator().manual_seed(1))
    joint_BT = torch.cat([ids_BT, ids_BT % CODES + vocab.image_offset], dim=1)
    with torch.no_grad():
        grown = backbone(joint_BT)
        _equal("logits after expansion", backbone(ids_BT)[..., :VOCAB], expected)
    backbone.train().loss(joint_BT[:, :-1], joint_BT[:, 1:]).total.backward()
    if untrained := [
        name for name, parameter in backbone.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]:
        raise BrokenError(f"no gradient to {', '.join(untrained[:3])}")
    backbone.eval()
    _equal_drawings(backbone, vocab)
    save_huggingface(backbone, folder / "export", torch.float32)
    with torch.no_grad():
        _equal("logits of the export", load_huggingface(folder / "export").eval()(joint_BT), grown)
        cache = backbone.new_cache(1, 1)
        backbone.hidden(ids_BT, cache)
    assert isinstance(cache, CarriedState)
    return cache.prefix_BTD is not None


@torch.no_grad()
def _equal_drawings(backbone: Backbone, vocab: JointVocab) -> None:
    """Compares images of a batch, with guidance and a cache, with full recomputation."""
    prompts, null = [torch.tensor([3, 5, 7]), torch.tensor([9, 2, 4, 8])], torch.tensor([6, 2])
    sampling = Sampling(guidance=GUIDANCE)
    codes_BN = generate(backbone, vocab, prompts, IMAGE_TOKENS, sampling=sampling, null_prompt=null)
    for prompt_T, codes_N in zip(prompts, codes_BN, strict=True):
        joint_N = codes_N + vocab.image_offset
        after = []
        for start_T in (prompt_T, null):
            logits_TV = backbone(torch.cat([start_T, joint_N[:-1]])[None])[0]
            after.append(logits_TV[len(start_T) - 1 :, vocab.image_offset :])
        guided_NI = after[1] + GUIDANCE * (after[0] - after[1])
        lost_N = guided_NI.amax(dim=1) - guided_NI.gather(1, codes_N[:, None])[:, 0]
        if float(lost_N.max()) > 10 * TOLERANCE * float(guided_NI.abs().max()):
            raise BrokenError(f"{int((lost_N > 0).sum())} of {IMAGE_TOKENS} ids drawn with a cache differ")


def _equal(what: str, own: Tensor, expected: Tensor) -> None:
    difference = float((own - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise BrokenError(f"{what} differ by {difference:.1e}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _reason(message: str, name: str, folder: str) -> str:
    assert "\n" not in message, message
    for part in (f"backbone.path: {folder}/model", ": ", f"{name} "):
        message = message.removeprefix(part)
    measured = re.sub(r" \(they differ by .*?\)", "", message.removesuffix(", which is not supported"))
    return measured.replace(name, "it").replace(folder, "")


def table(results: list[Result]) -> str:
    """The section of docs/models.md."""
    library = require_transformers()
    built = [result for result in results if result.outcome != NOT_BUILT]
    work = [result for result in results if result.outcome in (WORKS, RECOMPUTES)]
    lines = [
        f"transformers {library.__version__} has {len(results)} causal architectures; {len(built)} can be built small; "
        f"{len(work)} of these work.",
        "",
        "| result | architectures |",
        "|---|---|",
    ]
    for outcome in (WORKS, RECOMPUTES, BROKEN, REFUSED, NOT_BUILT):
        groups: dict[str, list[str]] = {}
        for result in results:
            if result.outcome == outcome:
                groups.setdefault("" if outcome == NOT_BUILT else result.reason, []).append(result.kind)
        for reason, kinds in sorted(groups.items(), key=lambda group: -len(group[1])):
            named = {NOT_BUILT: "not tried: too large or not built at small sizes"}.get(outcome, outcome)
            lines.append(f"| {named}{': ' if reason else ''}{reason.replace('|', ' ')} | {', '.join(kinds)} |")
    return "\n".join(lines) + "\n"


def written(document: str, results: list[Result]) -> str:
    """A document with the table between its marks."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(results) + END + after


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="architectures (model_type); all of them by default")
    parser.add_argument("--keep", type=Path, help="JSON lines of results, continued if the file exists")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library = require_transformers()
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    names = sorted(library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kept = args.keep.read_text().splitlines() if args.keep and args.keep.is_file() else []
    results = {result.kind: result for line in kept for result in [Result(**json.loads(line))]}
    for kind in args.kinds or names:
        if kind not in results:
            results[kind] = check(kind)
            print(" ".join(filter(None, vars(results[kind]).values())), flush=True)
            if args.keep:
                with args.keep.open("a") as file:
                    file.write(json.dumps(asdict(results[kind])) + "\n")
    if not args.kinds:
        DOCS.write_text(written(DOCS.read_text(), [results[kind] for kind in names]))
    return int(any(result.outcome == BROKEN for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
