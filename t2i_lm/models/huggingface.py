"""Any causal language model of `transformers` as a backbone (extra `hf`); code from a repository is never run.

Shapes: `B` batch, `T` tokens, `D` width.
"""

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Generator, Tensor, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.token_rows import Embedding, Output
from t2i_lm.runtime.seeds import seeded

# Of the largest logit: allowance for reordered float32 sums.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class HuggingFaceShape:
    """Sizes read from a `transformers` config."""

    hidden_dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    weight_tying: bool


class _NoEmbedding(nn.Module):
    """Replaces the model's own embedding, whose rows moved to `tok_embeddings`."""

    def forward(self, *_: Any) -> Tensor:
        raise AssertionError("the backbone embeds tokens itself")


class HuggingFaceDecoder(Backbone):
    """A `transformers` causal language model with its token rows in blocks.

    Attributes:
        body: the model without embedding and head.
    """

    config: HuggingFaceShape

    def __init__(self, causal_lm: Any) -> None:
        """Takes over the tensors of a causal language model, without copies.

        Raises:
            ValueError: if its logits are not hidden states times output rows (bias, scale, cap).
        """
        super().__init__()
        name = type(causal_lm).__name__
        head, self.body = causal_lm.get_output_embeddings(), causal_lm.base_model
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"backbone: {name} has an output bias, which is not supported")
        rows, head_rows, own = self.body.get_input_embeddings().weight, head.weight, causal_lm.config
        for key in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(own, key, None) is None:
                raise ValueError(f"backbone: {name} has no {key} in its config, which is not supported")
        on_meta = rows.is_meta
        probe_BT = torch.arange(min(8, len(rows)))[None]
        with torch.no_grad():
            expected = None if on_meta else causal_lm.eval()(probe_BT).logits.float()
        # Renamed in transformers 5.24.
        arguments = inspect.signature(self.body.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"
        self.hf_config = own
        self.config = HuggingFaceShape(
            hidden_dim=rows.shape[1],
            n_layers=own.num_hidden_layers,
            n_heads=own.num_attention_heads,
            seq_len=own.max_position_embeddings,
            vocab_size=len(rows),
            weight_tying=head_rows is rows,
        )
        self.tok_embeddings = Embedding(*rows.shape)
        self.output = Output(*rows.shape)
        self.tok_embeddings.text = rows
        self.output.text = head_rows
        self.body.set_input_embeddings(_NoEmbedding())
        if expected is not None:
            with torch.no_grad():
                differ = (self(probe_BT) - expected).abs().max()
            if differ > TOLERANCE * expected.abs().max():
                raise ValueError(f"backbone: {name} scales, caps or shifts its logits, which is not supported")
        self.train()

    def hidden(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Final normalized hidden states (B, T, D); with a cache, of the new positions only.

        Raises:
            ValueError: if the sequence exceeds the model's positions.
        """
        return self._hidden(self.tok_embeddings(ids_BT), cache)

    def next_hidden(self, ids_B: Tensor, cache: Any, image_rows_only: bool = False) -> Tensor:
        return self._hidden(self.tok_embeddings(ids_B[:, None], image_rows_only), cache)[:, 0]

    def _hidden(self, embedded_BTD: Tensor, cache: Any) -> Tensor:
        seen = 0 if cache is None else cache.get_seq_length()
        if seen + embedded_BTD.shape[1] > self.config.seq_len:
            raise ValueError(f"position {seen + embedded_BTD.shape[1]} is past the backbone's {self.config.seq_len}")
        cached = {} if cache is None else {self._cache_argument: cache}
        output = self.body(inputs_embeds=embedded_BTD, use_cache=cache is not None, **cached)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def enable_activation_checkpointing(self) -> None:
        self.body.gradient_checkpointing_enable({"use_reentrant": False})

    def enable_packing(self) -> None:
        raise ValueError("trainer.packing=True: expected false, a transformers backbone cannot be packed")

    def compile_steps(self) -> None:
        """Refuses: its growing cache would recompile for every token."""
        raise ValueError("--compile: a transformers backbone generates with a growing cache, which cannot be compiled")

    @property
    def generates_compiled(self) -> bool:
        """Whether `trainer.compile` compiled its blocks, which generation uses too."""
        return any(part._compiled_call_impl is not None for part in self.body.modules())

    def new_cache(self, batch: int, length: int) -> Any:
        """A growing cache of `transformers`."""
        from transformers import DynamicCache

        return DynamicCache()

    def reset_parameters(self, generator: Generator) -> None:
        """The architecture's own initialization."""
        with seeded(generator):
            fresh = require_transformers().AutoModelForCausalLM.from_config(self.hf_config, dtype=torch.float32)
        self.load_state_dict(HuggingFaceDecoder(fresh).state_dict())


def is_huggingface(folder: Path) -> bool:
    """Whether a folder's `config.json` is a `transformers` config (open_lm's has no `model_type`)."""
    path = folder / "config.json"
    try:
        return folder.is_dir() and "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def load_huggingface(folder: Path) -> HuggingFaceDecoder:
    """A pre-trained backbone from a `save_pretrained` folder, in float32.

    Raises:
        ValueError: if it cannot be read or is not a causal language model.
    """
    library = require_transformers()
    try:
        model, info = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"backbone.path: {folder} cannot be read by transformers: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"backbone.path: {folder} lacks the tensor {sorted(info['missing_keys'])[0]}")
    return HuggingFaceDecoder(model)


def empty_huggingface(folder: Path) -> HuggingFaceDecoder:
    """The architecture of a folder's config, its weights to be initialized.

    Raises:
        ValueError: if the config is not that of a causal language model.
    """
    library = require_transformers()
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return HuggingFaceDecoder(library.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    except (OSError, KeyError) as error:
        raise ValueError(f"backbone.config: {folder} cannot be read by transformers: {error}") from error


def save_huggingface(decoder: HuggingFaceDecoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model for `transformers`, with all rows of an expanded vocabulary."""
    config = copy.deepcopy(decoder.hf_config)
    matrix_VD, output_VD = decoder.tok_embeddings.matrix().detach(), decoder.output.matrix().detach()
    config.vocab_size = len(matrix_VD)
    model: Any = require_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing = model.base_model.load_state_dict(decoder.body.state_dict(), strict=False).missing_keys
    assert len(missing) == 1, missing  # the embedding alone
    model.get_input_embeddings().weight.data.copy_(matrix_VD)
    model.get_output_embeddings().weight.data.copy_(output_VD)
    model.save_pretrained(folder)


def require_transformers(asked_by: str = "backbone.path") -> Any:
    """The library, for the key or option `asked_by`.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{asked_by}: requires transformers, which is not installed: pip install 't2i_lm[hf]'"
        ) from error
    return transformers
