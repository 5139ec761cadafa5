"""Controls of pre-training on language: text without it, in the layout of the documents of a corpus.

Each document keeps its number of words and its whitespace. A language model of the same architecture, trained on as
many tokens of a control, separates what English gives from what any sequence does.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator

# Symbols of brackets: common words, so that every tokenizer of English has an id for each.
_WORDS = """
the of and to in that it was he for is with his as on had at but be not her which you from are this or by they
were him she all one have there their when an if so no what them who will up out my would into then some me more
now time could about said than other very man
"""
SYMBOLS = _WORDS.split()
PAIRS = len(SYMBOLS) // 2
# Probability that the next symbol opens a pair: below one half, so that the expected depth stays finite.
OPENING = 0.49


def control_documents(documents: Iterable[str], control: str | None) -> Iterator[str]:
    """The documents of a control, `data.control`; without one, the documents themselves.

    The result is a function of the documents alone.

    Args:
        documents: of the corpus.
        control: a key of `CONTROLS`.
    """
    if control is None:
        yield from documents
        return
    for number, document in enumerate(documents):
        generator = random.Random(f"control/{control}/{number}")
        pieces = re.split(r"(\s+)", document)  # words at even places, whitespace between them
        places = [place for place in range(0, len(pieces), 2) if pieces[place]]
        words = CONTROLS[control]([pieces[place] for place in places], generator)
        for place, word in zip(places, words, strict=False):
            pieces[place] = word
        yield "".join(pieces)


def _shuffled(words: list[str], generator: random.Random) -> Iterable[str]:
    generator.shuffle(words)
    return words


def _brackets(words: list[str], generator: random.Random) -> Iterator[str]:
    """Nested pairs (Dyck-32): word 2k opens pair k, word 2k + 1 closes the pair that was opened last."""
    opened: list[int] = []
    while True:
        if not opened or generator.random() < OPENING:
            opened.append(generator.randrange(PAIRS))
            yield SYMBOLS[2 * opened[-1]]
        else:
            yield SYMBOLS[2 * opened.pop() + 1]


def _digits(words: list[str], generator: random.Random) -> Iterator[str]:
    """Independent uniform digits: sequences without any structure."""
    while True:
        yield str(generator.randrange(10))


# `data.control` -> the words in place of those of a document, at least as many.
CONTROLS: dict[str, Callable[[list[str], random.Random], Iterable[str]]] = {
    "words_shuffled": _shuffled,
    "brackets": _brackets,
    "digits": _digits,
}
