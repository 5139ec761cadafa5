import pytest
import torch

from t2i_lm.models.expand import expand_vocabulary
from tests.models.test_open_lm import tiny


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_old_rows_are_untouched_and_logits_of_text_unchanged() -> None:
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
    assert not torch.equal(other.output.image, first.output.image)  # type: ignore[arg-type]


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
