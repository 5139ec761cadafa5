import numpy as np
import pytest
import torch

from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.generate import filter_top_k, generate
from t2i_lm.sequence import Layout
from t2i_lm.vocab import JointVocab
from tests.models.test_open_lm import tiny


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


def test_a_pictures_ids_do_not_depend_on_its_batch() -> None:
    decoder, vocab, prompts = setup("rotary")
    together = generate(decoder, vocab, prompts, 6, seeds=[10, 11, 12, 13])
    for index, prompt in enumerate(prompts):
        alone = generate(decoder, vocab, [prompt], 6, seeds=[10 + index])
        assert torch.equal(alone[0], together[index])


def test_draws_follow_the_models_distribution() -> None:
    decoder, vocab, prompts = setup("rotary")
    draws = 3000
    codes = generate(decoder, vocab, [prompts[0]] * draws, 1, seeds=list(range(draws)))[:, 0]
    expected = decoder(prompts[0][None])[0, -1, vocab.image_offset :].softmax(-1)
    share = torch.bincount(codes, minlength=16) / draws
    assert (share - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_ids_stay_in_the_image_range_and_top_k_narrows_them() -> None:
    decoder, vocab, prompts = setup("rotary")
    codes = generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4], temperature=50.0)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 16
    greedy = generate(decoder, vocab, prompts, 6)
    assert torch.equal(generate(decoder, vocab, prompts, 6, seeds=[1, 2, 3, 4], top_k=1), greedy)
    assert torch.isinf(filter_top_k(torch.tensor([[3.0, 1.0, 2.0]]), 2)).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("change", "message"), [({"temperature": 0}, "temperature"), ({"top_k": 0}, "top_k"), ({"seeds": [1]}, "seeds")]
)
def test_senseless_settings_are_refused(change: dict[str, object], message: str) -> None:
    decoder, vocab, prompts = setup("rotary")
    with pytest.raises(ValueError, match=message):
        generate(decoder, vocab, prompts, 6, **change)  # type: ignore[arg-type]
