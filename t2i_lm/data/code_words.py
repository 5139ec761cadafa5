"""The words of an image tokenizer whose codes are words (`image_tokenizer.words`)."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.forgetting import NOVELS
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.data.sources import open_sized
from t2i_lm.data.text import read_documents
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.layout import IntArray
from t2i_lm.tokenizers.words import pieces_of

# Training images whose captions are read.
IMAGES = 2000
WORD = re.compile(r"[^\W\d_]+")


def count_words(texts: Iterable[str]) -> list[str]:
    """Words of texts in lower case, the most frequent first; equally frequent ones by the alphabet."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    return sorted(counts, key=lambda word: (-counts[word], word))


def first_captions(config: ExperimentConfig) -> Iterator[str]:
    """All captions of the first `IMAGES` training images, without unreadable ones."""
    source = open_sized(config.data, "train", config.image_tokenizer.size)
    for index in range(min(IMAGES, len(source))):
        with suppress(RejectedPairError):
            yield from source[index].captions


def caption_words(config: ExperimentConfig, text: TextTokenizer) -> list[str]:
    """Words of the first training captions, of any number of pieces, and then `frequent_words`."""
    return list(dict.fromkeys([*count_words(first_captions(config)), *frequent_words(config, text)]))


def frequent_words(config: ExperimentConfig, text: TextTokenizer) -> list[str]:
    """Words of the shipped novels that are one piece each."""
    return [word for word in count_words(read_documents(NOVELS)) if len(word) > 1 and len(pieces_of(text, word)) == 1]


# `image_tokenizer.words` -> candidates in order.
CHOICES: dict[str, Callable[[ExperimentConfig, TextTokenizer], list[str]]] = {
    "captions": caption_words,
    "frequent": frequent_words,
}


def words_in_captions(ids_RN: IntArray, captions: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    """Share of cells whose word is one of the image's caption; `chance`: of the next image's, if there are several."""
    said = [set(WORD.findall(caption.lower())) for caption in captions]
    found = {"right": 0, "chance": 0}
    for number, ids_N in enumerate(ids_RN):
        shown = [words[code] for code in ids_N]
        found["right"] += sum(word in said[number] for word in shown)
        found["chance"] += sum(word in said[(number + 1) % len(said)] for word in shown)
    if len(said) == 1:
        del found["chance"]
    return {name: count / ids_RN.size for name, count in found.items()}


def distinct_words(words: Sequence[str], text: TextTokenizer) -> list[str]:
    """The words without those of no pieces, of an unknown one, or of the pieces of an earlier word: one row each."""
    by_pieces: dict[tuple[int, ...], str] = {}
    for word in words:
        pieces = pieces_of(text, word)
        if pieces and text.decode(pieces).strip().lower() == word:
            by_pieces.setdefault(tuple(sorted(pieces)), word)
    return list(by_pieces.values())


def code_words(config: ExperimentConfig, text: TextTokenizer) -> list[str]:
    """A word for each of `image_tokenizer.model.codes`, all different, the same for equal data and tokenizers.

    Raises:
        ValueError: if there are fewer words.
    """
    settings = config.image_tokenizer
    assert settings.words is not None
    words, codes = distinct_words(CHOICES[settings.words](config, text), text), settings.model.codes
    if len(words) < codes:
        raise ValueError(
            f"image_tokenizer.model.codes={codes}: image_tokenizer.words={settings.words} gives only {len(words)} "
            f"words with text_tokenizer.path={config.text_tokenizer.path}"
        )
    return words[:codes]
