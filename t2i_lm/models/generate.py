"""Sampling with batched prefill and a static key-value cache, restricted to image ids.

Shapes: `B` images, `X` rows of one pass (2 B with guidance in one cache), `T` prompt positions,
`N` image tokens, `D` width, `V` image codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i_lm.models.backbone import Backbone
from t2i_lm.tokenizers.joint_vocab import JointVocab

# Single rows take another kernel (below float32) or another graph (compiled), so a batch has at least two.
MIN_ROWS = 2
# Called after each token with (tokens generated, tokens in all, codes so far (B, N), -1 for those still missing).
Progress = Callable[[int, int, Tensor], None]


class NotFiniteError(ValueError, FloatingPointError):
    """Logits from which nothing can be sampled."""

    def __init__(self, temperature: float) -> None:
        super().__init__(
            f"logits are NaN or infinite: the model has diverged, or temperature={temperature:g} is too small or the "
            "guidance too large for it"
        )


@dataclass(frozen=True)
class Sampling:
    """Sampling of the next code from logits: guidance, then temperature, then top-k, then top-p.

    Attributes:
        temperature: divides the logits.
        top_k: number of most likely codes to sample from; None for all.
        top_p: total probability of the most likely codes to sample from; None for all.
        guidance: scale s of classifier-free guidance, null + s (caption - null) on logits; 1 for none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected a positive value")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a value in (0, 1]")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance={self.guidance}: expected 0 or more")


def filter_top_k(logits_BV: Tensor, top_k: int | None) -> Tensor:
    """Sets all but each row's k largest logits to minus infinity."""
    if top_k is None or top_k >= logits_BV.shape[-1]:
        return logits_BV
    smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def filter_top_p(logits_BV: Tensor, top_p: float | None) -> Tensor:
    """Sets all but each row's most likely codes, up to a total probability of `top_p`, to minus infinity.

    The most likely code always stays.
    """
    if top_p is None or top_p == 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    share_BV = sorted_BV.softmax(dim=-1)
    before_BV = share_BV.cumsum(dim=-1) - share_BV
    dropped_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= top_p)
    return logits_BV.masked_fill(dropped_BV, float("-inf"))


def sample_ids(logits_BV: Tensor, uniform_B: Tensor | None) -> Tensor:
    """One id per row: the inverse cumulative distribution at a uniform number; greedy without."""
    if uniform_B is None:
        return logits_BV.argmax(dim=-1)
    share_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    reached_BV = share_BV > uniform_B[:, None] * share_BV[:, -1:]
    return reached_BV.int().argmax(dim=-1)  # the first True


def can_sample(logits_BV: Tensor) -> Tensor:
    """Whether ids can be sampled from each row (B,): its largest logit is finite, and none is NaN."""
    return logits_BV.amax(dim=-1).isfinite()


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers (B, count) float64 in [0, 1), each row a function of its seed alone."""
    rows = [
        torch.rand(count, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def prefill(decoder: Backbone, prompts: Sequence[Tensor], cache: Any, end: int | None = None) -> Tensor:
    """Fills an empty cache with the prompts and returns their last hidden states (B, D).

    Prompts of equal length are computed together. In the cache all prompts end before column `end` (default: the
    length of the longest); without `end`, prompts of one common length are computed straight into the cache.
    """
    device = decoder.output.text.device
    lengths = [len(prompt) for prompt in prompts]
    if end is None and len(set(lengths)) == 1:
        return decoder.hidden(torch.stack(list(prompts)).to(device), cache)[:, -1]
    last_BD: Tensor | None = None
    for length in sorted(set(lengths)):
        members = [index for index, other in enumerate(lengths) if other == length]
        part = decoder.new_cache(len(members), length)
        part_BD = decoder.hidden(torch.stack([prompts[index] for index in members]).to(device), part)[:, -1]
        rows_R = torch.tensor(members, device=device)
        cache.place(rows_R, part, end or max(lengths))
        if last_BD is None:
            last_BD = part_BD.new_empty(len(prompts), part_BD.shape[1])
        last_BD[rows_R] = part_BD
    assert last_BD is not None
    return last_BD


@torch.no_grad()
def generate(
    decoder: Backbone,
    vocab: JointVocab,
    prompts: Sequence[Tensor],
    image_tokens: int,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    null_prompt: Tensor | None = None,
    on_token: Progress | None = None,
    at_once: int | None = None,
    prompt_end: int | None = None,
) -> Tensor:
    """Generates images of `image_tokens` ids each, restricted to the image codes.

    With `prompt_end` an image's ids depend on its prompt and seed alone, not on the batch, wherever matmuls round each
    row alike at any batch size. On CPUs bfloat16 does. Float32, GPUs and compiled code may differ in the last bits,
    which can swap two nearly equally likely ids, and float8 layers scale a whole batch by its largest value. Without
    `prompt_end`, columns shift with a batch's longest prompt, which in bfloat16 changes most images.

    Args:
        decoder: an expanded decoder.
        vocab: its id ranges.
        prompts: B one-dimensional joint-id tensors that end in `<image>`.
        image_tokens: ids to generate per image.
        seeds: one seed per image; None decodes greedily.
        sampling: settings; by default the model's own distribution.
        null_prompt: the prompt of an empty caption, required for guidance.
        on_token: progress.
        at_once: images per batch, which the cache must hold; None for all.
        prompt_end: cache column before which every prompt ends, at least the length of the longest prompt, the null
            prompt of guidance included; None for the longest of each batch. Without a ragged cache every batch has
            prompts of one length anyway.

    Returns:
        Image codes (B, N) int64 in [0, vocab.image_size), row-major, on the CPU.

    Raises:
        ValueError: if seeds and prompts differ in number, guidance has no null prompt, or a prompt is too long.
        NotFiniteError: if a batch had logits that are NaN or infinite.
    """
    sampling = sampling or Sampling()
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    if sampling.guidance != 1 and null_prompt is None:
        raise ValueError(f"guidance={sampling.guidance}: requires the prompt of an empty caption")
    guided = null_prompt is not None and sampling.guidance != 1
    longest = max(map(len, [*prompts, null_prompt] if null_prompt is not None and guided else prompts), default=0)
    if prompt_end is not None and prompt_end < longest:
        raise ValueError(f"prompt_end={prompt_end}: expected at least {longest}, the longest prompt")
    device = decoder.output.text.device
    codes_BN = torch.full((len(prompts), image_tokens), -1, device=device)
    done, batches = 0, _batches(decoder, prompts, at_once or len(prompts))
    caches: list[Any] = [None, None]  # reused by all batches
    for members in batches:
        rows_B = torch.tensor(members, device=device)  # one copy to the device instead of one per token
        uniform_BN = None if seeds is None else uniforms([seeds[index] for index in members], image_tokens).to(device)
        streams = [[prompts[index] for index in members]]
        if null_prompt is not None and guided:
            streams.append([null_prompt] * len(members))
        if decoder.ragged_cache:  # guidance doubles the rows: one pass reads the weights once
            streams = [[prompt for stream in streams for prompt in stream]]
        last = []
        for number, heads in enumerate(streams):
            end = prompt_end if decoder.ragged_cache else None
            length = (end or max(map(len, heads))) + image_tokens
            caches[number] = decoder.generation_cache(len(heads), length, caches[number])
            last.append(prefill(decoder, heads, caches[number], end))
        finite_B = torch.ones(len(members), dtype=torch.bool, device=device)  # read once, at the end
        for step in range(image_tokens):
            logits_XV = torch.cat([decoder.output(last_XD, image_rows_only=True) for last_XD in last])
            logits_BV = logits_XV
            if guided:
                own_BV, null_BV = logits_XV.chunk(2)
                logits_BV = null_BV + sampling.guidance * (own_BV - null_BV)
            logits_BV = filter_top_p(filter_top_k(logits_BV / sampling.temperature, sampling.top_k), sampling.top_p)
            finite_B &= can_sample(logits_BV)
            codes_B = sample_ids(logits_BV, None if uniform_BN is None else uniform_BN[:, step])
            codes_BN[rows_B, step] = codes_B
            if step + 1 < image_tokens:
                next_X = codes_B.repeat(2) if guided and len(streams) == 1 else codes_B
                used = caches[: len(streams)]
                last = [decoder.next_hidden(next_X, cache, image_rows_only=True) for cache in used]
            done += 1
            if on_token is not None:
                on_token(done, len(batches) * image_tokens, codes_BN)
        if not finite_B.all():
            raise NotFiniteError(sampling.temperature)
    return codes_BN.cpu()


def _batches(decoder: Backbone, prompts: Sequence[Tensor], at_once: int) -> list[list[int]]:
    """Indices of the prompts of each batch: consecutive, and of one length if the cache is not ragged.

    Below float32, and in compiled code, a single prompt is repeated up to `MIN_ROWS`.
    """
    single = decoder.output.text.dtype == torch.float32 and not decoder.generates_compiled
    least = 1 if single else MIN_ROWS
    batches: dict[tuple[int, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        length = 0 if decoder.ragged_cache else len(prompt)
        batches.setdefault((index // at_once, length), []).append(index)
    return [members + members[-1:] * (least - len(members)) for members in batches.values()]


@torch.no_grad()
def continue_text(
    decoder: Backbone,
    prompt: Tensor,
    tokens: int,
    stop: int,
    seed: int | None = None,
    temperature: float = 1.0,
    all_rows: bool = False,
) -> Tensor:
    """Continues a text up to `tokens` ids or the `stop` id.

    Args:
        decoder: expanded or not.
        prompt: one-dimensional text ids, at least one, on any device.
        tokens: maximum number of new ids.
        stop: id that ends the text, not returned.
        seed: of the samples; None decodes greedily.
        temperature: divides the logits.
        all_rows: whether image and special ids may be sampled too.

    Returns:
        The new ids, one-dimensional int64 on the CPU; joint ids if `all_rows`.

    Raises:
        NotFiniteError: if logits are NaN or infinite.
    """
    cache = decoder.new_cache(1, len(prompt) + tokens)
    text_size = None if all_rows else decoder.config.vocab_size
    device = decoder.output.text.device
    uniform_1N = None if seed is None else uniforms([seed], tokens).to(device)
    last_BD, added = decoder.hidden(prompt[None].to(device), cache)[:, -1], []
    finite_1 = torch.ones(1, dtype=torch.bool, device=device)
    for step in range(tokens):
        logits_BV = decoder.output(last_BD)[:, :text_size] / temperature
        finite_1 &= can_sample(logits_BV)
        chosen_B = sample_ids(logits_BV, None if uniform_1N is None else uniform_1N[:, step])
        if int(chosen_B) == stop:
            break
        added.append(int(chosen_B))
        if step + 1 < tokens:
            last_BD = decoder.next_hidden(chosen_B, cache)
    if not finite_1.all():
        raise NotFiniteError(temperature)
    return torch.tensor(added, dtype=torch.int64)
