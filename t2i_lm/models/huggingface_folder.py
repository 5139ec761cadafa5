"""Folders of `transformers` models and of `peft` adapters; code from a repository is never run.

A folder is read whole or refused: quantized weights, weights that the architecture has no place for and places without
weights are errors in one line.
"""

import copy
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from t2i_lm.models.huggingface import HuggingFaceDecoder, require_transformers
from t2i_lm.models.huggingface_checks import first_line
from t2i_lm.models.wrapped_names import renaming, unwrapped
from t2i_lm.storage.writing import writing

ADAPTER = "adapter_config.json"
# Names listed in an error.
LISTED = 3


def is_huggingface(folder: Path) -> bool:
    """Whether a folder has a `transformers` config (open_lm's has no `model_type`) or a `peft` adapter."""
    if not folder.is_dir():
        return False
    if (folder / ADAPTER).is_file():
        return True
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def base_folder(folder: Path) -> Path | None:
    """The folder of the model that an adapter belongs to; None for a model.

    Raises:
        ValueError: if it is not on this machine, or the adapter's config cannot be read.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return None
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"backbone.path: {path} cannot be read: {first_line(error)}") from error
    places = [Path(named).expanduser(), folder / named, folder.parent / named] if isinstance(named, str) else []
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise ValueError(
            f"backbone.path: {folder} is a peft adapter of {named or 'no named model'}, which is no folder of a model; "
            f"set base_model_name_or_path in {ADAPTER} to that folder, or merge the adapter"
        )
    return found


def load_huggingface(folder: Path) -> HuggingFaceDecoder:
    """A pre-trained backbone from a `save_pretrained` folder or a `peft` adapter, merged; in float32.

    Raises:
        ValueError: if it cannot be read whole or is not a causal language model.
    """
    base = base_folder(folder)
    with _quiet(require_transformers()):
        return _decoder(_read(folder) if base is None else _merged(folder, base), f"backbone.path: {folder}")


def empty_huggingface(folder: Path) -> HuggingFaceDecoder:
    """The architecture of a folder's config, its weights to be initialized.

    Raises:
        ValueError: if the config is not that of a causal language model.
    """
    library, folder = require_transformers(), base_folder(folder) or folder
    with _quiet(library):
        config = _config(folder, "backbone.config")
        try:
            model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # whatever a model class raises
            raise ValueError(
                f"backbone.config: {folder} cannot be built by transformers: {first_line(error)}"
            ) from error
        return _decoder(model, f"backbone.config: {folder}")


def _decoder(model: Any, where: str) -> HuggingFaceDecoder:
    """Admits a model, and notes what of it is frozen."""
    try:
        decoder = HuggingFaceDecoder(model)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('backbone: ')}") from error
    frozen = [name for name, parameter in decoder.named_parameters() if not parameter.requires_grad]
    if frozen:
        print(f"note: {where} has {_listed(frozen)} without effect on its logits, which stay frozen", file=sys.stderr)
    return decoder


def save_huggingface(decoder: HuggingFaceDecoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model for `transformers`, with all rows of an expanded vocabulary."""
    config = copy.deepcopy(decoder.hf_config)
    matrix_VD, output_VD = decoder.tok_embeddings.matrix().detach(), decoder.output.matrix().detach()
    for key, value in config.to_dict().items():
        if key.endswith("vocab_size") and value == decoder.config.vocab_size:
            setattr(config, key, len(matrix_VD))
    model: Any = require_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    embedding, head, bias_V = model.get_input_embeddings(), model.get_output_embeddings(), decoder.output.bias
    own = {id(tensor) for part in (embedding, head) for tensor in part.parameters()}
    target = model if decoder.has_whole_body else model.base_model
    missing = target.load_state_dict(decoder.body.state_dict(), strict=False).missing_keys
    state = dict(target.named_parameters(remove_duplicate=False))
    assert all(id(state.get(name)) in own for name in missing), missing
    if decoder.row_scale is not None:
        embedding.load_state_dict(decoder.row_scale.own.state_dict(), strict=False)
    embedding.weight.data.copy_(matrix_VD)
    head.weight.data.copy_(output_VD)
    if bias_V is not None:
        head.bias.data.zero_()[: len(bias_V)] = bias_V.detach()
    with writing(folder):
        model.save_pretrained(folder)


def _config(folder: Path, key: str = "backbone.path") -> Any:
    """The config object of a folder with a causal language model of the library's own code.

    Raises:
        ValueError: in one line, before any weights are read.
    """
    library = require_transformers()
    where = f"{key}: {folder}"
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}/config.json cannot be read: {first_line(error)}") from error
    kind, version = values.get("model_type"), f"transformers {library.__version__}"
    quantized = values.get("quantization_config") or values.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise ValueError(f"{where} has quantized weights ({method}); give the model before quantization")
    if kind not in library.models.auto.configuration_auto.CONFIG_MAPPING:
        code = "; its own code (auto_map) is never run" if "auto_map" in values else ""
        raise ValueError(f"{where} has model_type={kind!r}, which {version} does not have{code}")
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config class raises
        raise ValueError(f"{where}/config.json cannot be read by transformers: {first_line(error)}") from error
    made_for = ", ".join(values.get("architectures") or [kind])
    if config.is_encoder_decoder:
        raise ValueError(f"{where} ({made_for}) is an encoder-decoder; a causal language model is required")
    if type(config) not in library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{where} ({made_for}) is no causal language model of {version}")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"{where} ({made_for}) wraps a language model with other modalities; save its language model alone"
        )
    return config


def _read(folder: Path) -> Any:
    """The causal language model of a folder, in float32.

    Raises:
        ValueError: if a tensor is missing, unused or of another shape.
    """
    config = _config(folder)
    model, info = _from_pretrained(folder, config, {})
    wrapped = [name for name in info["unexpected_keys"] if unwrapped(name) != name]
    if wrapped:
        model, info = _from_pretrained(folder, config, renaming())
    where, kind, faults = f"backbone.path: {folder}", type(model).__name__, []
    shapes = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    for names, fault in (
        (info["missing_keys"], f"lacks {{}} of {kind}"),
        (shapes, f"has {{}} in another shape than its config.json states for {kind}"),
        (info["unexpected_keys"], f"has {{}} that {kind} with its config.json does not use"),
    ):
        if names:
            faults.append(fault.format(_listed(names)))
    if faults:
        raise ValueError(f"{where} {'; it '.join(faults)}")
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted(set(tied) - set(model.all_tied_weights_keys)):
        raise ValueError(
            f"{where} has a tensor {untied[0]} of its own, but tie_word_embeddings=true in its config.json; set it to "
            "false if the tensor was trained"
        )
    return model


def _from_pretrained(folder: Path, config: Any, renamed: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    library = require_transformers()
    try:
        return library.AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported with the rest
            key_mapping=renamed or None,
        )
    except Exception as error:  # whatever a reader or a model class raises
        found = sorted({path.suffix for path in folder.iterdir() if path.suffix not in (".json", "")})
        others = f"; the folder has {', '.join(found)}" if isinstance(error, OSError) and found else ""
        raise ValueError(
            f"backbone.path: {folder} cannot be read by transformers: {first_line(error)}{others}"
        ) from error


def _merged(folder: Path, base: Path) -> Any:
    """A model with an adapter added to its weights.

    Raises:
        ValueError: if peft is not installed, or the adapter cannot be merged whole.
    """
    where = f"backbone.path: {folder}"
    try:
        import peft
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ValueError(f"{where}: requires peft, which is not installed: pip install 't2i_lm[lora]'") from error
    model = _read(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
            used = {unwrapped(name) for name in peft.get_peft_model_state_dict(adapted)}
            there = {unwrapped(name) for name in load_peft_weights(str(folder), device="cpu")}
            merged = adapted.merge_and_unload().requires_grad_(True)  # peft froze all but the adapter
        except Exception as error:  # of a damaged file, or of an adapter that is no change of weights
            raise ValueError(f"{where}: the adapter cannot be merged into {base}: {first_line(error)}") from error
    for names, fault in ((used - there, "lacks"), (there - used, "has unused")):
        if names:
            raise ValueError(f"{where}: the adapter {fault} {_listed(names)} for {base}")
    return merged


def _listed(names: Iterable[str]) -> str:
    """A count of tensors and the first of their names."""
    names = sorted(names, key=_natural)
    more = ", ..." if len(names) > LISTED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:LISTED])}{more})"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's reports of many lines, which errors here sum up."""
    log = library.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)
