import pytest
import torch

from t2i_lm.models.expand import MEAN_NOISE, ROW_RULES, ImageRowSource, expand_vocabulary
from tests.decoders import tiny_decoder as tiny


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_old_rows_and_text_logits_are_unchanged() -> None:
    decoder = tiny()
    ids_BT = torch.arange(12)[None]
    before, rows = decoder(ids_BT), decoder.output.text.clone()
    vocab = expand_vocabulary(decoder, 16, seeded())
    assert torch.equal(decoder.output.text, rows)
    after = decoder(ids_BT)
    assert after.shape[-1] == vocab.size == 50 + 7 + 16
    assert torch.equal(after[..., :50], before)


def test_new_rows_depend_on_their_generator_alone() -> None:
    first, second = tiny(), tiny()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    expand_vocabulary(first, 16, seeded(7))
    expand_vocabulary(second, 16, seeded(7))
    for name in ("special", "image"):
        for matrix in ("tok_embeddings", "output"):
            assert torch.equal(getattr(getattr(first, matrix), name), getattr(getattr(second, matrix), name))
    other = tiny()
    expand_vocabulary(other, 16, seeded(8))
    assert not torch.equal(other.output.image, first.output.image)


def test_a_tied_decoder_stays_tied() -> None:
    decoder = tiny(weight_tying=True)
    expand_vocabulary(decoder, 16, seeded())
    assert decoder.output.image is decoder.tok_embeddings.image
    assert decoder.output.text is decoder.tok_embeddings.text


def test_expanding_twice_is_refused() -> None:
    decoder = tiny()
    expand_vocabulary(decoder, 16, seeded())
    with pytest.raises(ValueError, match="already"):
        expand_vocabulary(decoder, 16, seeded())


SOURCE = ImageRowSource(
    codebook_IE=torch.randn(400, 4, generator=torch.Generator().manual_seed(3)) * 5 + 2,
    aligned_ID=torch.randn(400, 32, generator=torch.Generator().manual_seed(4)),
    pieces=[[], [3, 7], [3, 7], *([code % 50] for code in range(3, 400))],
)


def new_rows(rule: str, seed: int = 0) -> dict[str, torch.Tensor]:
    decoder = tiny()
    expand_vocabulary(decoder, 400, seeded(seed), rule, SOURCE)
    named = dict(decoder.named_parameters())
    return {
        f"{matrix}.{block}": named[f"{matrix}.{block}"].detach()
        for matrix in ("tok_embeddings", "output")
        for block in ("special", "image")
    }


@pytest.mark.parametrize("rule", ROW_RULES)
def test_a_rule_is_deterministic_and_gives_no_two_equal_rows(rule: str) -> None:
    rows, again = new_rows(rule), new_rows(rule)
    for name, value in rows.items():
        assert torch.equal(value, again[name])
        assert len(value.unique(dim=0)) == len(value), name


def test_rules_initialize_as_documented() -> None:
    random, mean, codebook, aligned = (new_rows(rule) for rule in ("random", "mean", "codebook", "aligned"))
    text = tiny().tok_embeddings.text.mean(dim=0)
    assert torch.allclose(mean["tok_embeddings.image"], text + MEAN_NOISE * random["tok_embeddings.image"], atol=1e-6)
    assert aligned["tok_embeddings.image"] is not SOURCE.aligned_ID
    assert SOURCE.aligned_ID is not None
    assert torch.equal(aligned["tok_embeddings.image"], SOURCE.aligned_ID)
    assert torch.equal(aligned["output.image"], random["output.image"])
    for rows in (codebook, aligned):
        assert torch.equal(rows["output.special"], random["output.special"])
    assert codebook["tok_embeddings.image"].std() == pytest.approx(float(random["tok_embeddings.image"].std()), rel=0.2)
    assert torch.linalg.matrix_rank(codebook["output.image"]) == 4


def test_rows_of_words_are_those_of_their_pieces_and_random_ones_without_words() -> None:
    random, words, text = new_rows("random"), new_rows("words"), tiny()
    for matrix in ("tok_embeddings", "output"):
        rows_ID, random_ID = words[f"{matrix}.image"], random[f"{matrix}.image"]
        text_VD = getattr(text, matrix).text
        assert torch.equal(rows_ID[0], random_ID[0])
        mean_2D = text_VD[[3, 7]].mean(dim=0) + MEAN_NOISE * random_ID[1:3]
        assert torch.allclose(rows_ID[1:3], mean_2D, atol=1e-6)
        assert torch.allclose(rows_ID[3], text_VD[3] + MEAN_NOISE * random_ID[3], atol=1e-6)
        assert torch.equal(words[f"{matrix}.special"], random[f"{matrix}.special"])


def test_aligned_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(400, 32\), expected \(16, 32\)"):
        expand_vocabulary(tiny(), 16, seeded(), "aligned", SOURCE)
