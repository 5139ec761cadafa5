"""Sampling: batched prefill, a static key-value cache, ids confined to the image range.

Shapes: `B` pictures, `T` prompt positions, `N` image tokens, `V` image codes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from t2i_lm.models.backbone import Backbone
from t2i_lm.vocab import JointVocab

# Called after each token with (tokens done, tokens in all).
Progress = Callable[[int, int], None]


def filter_top_k(logits_BV: Tensor, top_k: int | None) -> Tensor:
    """Keeps each row's k largest logits and sets the rest to minus infinity."""
    if top_k is None or top_k >= logits_BV.shape[-1]:
        return logits_BV
    smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def draw(logits_BV: Tensor, noise_BV: Tensor | None) -> Tensor:
    """One id a row: the Gumbel-max draw with the given noise, or the greedy choice without."""
    return (logits_BV if noise_BV is None else logits_BV + noise_BV).argmax(dim=-1)


def gumbel(seeds: Sequence[int], step: int, size: int) -> Tensor:
    """Gumbel noise (B, size): a function of each picture's seed and the step alone, not of the batch."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        rows.append(-torch.log(-torch.log(uniform.clamp(min=1e-300))))
    return torch.stack(rows).float()


@torch.no_grad()
def generate(
    decoder: Backbone,
    vocab: JointVocab,
    prompts: Sequence[Tensor],
    image_tokens: int,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    on_token: Progress | None = None,
) -> Tensor:
    """Draws pictures: exactly `image_tokens` ids each, confined to the image codes.

    Prompts of equal length are prefilled together; a picture's ids do not depend on its neighbours.

    Args:
        decoder: an expanded decoder.
        vocab: its id ranges.
        prompts: B one-dimensional joint-id tensors that end in `<image>`.
        image_tokens: ids to draw for each.
        seeds: one seed a picture; None decodes greedily.
        temperature: divides the logits, before `top_k`.
        top_k: number of codes kept at each step; None keeps all.
        on_token: progress.

    Returns:
        Image codes (B, N) int64 in [0, vocab.image_size), row-major.

    Raises:
        ValueError: on a temperature, top_k or number of seeds that makes no sense.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive value")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    codes_BN = torch.empty(len(prompts), image_tokens, dtype=torch.int64)
    lengths = sorted({len(prompt) for prompt in prompts})
    done, total = 0, len(lengths) * image_tokens
    for length in lengths:
        members = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        ids_BT = torch.stack([prompts[index] for index in members]).to(decoder.output.text.device)
        cache = decoder.new_cache(len(members), length + image_tokens)
        for step in range(image_tokens):
            last_BD = decoder.hidden(ids_BT, cache)[:, -1]
            logits_BV = decoder.output(last_BD)[:, vocab.image_offset :].cpu() / temperature
            noise_BV = gumbel([seeds[i] for i in members], step, vocab.image_size) if seeds is not None else None
            codes_B = draw(filter_top_k(logits_BV, top_k), noise_BV)
            codes_BN[members, step] = codes_B
            ids_BT = (codes_B + vocab.image_offset)[:, None].to(ids_BT.device)
            done += 1
            if on_token is not None:
                on_token(done, total)
    return codes_BN


@torch.no_grad()
def continue_text(
    decoder: Backbone, prompt: Tensor, tokens: int, stop: int, seed: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Continues a text over the text rows alone, up to `tokens` ids or the `stop` id.

    Args:
        decoder: expanded or not.
        prompt: one-dimensional text ids, at least one.
        tokens: ids to add at most.
        stop: id that ends the text; it is not returned.
        seed: of the draw; None decodes greedily.
        temperature: divides the logits.

    Returns:
        The added ids, one-dimensional int64.
    """
    cache = decoder.new_cache(1, len(prompt) + tokens)
    text_size = decoder.config.vocab_size
    ids_BT, added = prompt[None], []
    for step in range(tokens):
        logits_BV = decoder.output(decoder.hidden(ids_BT, cache)[:, -1])[:, :text_size] / temperature
        chosen_B = draw(logits_BV, None if seed is None else gumbel([seed], step, text_size))
        if int(chosen_B) == stop:
            break
        added.append(int(chosen_B))
        ids_BT = chosen_B[:, None]
    return torch.tensor(added, dtype=torch.int64)
