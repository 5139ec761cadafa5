import math
from typing import Any

import numpy as np
import pytest
import torch

from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.generate import (
    NotFiniteError,
    Sampling,
    continue_text,
    filter_top_k,
    filter_top_p,
    generate,
    sample_ids,
    uniforms,
)
from t2i_lm.runtime.devices import missing_to_compile
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout
from tests.decoders import tiny_decoder as tiny


def setup(positional: str) -> tuple[Decoder, JointVocab, list[torch.Tensor]]:
    decoder = tiny(positional, seq_len=32)
    vocab = expand_vocabulary(decoder, 16, torch.Generator().manual_seed(0))
    layout = Layout(vocab, 6, 20)
    prompts = [torch.from_numpy(layout.prompt(np.arange(n))) for n in (3, 5, 3, 8)]
    return decoder, vocab, prompts


@pytest.mark.parametrize("positional", ["rotary", "head_rotary"])
def test_greedy_ids_equal_full_recomputation(positional: str) -> None:
    decoder, vocab, prompts = setup(positional)
    codes_BN = generate(decoder, vocab, prompts, 6)
    for prompt, codes_N in zip(prompts, codes_BN, strict=True):
        ids = prompt
        for code in codes_N:
            logits = decoder(ids[None])[0, -1, vocab.image_offset :]
            assert int(logits.argmax()) == int(code)
            ids = torch.cat([ids, code[None] + vocab.image_offset])


@pytest.mark.parametrize(("positional", "guidance"), [("rotary", 1.0), ("rotary", 2.0), ("head_rotary", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_images_ids_do_not_depend_on_its_batch(dtype: torch.dtype, positional: str, guidance: float) -> None:
    """At the demo's width, where single-row bfloat16 matmuls round differently."""
    decoder = tiny(positional, seq_len=64, hidden_dim=256, n_heads=4)
    layout = Layout(expand_vocabulary(decoder, 512, torch.Generator().manual_seed(0)), 20, 60)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(dtype)
    prompts = [torch.from_numpy(layout.prompt(np.arange(n))) for n in (3, 20, 3, 8, 34, 11, 27, 8)]
    how: dict[str, Any] = {
        "sampling": Sampling(guidance=guidance),
        "null_prompt": torch.from_numpy(layout.prompt(np.empty(0, np.int64))),
        "prompt_end": layout.prompt_budget,
    }
    seeds = list(range(8))
    together = generate(decoder, layout.vocab, prompts, 20, seeds, **how)
    for at_once in (1, 3):
        assert torch.equal(generate(decoder, layout.vocab, prompts, 20, seeds, at_once=at_once, **how), together)
    backwards = generate(decoder, layout.vocab, prompts[::-1], 20, seeds[::-1], at_once=3, **how)
    assert torch.equal(backwards.flip(0), together)


def test_a_common_prompt_end_gives_the_ids_of_full_recomputation() -> None:
    decoder, vocab, prompts = setup("rotary")
    expected = generate(decoder, vocab, prompts, 6)
    assert torch.equal(generate(decoder, vocab, prompts, 6, prompt_end=14), expected)
    with pytest.raises(ValueError, match="prompt_end=11: expected at least 12"):
        generate(decoder, vocab, prompts, 6, prompt_end=11)


def test_samples_follow_the_models_distribution() -> None:
    decoder, vocab, prompts = setup("rotary")
    samples = 3000
    codes = generate(decoder, vocab, [prompts[0]] * samples, 1, seeds=list(range(samples)))[:, 0]
    expected = decoder(prompts[0][None])[0, -1, vocab.image_offset :].softmax(-1)
    share = torch.bincount(codes, minlength=16) / samples
    assert (share - expected).abs().max() < 4 * (0.25 / samples) ** 0.5


def test_ids_stay_in_the_image_range_and_top_k_narrows_them() -> None:
    decoder, vocab, prompts = setup("rotary")
    codes = generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4], sampling=Sampling(temperature=50.0))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 16
    greedy = generate(decoder, vocab, prompts, 6)
    for narrow in (Sampling(top_k=1), Sampling(top_p=1e-6)):
        assert torch.equal(generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4], sampling=narrow), greedy)
    assert torch.isinf(filter_top_k(torch.tensor([[3.0, 1.0, 2.0]]), 2)).tolist() == [[False, True, False]]


def test_top_p_keeps_the_fewest_codes_that_reach_it() -> None:
    logits_BV = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.7, 0.1]]).log()
    kept = ~filter_top_p(logits_BV, 0.6).isinf()
    assert kept.tolist() == [[True, False, True], [False, True, False]]


def test_guidance_extrapolates_the_logits_from_the_empty_caption() -> None:
    """Greedy codes under guidance equal a full recomputation of both streams."""
    decoder, vocab, prompts = setup("rotary")
    null = torch.from_numpy(Layout(vocab, 6, 20).prompt(np.empty(0, np.int64)))
    codes_BN = generate(decoder, vocab, prompts, 6, sampling=Sampling(guidance=3.0), null_prompt=null)
    assert not torch.equal(codes_BN, generate(decoder, vocab, prompts, 6))
    for prompt, codes_N in zip(prompts, codes_BN, strict=True):
        for step, code in enumerate(codes_N):
            earlier = codes_N[:step] + vocab.image_offset
            own, empty = (
                decoder(torch.cat([head, earlier])[None])[0, -1, vocab.image_offset :] for head in (prompt, null)
            )
            assert int((empty + 3.0 * (own - empty)).argmax()) == int(code)
    none = generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4], sampling=Sampling(guidance=1.0), null_prompt=null)
    assert torch.equal(none, generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("tokens", "at_once", "expected"),
    [
        pytest.param(6, None, [(step, 6, 4 * step) for step in range(1, 7)], id="one batch"),
        pytest.param(2, 3, [(1, 4, 3), (2, 4, 6), (3, 4, 7), (4, 4, 8)], id="over all batches"),
    ],
)
def test_progress_reports_the_codes_generated_so_far(
    tokens: int, at_once: int | None, expected: list[tuple[int, int, int]]
) -> None:
    """(tokens generated, tokens in all, codes generated) after each token."""
    decoder, vocab, prompts = setup("rotary")
    seen: list[tuple[int, int, int]] = []
    generate(
        decoder,
        vocab,
        prompts,
        tokens,
        on_token=lambda done, total, codes: seen.append((done, total, int((codes >= 0).sum()))),
        at_once=at_once,
    )
    assert seen == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 2}, "empty caption"),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, float], message: str) -> None:
    decoder, vocab, prompts = setup("rotary")
    with pytest.raises(ValueError, match=message):
        generate(decoder, vocab, prompts, 6, sampling=Sampling(**change))
    with pytest.raises(ValueError, match="1 seeds for 4 prompts"):
        generate(decoder, vocab, prompts, 6, seeds=[1])


@pytest.mark.parametrize("seeds", [None, range(4)])
@pytest.mark.parametrize(("value", "changes"), [(math.nan, {}), (math.nan, {"top_k": 3, "top_p": 0.9}), (math.inf, {})])
def test_nothing_is_sampled_from_logits_that_are_not_finite(
    value: float, changes: dict[str, Any], seeds: range | None
) -> None:
    """They gave code 0 for every token."""
    decoder, vocab, prompts = setup("rotary")
    with torch.no_grad():
        decoder.norm.weight[3] = value
    with pytest.raises(NotFiniteError, match="logits are NaN or infinite: the model has diverged, or temperature=1 "):
        generate(decoder, vocab, prompts, 6, seeds, Sampling(**changes))
    for all_rows in (False, True):
        with pytest.raises(NotFiniteError, match="logits are NaN or infinite"):
            continue_text(decoder, torch.tensor([7, 3]), 4, -1, None if seeds is None else 5, all_rows=all_rows)


def test_a_temperature_at_which_logits_overflow_is_named() -> None:
    decoder, vocab, prompts = setup("rotary")
    generate(decoder, vocab, prompts, 6, range(4), Sampling(1e-30))
    with pytest.raises(NotFiniteError, match="temperature=1e-39 is too small"):
        generate(decoder, vocab, prompts, 6, range(4), Sampling(1e-39))


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("positional", ["rotary", "head_rotary"])
def test_a_continued_text_equals_full_recomputation(positional: str, all_rows: bool) -> None:
    """Greedily and from a seed, over the text rows or all, up to the stop id."""
    decoder, vocab, _ = setup(positional)
    text_size, tokens = decoder.config.vocab_size, 12
    with torch.no_grad():
        decoder.output.image.mul_(4)  # so that unmasked image rows win some steps, and masked ones must not
    prompt = torch.tensor([7, 3, 11, 3])

    def recomputed(uniform_N: torch.Tensor | None) -> list[int]:
        ids = prompt
        for step in range(tokens):
            logits_1V = decoder(ids[None])[:, -1, : None if all_rows else text_size] / 0.8
            ids = torch.cat([ids, sample_ids(logits_1V, None if uniform_N is None else uniform_N[step : step + 1])])
        return ids[len(prompt) :].tolist()

    for seed in (None, 5):
        expected = recomputed(None if seed is None else uniforms([seed], tokens)[0])
        found = continue_text(decoder, prompt, tokens, -1, seed, temperature=0.8, all_rows=all_rows)
        assert found.tolist() == expected
        assert any(token >= vocab.image_offset for token in expected) == all_rows
        stop = expected[4]
        found = continue_text(decoder, prompt, tokens, stop, seed, temperature=0.8, all_rows=all_rows)
        assert found.tolist() == expected[: expected.index(stop)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("seed", [None, 5])
def test_a_text_is_continued_on_a_gpu(seed: int | None) -> None:
    decoder, _, _ = setup("rotary")
    expected = continue_text(decoder, torch.tensor([7, 3]), 8, -1, seed)
    assert torch.equal(continue_text(decoder.cuda(), torch.tensor([7, 3]), 8, -1, seed), expected)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_to_compile()), reason="no C++ compiler")
@pytest.mark.parametrize(("positional", "bucket"), [("rotary", 8), ("head_rotary", None)])
def test_compiled_steps_generate_the_same_ids(positional: str, bucket: int | None) -> None:
    """For prompts of one length, and of several, whose columns are masked."""
    decoder, vocab, prompts = setup(positional)
    decoder.bucket = bucket or decoder.bucket
    equal = [prompts[0], prompts[2]]
    expected = generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4]), generate(decoder, vocab, equal, 6)
    decoder.compile_steps()
    assert torch.equal(generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4]), expected[0])
    assert torch.equal(generate(decoder, vocab, equal, 6), expected[1])


def test_more_positions_than_the_decoder_has_are_refused() -> None:
    decoder, vocab, prompts = setup("rotary")
    with pytest.raises(ValueError, match="seq_len=32"):
        generate(decoder, vocab, prompts, 30)
