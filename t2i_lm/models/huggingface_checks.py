"""Admission of a `transformers` model: its own logits, with and without its cache, are those that training will use.

Shapes: `B` sequences, `T` tokens, `V` vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from t2i_lm.storage.reading import UNPICKLED

# Of the largest logit: allowance for reordered float32 sums, and for a recurrence computed step by step.
TOLERANCE = 1e-4
CACHE_TOLERANCE = 1e-3
# Tokens read at once, then one by one with the cache; the last of those read at once differs between two sequences.
READ, STEPS = 8, 2
# Sequences are drawn again if logits differ: a mixture of experts can be at a tie, which rounding breaks.
DRAWS = 3
# A gain at which any cap on logits shows.
GAIN = 1e4
Expected = list[tuple[Tensor, Tensor]]


def first_line(error: BaseException) -> str:
    """An exception of a library in one line."""
    if "weights_only" in str(error):
        return UNPICKLED
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:160]}" if lines else type(error).__name__


def own_logits(causal_lm: Any) -> Expected:
    """`DRAWS` times ids (3, T) and the model's own logits (3, T, V), in evaluation mode.

    The second sequence is the first but for one token; no special ids occur.

    Raises:
        ValueError: if the model cannot compute logits, if these change its weights, or if later tokens change those of
            earlier ones.
    """
    name, config = type(causal_lm).__name__, causal_lm.config
    rows = causal_lm.get_input_embeddings().weight
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id") and isinstance(value, int)}
    ids_V = torch.tensor([token for token in range(min(len(rows), 10_000)) if token not in special] or [0])
    causal_lm.eval()
    versions = [tensor._version for tensor in causal_lm.parameters()]
    expected = []
    for draw in range(DRAWS):
        order = torch.Generator().manual_seed(draw)
        ids_BT = ids_V[torch.randint(len(ids_V), (3, READ + STEPS), generator=order)]
        ids_BT[1] = ids_BT[0]
        ids_BT[1, READ - 1] = ids_V[(int((ids_V == ids_BT[0, READ - 1]).nonzero()[0]) + 1) % len(ids_V)]
        ids_BT = ids_BT.to(rows.device)
        try:
            with torch.no_grad():
                logits_BTV = causal_lm(ids_BT).logits.float()
        except Exception as error:  # whatever a model class raises
            raise ValueError(f"backbone: {name} cannot compute logits: {first_line(error)}") from error
        if logits_BTV.shape != (*ids_BT.shape, len(rows)):
            raise ValueError(
                f"backbone: {name} computes logits {tuple(logits_BTV.shape)} of ids {tuple(ids_BT.shape)}, which is "
                "not supported"
            )
        expected.append((ids_BT, logits_BTV))
    if versions != [tensor._version for tensor in causal_lm.parameters()]:  # as RWKV, which halves them in evaluation
        raise ValueError(f"backbone: {name} changes its weights when it computes logits, which is not supported")
    if all(_differ(logits[0, : READ - 1], logits[1, : READ - 1]) > TOLERANCE for _, logits in expected):
        raise ValueError(
            f"backbone: {name} computes other logits where a later token differs, so it is no causal language model "
            "(an encoder may have is_decoder in its config)"
        )
    return expected


@torch.no_grad()
def require_own_logits(decoder: Any, name: str, expected: Expected) -> None:
    """Compares a decoder with `own_logits`: read at once, and read with the cache and continued by `STEPS` tokens.

    Raises:
        ValueError: naming the model's class and what differs.
    """
    decoder.eval()
    ids_BT = expected[0][0]
    try:
        hidden_BTD = decoder.hidden(ids_BT)
        decoder._hidden(decoder.tok_embeddings(ids_BT) + 1, None)  # as new rows, which equal none of the model's own
        decoder._head.gain = GAIN
        capped = _differ(decoder.hidden(ids_BT), GAIN * hidden_BTD) > TOLERANCE
    except Exception as error:
        raise ValueError(f"backbone: {name} cannot start from embeddings: {first_line(error)}") from error
    finally:
        decoder._head.gain = 1.0
    if capped:
        keys = [key for key, value in decoder.hf_config.to_dict().items() if "logit" in key and "cap" in key and value]
        named = next((f" ({key} in its config)" for key in sorted(keys, key=lambda key: "final" not in key)), "")
        raise ValueError(f"backbone: {name} caps or shifts its logits{named}, which is not supported")
    _require(decoder, name, "outside its output rows", False, expected)
    _require_cache(decoder, name, expected)


def unused_parameters(decoder: Any, expected: Expected) -> dict[str, nn.Parameter]:
    """Parameters that logits do not depend on, by name; never those of single experts, which other ids may reach."""
    decoder.eval()
    with torch.enable_grad():
        nodes = [decoder(expected[0][0]).sum().grad_fn]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        used.add(id(getattr(node, "variable", None)))
        following = [after for after, _ in node.next_functions if after is not None and after not in seen]
        seen.update(following)
        nodes += following
    return {
        name: parameter
        for name, parameter in decoder.named_parameters()
        if id(parameter) not in used and sum(part.isdigit() for part in name.split(".")) < 2
    }


def _require_cache(decoder: Any, name: str, expected: Expected) -> None:
    """Chooses how positions are numbered after a cache: by the model, else as its `generate` does, else after a pad."""
    pad = getattr(decoder.hf_config, "pad_token_id", None)
    faults = []
    for first in (None, 0, (pad or 0) + 1) if decoder.takes("position_ids") else (None,):
        decoder.first_position = first
        try:
            return _require(decoder, name, "with its cache", True, expected)
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def _require(decoder: Any, name: str, where: str, cached: bool, expected: Expected) -> None:
    tolerance = CACHE_TOLERANCE if cached else TOLERANCE
    for ids_BT, logits_BTV in expected:
        try:
            own_BTV = _with_cache(decoder, ids_BT) if cached else decoder(ids_BT)
        except Exception as error:
            raise ValueError(f"backbone: {name} fails {where}: {first_line(error)}") from error
        differ = _differ(own_BTV, logits_BTV)
        if differ <= tolerance:
            return
    raise ValueError(
        f"backbone: {name} computes other logits {where} (they differ by {differ:.1e} of the largest), which is not "
        "supported"
    )


def _with_cache(decoder: Any, ids_BT: Tensor) -> Tensor:
    cache = decoder.new_cache(len(ids_BT), READ + STEPS)
    parts = [decoder.hidden(ids_BT[:, :READ], cache)]
    parts += [decoder.next_hidden(ids_BT[:, READ + step], cache)[:, None] for step in range(STEPS)]
    return decoder.output(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


def _differ(one: Tensor, other: Tensor) -> float:
    """Largest difference, of the largest value of `other`; infinite where a value is not a number."""
    difference = float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(difference) else difference
