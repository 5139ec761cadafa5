"""Cache windows that grow in buckets, as CUDA graphs require, generate the same ids."""

from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from t2i_lm.models.cache import SPARE, KVCache, Window
from t2i_lm.models.cuda_graph import StepGraphs
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.generate import Sampling, generate
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout
from tests.models.test_generate import setup

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
EQUAL, RAGGED = (0, 2), (0, 1, 2, 3)


def ways(decoder: Decoder, vocab: JointVocab, prompts: list[torch.Tensor], **how: Any) -> list[torch.Tensor]:
    """Ids generated greedily, from seeds, and with guidance."""
    null = torch.from_numpy(Layout(vocab, 6, 20).prompt(np.empty(0, np.int64)))
    guided = {"sampling": Sampling(guidance=3.0), "null_prompt": null}
    seeds = {"seeds": list(range(len(prompts)))}
    return [generate(decoder, vocab, prompts, 6, **how, **own) for own in ({}, seeds, guided)]


def recomputed(decoder: Decoder, vocab: JointVocab, prompt: torch.Tensor) -> torch.Tensor:
    """Greedy ids without a cache."""
    ids = prompt
    for _ in range(6):
        code = decoder(ids[None])[0, -1, vocab.image_offset :].argmax()
        ids = torch.cat([ids, code[None] + vocab.image_offset])
    return ids[len(prompt) :] - vocab.image_offset


@pytest.mark.parametrize("members", [EQUAL, RAGGED])
@pytest.mark.parametrize("positional", ["rotary", "head_rotary"])
def test_buckets_generate_the_ids_of_growing_windows_and_of_full_recomputation(
    positional: str, members: tuple[int, ...]
) -> None:
    decoder, vocab, every = setup(positional)
    prompts = [every[member] for member in members]
    growing = ways(decoder, vocab, prompts)
    for bucket in (4, 128):  # 6 ids cross a border of the first
        decoder.bucket = bucket
        for found, expected in zip(ways(decoder, vocab, prompts), growing, strict=True):
            assert torch.equal(found, expected)
    greedy = torch.stack([recomputed(decoder, vocab, prompt) for prompt in prompts])
    assert torch.equal(growing[0], greedy)


@pytest.mark.parametrize("bucket", [1, 4])
def test_batches_that_share_a_cache_generate_the_ids_of_a_single_batch(bucket: int) -> None:
    """Batches of equal and of ragged prompts in turn, the last one smaller."""
    decoder, vocab, every = setup("rotary")
    prompts = [every[member] for member in (0, 2, 3, 1, 2, 0, 1)]
    expected = ways(decoder, vocab, prompts)
    decoder.bucket = bucket
    for found, together in zip(ways(decoder, vocab, prompts, at_once=2), expected, strict=True):
        assert torch.equal(found, together)


def test_a_reused_cache_keeps_its_memory_but_not_its_content() -> None:
    decoder, _, every = setup("rotary")
    decoder.bucket = 4
    ids_BT = torch.stack([every[0], every[2]])

    def steps(cache: KVCache) -> torch.Tensor:
        decoder.hidden(ids_BT, cache)
        return torch.stack([decoder.next_hidden(ids_BT[:, 0], cache) for _ in range(4)])

    with torch.no_grad():
        cache = decoder.generation_cache(2, 13)
        expected = steps(cache)
        keys, windows = cache.keys[0], dict(cache._windows)
        for whole in [*cache.keys, *cache.values]:
            whole.fill_(7.0)
        assert decoder.generation_cache(2, 16, cache) is cache  # both are four buckets
        assert torch.equal(steps(cache), expected)
        assert cache.keys[0] is keys
        assert cache._windows == windows
        assert decoder.generation_cache(2, 17, cache) is cache
        assert cache.keys[0].shape[2] == 20 + SPARE
        assert not cache._windows


@pytest.mark.parametrize("members", [EQUAL, RAGGED])
def test_steps_within_a_bucket_use_the_same_tensors(members: tuple[int, ...]) -> None:
    decoder, _, every = setup("rotary")
    decoder.bucket = 8
    cache = decoder.generation_cache(len(members), 20)
    lengths = [len(every[member]) for member in members]
    if members == EQUAL:
        cache.prefilled(lengths[0])
    else:
        for row, length in enumerate(lengths):
            part = decoder.new_cache(1, length)
            part.prefilled(length)
            cache.place(torch.tensor([row]), part, max(lengths))
    filled, seen = cache.filled, set[Window]()
    while cache.filled < 20:
        window = cache.next_window()
        seen.add(window)
        columns = window.layers[0]
        assert columns.column_1 is not None
        assert columns.mask_B11T is not None
        assert int(columns.column_1) == cache.filled - 1
        done = cache.filled - filled
        assert window.position_B.tolist() == [length - 1 + done for length in lengths]
        assert (columns.mask_B11T[:, 0, 0] == 0).sum(1).tolist() == [length + done for length in lengths]
        assert columns.keys_BHTK.shape[2] == columns.mask_B11T.shape[3] == -(-cache.filled // 8) * 8
    assert len(seen) == len({column // 8 for column in range(filled, 20)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bucket", "members", "expected"), [(1, EQUAL, 2), (1, RAGGED, 1), (8, EQUAL, 1), (8, RAGGED, 1)]
)
def test_one_block_is_compiled_once_for_all_layers_lengths_and_batches(
    bucket: int, members: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted with a backend that generates no code. Without buckets, captions of one length are not masked."""
    decoder, vocab, every = setup("rotary")
    prompts = [every[member] for member in members]
    decoder.bucket = bucket
    more = [*prompts, *prompts, prompts[0]]
    eager = ways(decoder, vocab, prompts), ways(decoder, vocab, more), [generate(decoder, vocab, prompts, 9)]
    counter, compile_code = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda code, **how: compile_code(code, backend=counter, **how))
    torch.compiler.reset()
    decoder.compile_steps()
    compiled = ways(decoder, vocab, prompts), ways(decoder, vocab, more), [generate(decoder, vocab, prompts, 9)]
    for found, same in zip(compiled, eager, strict=True):
        assert all(map(torch.equal, found, same))  # also with 2 heads and 2 images: equal sizes are not tied
    assert counter.frame_count == expected


@on_cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # inductor's advice on float32 products
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("members", [EQUAL, RAGGED])
def test_graphs_generate_the_ids_of_growing_windows(
    members: tuple[int, ...], compiled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, vocab, every = setup("rotary")
    decoder.cuda()
    prompts = [every[member] for member in members] * 2
    decoder.bucket = 1
    growing = ways(decoder, vocab, prompts)
    decoder.bucket = 8
    if compiled:
        decoder.compile_steps()
    for at_once in (None, len(members)):
        for found, expected in zip(ways(decoder, vocab, prompts, at_once=at_once), growing, strict=True):
            assert torch.equal(found, expected)
    assert "without CUDA graphs" not in capsys.readouterr().err


@on_cuda
def test_a_step_that_cannot_be_captured_runs_without_a_graph(capsys: pytest.CaptureFixture[str]) -> None:
    graphs, ids_B = StepGraphs(), torch.tensor([1, 2], device="cuda")
    for _ in range(2):
        assert graphs.run("key", lambda own_B: own_B + int(own_B.sum()), ids_B).tolist() == [4, 5]
    assert capsys.readouterr().err.count("generation continues without CUDA graphs") == 1
    assert StepGraphs().run("key", lambda own_B: own_B * 2, ids_B).tolist() == [2, 4]
