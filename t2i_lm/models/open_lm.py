"""open_lm checkpoints: upstream's `.pt` (read), safetensors (read and written)."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_lm.config.presets import PRESETS
from t2i_lm.models.decoder import Decoder, DecoderConfig
from t2i_lm.models.wrapped_names import unwrapped_state
from t2i_lm.storage.cards import require_intact
from t2i_lm.storage.reading import reading, reason
from t2i_lm.storage.writing import atomic_file, write_atomic

# Keys of a `.pt` that hold tensors: open_lm's own, and those of other trainers.
HOLDERS = ("state_dict", "model", "module")
# Upstream registers the projections of its GELU layer twice.
GELU_TWINS = {"_ff_w1.": "feed_forward.0.", "_ff_w2.": "feed_forward.2."}


def decoder_config(source: str | Path | Mapping[str, Any], **overrides: Any) -> DecoderConfig:
    """A `DecoderConfig` from a preset name, a JSON file or a mapping.

    Raises:
        ValueError: on an unknown preset, key or value, or a file that is not JSON.
    """
    if isinstance(source, Mapping):
        values, origin = dict(source), "the model config"
    elif str(source) in PRESETS:
        values, origin = dict(PRESETS[str(source)]), f"preset {source}"
    elif Path(source).is_file():
        origin = str(source)
        try:
            values = json.loads(Path(source).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is not a JSON model config: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{source} is not a model config: expected a JSON object, found {type(values).__name__}")
    else:
        raise ValueError(f"no model config {str(source)!r}: expected a JSON file or one of {', '.join(PRESETS)}")
    values |= {key: value for key, value in overrides.items() if value is not None}
    known = {field.name for field in fields(DecoderConfig)}
    if unknown := set(values) - known:
        raise ValueError(f"{origin}: unknown key {sorted(unknown)[0]!r}; expected {', '.join(sorted(known))}")
    missing = {"hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size", "positional_embedding_type"} - set(values)
    if missing:
        raise ValueError(
            f"{origin}: {sorted(missing)[0]!r} is missing and cannot be inferred from shapes; "
            "the released open_lm-1b needs positional_embedding_type=head_rotary"
        )
    try:
        return DecoderConfig(**values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{origin}: {reason(error)}") from error


def open_lm_state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """Weights under open_lm's names, row blocks joined; detached, on the decoder's device."""
    state = {
        name: tensor.detach()
        for name, tensor in decoder.state_dict().items()
        if not name.startswith(("tok_embeddings.", "output."))
    }
    state["tok_embeddings.weight"] = decoder.tok_embeddings.matrix().detach()
    if not decoder.config.weight_tying:
        state["output.weight"] = decoder.output.matrix().detach()
    for twin, name in GELU_TWINS.items():
        state |= {key.replace(name, twin): tensor.clone() for key, tensor in state.items() if name in key}
    return state


def load_open_lm_state(decoder: Decoder, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies weights under open_lm's names into an unexpanded decoder.

    Raises:
        ValueError: naming the first missing, unknown or wrongly shaped tensor.
    """
    state = {name: tensor for name, tensor in unwrapped_state(state, origin).items() if not name.endswith("inv_freq")}
    for twin, own_name in GELU_TWINS.items():
        state = {name.replace(twin, own_name): tensor for name, tensor in state.items()}
    renamed = {"tok_embeddings.weight": "tok_embeddings.text", "output.weight": "output.text"}
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    if decoder.config.weight_tying:
        rows = [state[name] for name in ("tok_embeddings.text", "output.text") if name in state]
        if len(rows) == 2 and not torch.equal(*rows):
            raise ValueError(f"{origin} has an embedding and an output of its own; expected weight_tying=false")
        state.setdefault("output.text", state.get("tok_embeddings.text", torch.empty(0)))
    own = decoder.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            what = "is missing from" if name not in state else "does not belong to this model config but is in"
            raise ValueError(f"tensor {name} {what} {origin}")
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"tensor {name} in {origin} has shape {tuple(state[name].shape)}, "
                f"the model config needs {tuple(own[name].shape)}"
            )
    decoder.load_state_dict(dict(state))


def load_open_lm(path: str | Path, config: str | Path | Mapping[str, Any] | None = None) -> Decoder:
    """Loads an open_lm checkpoint into a decoder, in float32.

    Args:
        path: an open_lm `.pt` (tensors under `state_dict`, read with `weights_only=True`), a safetensors
            file, or a folder with one of them. `module.`, `_orig_mod.` and the like are dropped from names.
        config: open_lm's model JSON (path or dict) or a preset's name; by default `config.json` beside `path`.

    Raises:
        ValueError: if the file cannot be read, does not match the config, or a card.json beside it.
    """
    path = Path(path)
    require_intact(path)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if config is None:
        config = path.with_name("config.json")
        if not config.is_file():
            raise ValueError(f"{path} requires a model config: pass open_lm's model JSON or put config.json beside it")
    with reading("backbone.path", config if isinstance(config, str | Path) else path):
        decoder = Decoder(decoder_config(config))
    try:
        state: Mapping[str, Tensor]
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = _tensors(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} contains more than tensors and is not loaded (weights_only failed)") from error
    except Exception as error:  # safetensors and unpickling raise many types on damaged files
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason(error)}") from error
    load_open_lm_state(decoder, state, str(path))
    return decoder.float()


def _tensors(saved: Any) -> Mapping[str, Tensor]:
    """The tensors of an unpickled checkpoint.

    Raises:
        ValueError: naming what is there instead.
    """
    held = {key: saved[key] for key in HOLDERS if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping)}
    state = next(iter(held.values()), saved)
    if not isinstance(state, Mapping) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        found = ", ".join(map(str, list(state)[:5])) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected tensors by name, at the top or in {', '.join(HOLDERS)}; found {found or 'nothing'}")
    return state


def weights_in(folder: Path) -> Path:
    """The weights file of a folder: `model.safetensors`, or the only `.pt`.

    Raises:
        ValueError: if there are several `.pt`, naming them.
    """
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    files = sorted(folder.glob("*.pt"))
    if len(files) > 1:
        raise ValueError(f"{folder} has several checkpoints, choose one: {', '.join(path.name for path in files)}")
    return files[0] if files else folder / "model.safetensors"


def save_open_lm(decoder: Decoder, folder: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes `model.safetensors` (open_lm's names) and `config.json` for `load_open_lm(folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in open_lm_state_dict(decoder).items()}
    with atomic_file(folder / "model.safetensors") as file:
        save_file(state, file, metadata=dict(metadata))
    # All rows of an expanded decoder become one vocabulary.
    config = asdict(decoder.config) | {"vocab_size": len(decoder.tok_embeddings.matrix())}
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
