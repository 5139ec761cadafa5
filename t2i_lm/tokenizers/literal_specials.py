"""Special tokens in a text stay text: their entries in the vocabulary of a `tokenizer.json`'s model are renamed.

`encode_special_tokens` covers what is matched before the model. Unigram, WordLevel and WordPiece models find a special
token of their own vocabulary again in the text that is left to them, and so does BPE with `ignore_merges`.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

# In front of renamed entries; no text that is encoded has it (`text.clean`).
NEVER = "\0"
# Around a special token that is tried, at either end.
AROUND = ("", "a", "a ", " a")


def keep_specials_literal(path: Path, content: str, tokenizer: tokenizers.Tokenizer) -> None:
    """Replaces the model of a tokenizer, where it needs that, by one that makes no special token of a text.

    Ids of other texts stay as they are, and so do unknown words, whose token is the model's own.

    Args:
        path: for messages.
        content: of the file.
        tokenizer: changed in place; encodes special tokens as text.

    Raises:
        ValueError: naming a special token that the model makes of other entries.
    """
    parts: dict[str, Any] = json.loads(content)
    model = parts["model"]
    unknown = _unknown(model)
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and token.content != unknown
    }
    if not any(_is_found(tokenizer, token, number) for token, number in special.items()):
        return
    vocab = model["vocab"]
    if isinstance(vocab, list):  # of Unigram
        renamed: Any = [[_renamed(piece, special), score] for piece, score in vocab]
    else:
        renamed = {_renamed(piece, special): number for piece, number in vocab.items()}
    try:
        tokenizer.model = tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", "added_tokens": [], "model": {**model, "vocab": renamed}})
        ).model
    except Exception as error:  # of the library, such as for BPE whose merges make the token
        raise _refusal(path, next(iter(special))) from error
    for token, number in special.items():
        if _is_found(tokenizer, token, number):
            raise _refusal(path, token)


def _unknown(model: dict[str, Any]) -> str | None:
    """The token of unknown text, by which a model names it, or of Unigram by its place."""
    place = model.get("unk_id")
    return model.get("unk_token") if place is None else str(model["vocab"][place][0])


def _renamed(piece: str, special: dict[str, int]) -> str:
    return NEVER + piece if piece in special else piece


def _is_found(tokenizer: tokenizers.Tokenizer, token: str, number: int) -> bool:
    """Whether a text with the name of a token is encoded with its id."""
    texts = [f"{before}{token}{behind}" for before in AROUND for behind in AROUND]
    return any(number in found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False))


def _refusal(path: Path, token: str) -> ValueError:
    return ValueError(
        f"text_tokenizer.path: {path} encodes the text {token!r} as its special token; expected a tokenizer that "
        "encodes it as ordinary text"
    )
