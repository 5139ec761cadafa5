from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2i_lm.tokenizers.text import SentencePieceTokenizer, train_sentencepiece
from t2i_lm.vocab import SPECIALS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    sentences = [f"The {word} stood upon the {n}th hill, looking at the sea." for n in range(60) for word in "ABC"]
    return train_sentencepiece(iter(sentences), 400, tmp_path_factory.mktemp("spm") / "text.model")


def test_training_is_deterministic(tmp_path: Path) -> None:
    sentences = [f"sentence number {n} of many" for n in range(200)]
    first, second = (train_sentencepiece(iter(sentences), 340, tmp_path / name) for name in ("a", "b"))
    assert first.sha256 == second.sha256


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200))
def test_any_text_is_encoded_without_special_ids(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.document_end not in ids


def test_literal_specials_stay_text(tokenizer: SentencePieceTokenizer) -> None:
    for token in (*SPECIALS, "</s>", "<s>", "<unk>"):
        ids = tokenizer.encode(f"a {token} b")
        assert tokenizer.document_end not in ids
        assert tokenizer.decode(ids) == f"a {token} b"


def test_awkward_captions_survive(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("lone \ud800 surrogate")) == "lone ? surrogate"
    assert tokenizer.decode(tokenizer.encode("nul \0 byte")) == "nul   byte"
    assert tokenizer.decode(tokenizer.encode("emoji 🦦 and \u202ebidi")) == "emoji 🦦 and \u202ebidi"
    assert len(tokenizer.encode("x" * 200_000)) <= 100_001


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sentencepiece model"):
        SentencePieceTokenizer(tmp_path / "absent.model")
    (tmp_path / "x.model").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        SentencePieceTokenizer(tmp_path / "x.model")


def test_too_many_pieces_for_a_short_text_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_tokenizer\.vocab_size=5000"):
        train_sentencepiece(iter(["a short text"]), 5000, tmp_path / "x.model")
