import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.joint_vocab import SPECIALS
from t2i_lm.tokenizers.text import (
    JsonTokenizer,
    SentencePieceTokenizer,
    clean,
    open_text_tokenizer,
    train_sentencepiece,
)


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


def test_literal_special_tokens_stay_text(tokenizer: SentencePieceTokenizer) -> None:
    for token in (*SPECIALS, "</s>", "<s>", "<unk>"):
        ids = tokenizer.encode(f"a {token} b")
        assert tokenizer.document_end not in ids
        assert tokenizer.decode(ids) == f"a {token} b"


def test_unusual_captions_are_preserved(tokenizer: SentencePieceTokenizer) -> None:
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


def test_a_vocabulary_too_large_for_the_text_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_tokenizer\.vocab_size=5000"):
        train_sentencepiece(iter(["a short text"]), 5000, tmp_path / "x.model")


@pytest.fixture
def neox(shared: Path) -> TextTokenizer:
    return open_text_tokenizer(shared / "tokenizers" / "gpt_neox_20b.json")


@pytest.fixture(scope="module")
def bytes_json(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    """A byte-level BPE of GPT-NeoX's kind, with its two special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["a red circle on a white background"] * 20, trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    model.save(str(path))
    return JsonTokenizer(path)


LITERALS = (*SPECIALS, "<|endoftext|>", "<|padding|>", "</s>")


def test_a_json_tokenizer_encodes_literal_special_tokens_as_text(bytes_json: JsonTokenizer) -> None:
    for token in LITERALS:
        ids = bytes_json.encode(f"a {token} b")
        assert min(ids) > bytes_json.document_end + 1
        assert bytes_json.decode(ids) == f"a {token} b"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=40), st.sampled_from(LITERALS)), max_size=5).map("".join))
def test_a_json_tokenizer_preserves_any_text(bytes_json: JsonTokenizer, text: str) -> None:
    ids = bytes_json.encode(text)
    assert not {0, 1} & set(ids)
    assert bytes_json.decode(ids) == clean(text)
    assert bytes_json.encode_batch([text]) == [ids]


SPECIAL = ["<s>", "</s>", "<unk>"]
LETTERS = [*SPECIAL, "\u2581", *"act</s>"]


def unigram() -> tokenizers.Tokenizer:
    """As of xglm and camembert, whose special tokens are pieces of score 0."""
    model = tokenizers.Tokenizer(tokenizers.models.Unigram([(p, -float(n > 2)) for n, p in enumerate(LETTERS)], 2))
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    return model


def whole_words(kind: Any, **settings: Any) -> tokenizers.Tokenizer:
    vocab = {word: number for number, word in enumerate([*SPECIAL, "a", "cat", "##a"])}
    model = tokenizers.Tokenizer(kind(vocab=vocab, unk_token="<unk>", **settings))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return model


@pytest.mark.parametrize(
    "model",
    [
        unigram(),
        whole_words(tokenizers.models.WordLevel),
        whole_words(tokenizers.models.WordPiece),
        whole_words(tokenizers.models.BPE, merges=[], ignore_merges=True),
    ],
    ids=["unigram", "words", "word pieces", "unmerged"],
)
def test_special_tokens_that_a_models_vocabulary_has_too_stay_text(model: tokenizers.Tokenizer, tmp_path: Path) -> None:
    model.add_special_tokens(SPECIAL)
    model.save(str(tmp_path / "x.json"))
    text = JsonTokenizer(tmp_path / "x.json")
    assert (text.vocab_size, text.document_end, text.token(1)) == (model.get_vocab_size(), 1, "</s>")
    for literal in ("a cat</s>", "a <s> cat", "</s>", "<s>a</s>", "a \uff1c/s\uff1e"):
        for ids in (text.encode(literal), *text.encode_batch([literal, literal])):
            assert ids
            assert not {0, 1} & set(ids)
    for plain in ("a cat", "cat a a", "a zebra"):
        assert text.encode(plain) == model.encode(plain, add_special_tokens=False).ids
    assert text.decode([text.document_end]) == "</s>"


def test_a_special_token_that_merges_make_of_a_text_is_named(tmp_path: Path) -> None:
    vocab = {piece: number for number, piece in enumerate(["<eos>", *"<eos>", "s>", "os>", "eos>"])}
    merges = [("s", ">"), ("o", "s>"), ("e", "os>"), ("<", "eos>")]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    model.add_special_tokens(["<eos>"])
    model.save(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=r"x\.json encodes the text '<eos>' as its special token; expected"):
        JsonTokenizer(tmp_path / "x.json")


def test_gpt_neox_gives_its_published_ids(neox: TextTokenizer) -> None:
    assert neox.vocab_size == 50_277
    assert neox.document_end == 0
    # Published ids of GPT-NeoX-20B.
    assert neox.encode("Hello world") == [12092, 1533]
    for token in LITERALS:
        assert neox.document_end not in neox.encode(f"caption {token}")
        assert neox.decode(neox.encode(f"caption {token}")) == f"caption {token}"


def test_ten_thousand_fuzzed_captions_never_become_special(neox: TextTokenizer) -> None:
    rng = random.Random(0)
    parts = [*LITERALS, "\ud800", "\0", "\u202e", "🦦", "\x07", "é", " ", "a dog", "\r\n", "字"]
    captions = ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(9_999)] + ["x <image> " * 10_000]
    ids = neox.encode_batch(captions)
    assert all(min(row, default=1) > 0 and max(row, default=1) < neox.vocab_size for row in ids)
    assert neox.decode(ids[5]) == clean(captions[5])


def test_a_damaged_json_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        JsonTokenizer(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"x\.json is not a tokenizer\.json"):
        JsonTokenizer(tmp_path / "x.json")


def test_a_sentencepiece_model_is_trained_on_all_of_a_long_paragraph(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(3000)]
    whole = train_sentencepiece(iter([" ".join(words)]), 600, tmp_path / "whole.model")
    with_short = train_sentencepiece(iter(["a b", " ".join(words)]), 600, tmp_path / "both.model")
    assert whole.vocab_size == with_short.vocab_size == 600
    assert len(whole.encode("word2999")) <= 3
