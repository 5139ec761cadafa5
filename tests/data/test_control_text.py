"""Control corpora: no language, in the layout of a corpus."""

import re
from collections import Counter

import pytest

from t2i_lm.assets import resolve
from t2i_lm.config.experiment import CONTROLS as NAMES
from t2i_lm.config.load import load_experiment
from t2i_lm.data.control_text import CONTROLS, PAIRS, SYMBOLS, control_documents
from t2i_lm.tokenizers.text import open_text_tokenizer
from tests.runs import EXPERIMENTS

DOCUMENTS = ["It was the best of times,\n\nit was  the worst of times. " * 40, "One more.\n", ""]


def test_the_controls_are_those_of_the_config() -> None:
    assert tuple(CONTROLS) == NAMES


@pytest.mark.parametrize("control", NAMES)
def test_controls_keep_the_layout_and_are_a_function_of_the_documents(control: str) -> None:
    first, second = (list(control_documents(DOCUMENTS, control)) for _ in range(2))
    assert first == second
    assert first[0] != DOCUMENTS[0]
    for before, after in zip(DOCUMENTS, first, strict=True):
        assert re.findall(r"\s+", before) == re.findall(r"\s+", after)
        assert len(before.split()) == len(after.split())


def test_without_a_control_documents_are_unchanged() -> None:
    assert list(control_documents(DOCUMENTS, None)) == DOCUMENTS


def test_shuffled_words_are_those_of_their_document() -> None:
    for before, after in zip(DOCUMENTS, control_documents(DOCUMENTS, "words_shuffled"), strict=True):
        assert Counter(before.split()) == Counter(after.split())


def test_brackets_close_the_pair_that_was_opened_last() -> None:
    (text,) = control_documents(["w " * 5000], "brackets")
    opened: list[int] = []
    depths = []
    for word in text.split():
        pair, closes = divmod(SYMBOLS.index(word), 2)
        assert opened.pop() == pair if closes else not opened.append(pair)  # type: ignore[func-returns-value]
        depths.append(len(opened))
    assert 5 < max(depths) < 500
    assert depths.count(0) > 20
    assert len(set(text.split())) == 2 * PAIRS


def test_every_symbol_is_one_id_of_the_shipped_tokenizer() -> None:
    tokenizer = open_text_tokenizer(str(resolve("asset:lm_rotary/text_tokenizer.model", "path")))
    assert len(set(SYMBOLS)) == len(SYMBOLS) == 2 * PAIRS
    for word in SYMBOLS:
        assert len(tokenizer.encode(f"{word} {word}")) == 2, word


def test_a_control_requires_text_and_a_known_name() -> None:
    for words in (["data.control=digits"], ["data.control=noise"]):
        with pytest.raises(ValueError, match=r"^data\.control="):
            load_experiment(EXPERIMENTS / "t2i_pretrained.yaml", "demo", words)
