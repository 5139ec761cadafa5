"""Any causal language model of `transformers` as a backbone (extra `hf`), called as the library itself calls it.

Its token rows live in blocks of ours. What the model does around them stays its own: how an embedding scales its rows,
which cache it keeps, and what it does to logits, as far as that is a factor (`huggingface_checks` refuses the rest).

Shapes: `B` batch, `T` tokens, `D` width.
"""

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.huggingface_checks import own_logits, require_own_logits, unused_parameters
from t2i_lm.models.token_rows import Embedding, Output, TokenRows
from t2i_lm.runtime.seeds import seeded

# Names of the number of positions in configs, and what holds for a model without it: recurrent, or linear biases.
POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions", "seq_length", "n_ctx")
UNBOUNDED = 2**15
LAYERS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "n_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class HuggingFaceShape:
    """Sizes read from a `transformers` model and its config."""

    hidden_dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    weight_tying: bool


@dataclass
class CarriedState:
    """What a model carries from one position to the next, in its own classes and made by the model itself.

    Attributes:
        seen: positions so far.
        carried: arguments of the next call: keys and values, convolution and recurrent states.
        prefix_BTD: embedded positions so far of a model that carries nothing, which computes all of them again.
    """

    seen: int = 0
    carried: dict[str, Any] = field(default_factory=dict)
    prefix_BTD: Tensor | None = None


class _Moved(nn.Module):
    """Stands where the model's own embedding or head was, whose rows moved to `rows`."""

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        vars(self)["rows"] = rows  # not a module of its own, or its weights would have two names

    @property
    def weight(self) -> Tensor:
        """The text rows, of which some models read type and device."""
        return vars(self)["rows"].text  # type: ignore[no-any-return]


class _NoEmbedding(_Moved):
    """Replaces the embedding."""

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("it looks up its own token rows, whatever embeddings it is given")


class _NoHead(_Moved):
    """Replaces the head: the model then returns what it multiplies by the output rows.

    Attributes:
        gain: factor of the result; the model must hand it on, so that a factor of its own is one of the logits too.
    """

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.gain == 1.0 else x * self.gain


class _RowScale(nn.Module):
    """The embedding's own treatment of its rows, such as a factor, without the rows."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        own = copy.copy(embedding)
        own._parameters = {}
        own.padding_idx = None
        self.own = own

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (..., D) as the embedding would return them."""
        flat_ND = rows.flatten(0, -2)
        vars(self.own)["weight"] = flat_ND
        try:
            return self.own(torch.arange(len(flat_ND), device=rows.device)).view_as(rows)  # type: ignore[no-any-return]
        finally:
            del vars(self.own)["weight"]


class HuggingFaceDecoder(Backbone):
    """A `transformers` causal language model with its token rows in blocks.

    Attributes:
        body: the model without embedding and head; what its logits do not depend on, such as attention to an encoder,
            is frozen.
        first_position: number of the first position, where the model does not number those after a cache; else None.
        row_scale: what its embedding does to rows, stored as they are; None where nothing.
        has_whole_body: whether it is the whole class, as where there are weights beside the head, or its base model.
    """

    config: HuggingFaceShape
    first_position: int | None = None
    _causal_lm: Any
    _arguments: frozenset[str]

    def __init__(self, causal_lm: Any, checked: bool = True) -> None:
        """Takes over the tensors of a causal language model, without copies.

        Args:
            causal_lm: in float32, on the meta device or not.
            checked: whether to compare logits with the model's own; never on the meta device.

        Raises:
            ValueError: if its logits are not hidden states times output rows (up to a factor and a bias), or depend on
                later tokens, or on the use of its cache.
        """
        super().__init__()
        name = type(causal_lm).__name__
        embedding, head = token_modules(causal_lm)
        rows: Any = embedding.weight
        head_rows: Any = head.weight
        own_config = causal_lm.config
        expected = own_logits(causal_lm) if checked and not rows.is_meta else None
        self.hf_config = own_config
        lists = {len(part) for part in causal_lm.modules() if isinstance(part, nn.ModuleList)}
        layers = [count for key in LAYERS if isinstance(count := getattr(own_config, key, None), int)]
        if not layers:
            raise ValueError(f"backbone: {name} has no num_hidden_layers in its config, which is not supported")
        positions = (count for key in POSITIONS if isinstance(count := getattr(own_config, key, None), int))
        heads = getattr(own_config, "num_attention_heads", None)
        self.config = HuggingFaceShape(
            hidden_dim=rows.shape[1],
            n_layers=next((count for count in layers if count in lists), layers[0]),
            n_heads=heads if isinstance(heads, int) else 1,
            seq_len=next(positions, UNBOUNDED),
            vocab_size=len(rows),
            weight_tying=head_rows is rows,
        )
        self.tok_embeddings = Embedding(*rows.shape)
        self.output = Output(*rows.shape)
        self.tok_embeddings.text = rows
        self.output.text, self.output.bias = head_rows, getattr(head, "bias", None)
        plain = type(embedding).forward is nn.Embedding.forward
        self.row_scale = None if plain else _RowScale(embedding)
        self._head = _NoHead(self.output)
        moved = [tensor for tensor in (rows, head_rows, self.output.bias) if tensor is not None]
        for part in list(causal_lm.modules()):
            for own, child in list(part._modules.items()):
                if child is embedding or child is head:
                    setattr(part, own, _NoEmbedding(self.tok_embeddings) if child is embedding else self._head)
            for own, tensor in part._parameters.items():
                if any(tensor is other for other in moved):
                    part._parameters[own] = None
        base, arguments = causal_lm.base_model, inspect.signature(causal_lm.forward).parameters
        inside = {id(tensor) for tensor in base.parameters()} | {id(tensor) for tensor in base.buffers()}
        outside = any(id(tensor) not in inside for tensor in [*causal_lm.parameters(), *causal_lm.buffers()])
        self.has_whole_body = outside
        self.body = causal_lm if outside else base
        # Not a module of its own: its weights are those of `body`, under whose name they have always been saved.
        vars(self)["_causal_lm"] = causal_lm
        self._arguments = frozenset(arguments)
        if expected is not None:
            require_own_logits(self, name, expected)
            if self.first_position:  # its table begins with rows for pads
                self.config = replace(self.config, seq_len=self.config.seq_len - self.first_position)
            for parameter in unused_parameters(self, expected).values():  # DDP would wait for their gradients
                parameter.requires_grad_(False)
        self.train()

    def hidden(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Final normalized hidden states (B, T, D); with a cache, of the new positions only.

        Raises:
            ValueError: if the sequence exceeds the model's positions.
        """
        return self._hidden(self.tok_embeddings(ids_BT), cache)

    def next_hidden(self, ids_B: Tensor, cache: Any, image_rows_only: bool = False) -> Tensor:
        return self._hidden(self.tok_embeddings(ids_B[:, None], image_rows_only), cache)[:, 0]

    def _hidden(self, embedded_BTD: Tensor, cache: CarriedState | None) -> Tensor:
        new = embedded_BTD.shape[1]
        end = new + (0 if cache is None else cache.seen)
        if end > self.config.seq_len:
            raise ValueError(f"position {end} is past the backbone's {self.config.seq_len}")
        if self.row_scale is not None:
            embedded_BTD = self.row_scale(embedded_BTD)
        options: dict[str, Any] = {"use_cache": cache is not None} if self.takes("use_cache") else {}
        if cache is None:
            return self._causal_lm(inputs_embeds=embedded_BTD, **options).logits  # type: ignore[no-any-return]
        if cache.prefix_BTD is not None:
            embedded_BTD = torch.cat([cache.prefix_BTD, embedded_BTD], dim=1)
        elif self.first_position is not None and cache.seen:
            positions_T = torch.arange(cache.seen, end, device=embedded_BTD.device) + self.first_position
            options["position_ids"] = positions_T.expand(len(embedded_BTD), -1)
        output = self._causal_lm(inputs_embeds=embedded_BTD, **options, **cache.carried)
        cache.carried = {key: value for key, value in output.items() if self.takes(key) and value is not None}
        cache.prefix_BTD = None if cache.carried else embedded_BTD
        cache.seen = end
        return output.logits[:, -new:]  # type: ignore[no-any-return]

    def takes(self, argument: str) -> bool:
        """Whether the model has an argument of this name."""
        return argument in self._arguments

    def train(self, mode: bool = True) -> "HuggingFaceDecoder":
        super().train(mode)
        self._causal_lm.training = mode
        return self

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

    def new_cache(self, batch: int, length: int) -> CarriedState:
        """A growing cache, which the model makes at its first call."""
        return CarriedState()

    def reset_parameters(self, generator: Generator) -> None:
        """The architecture's own initialization."""
        with seeded(generator):
            fresh = require_transformers().AutoModelForCausalLM.from_config(self.hf_config, dtype=torch.float32)
        self.load_state_dict(HuggingFaceDecoder(fresh, checked=False).state_dict())


def token_modules(causal_lm: Any) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the head of a causal language model.

    Raises:
        ValueError: if they are not one matrix each, of equal shape.
    """
    name = type(causal_lm).__name__
    try:
        embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = head = None
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"backbone: {name} has not one embedding and one output matrix of tokens, as is required")
    if embedding.weight.shape != head.weight.shape:
        raise ValueError(
            f"backbone: {name} has {tuple(embedding.weight.shape)} embedding and {tuple(head.weight.shape)} output "
            "rows; equal shapes are required"
        )
    return embedding, head


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
