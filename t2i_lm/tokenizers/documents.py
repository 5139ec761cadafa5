"""Where a document begins and ends for a language model: what its own files say of the ids around a training text.

Llama and Gemma were trained behind a beginning (`<bos>`), GPT-2, GPT-NeoX and open_lm behind the end of the document
before. A model reads a text well only behind what it was trained behind, so measurements and training put that there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.storage.hub import BESIDE_TOKENIZER

if TYPE_CHECKING:  # imports torch, which commands do late
    from t2i_lm.tokenizers.base import TextTokenizer

# Files beside a tokenizer that name its special tokens or their ids, in order of precedence.
TOKENIZER_CONFIG, TOKENS_MAP, *MODEL_CONFIGS = BESIDE_TOKENIZER
# Value of `text_tokenizer.document_start` for a model that stands behind the end of the document before.
NONE = "none"


@dataclass(frozen=True)
class Documents:
    """Ids at the two ends of a document.

    Attributes:
        start: id in front of a document; None where it follows the end of another one.
        end: id behind a document; None where nothing names it.
        start_from, end_from: where each is stated.
    """

    start: int | None
    end: int | None
    start_from: str
    end_from: str


def stated_documents(folder: Path, token_id: Callable[[str], int | None], size: int, known: Documents) -> Documents:
    """What the files of a model's folder state, over what is `known` of the tokenizer alone.

    Args:
        folder: that of the tokenizer.
        token_id: id of a token; None for an unknown one.
        size: ids of the tokenizer; a larger one in a file belongs to an expanded model.
        known: kept where no file says more.

    Raises:
        ValueError: naming the file that is not JSON or names an unknown token.
    """
    config = _read(folder / TOKENIZER_CONFIG)
    for name in (TOKENIZER_CONFIG, TOKENS_MAP):
        token = _token(_read(folder / name).get("eos_token"))
        if token is not None:
            known = replace(known, end=_require(token_id(token), token, folder / name, "eos_token"), end_from=name)
            break
    else:
        for name in MODEL_CONFIGS:
            value = _read(folder / name).get("eos_token_id")
            end = value[0] if isinstance(value, list) and value else value
            if isinstance(end, int) and 0 <= end < size:
                known = replace(known, end=end, end_from=name)
                break
    # As in transformers, what the post-processor puts in front stays, whatever `add_bos_token` says.
    if known.start is None and config.get("add_bos_token") is True:
        token = _token(config.get("bos_token")) or _token(_read(folder / TOKENS_MAP).get("bos_token"))
        if token is None:
            raise ValueError(f"{folder / TOKENIZER_CONFIG}: add_bos_token is true, but bos_token names no token")
        start = _require(token_id(token), token, folder / TOKENIZER_CONFIG, "bos_token")
        return replace(known, start=start, start_from=TOKENIZER_CONFIG)
    return known


def states_both(folder: Path) -> bool:
    """Whether the first of a folder's files states both ends, so that no other one is read."""
    config = _read(folder / TOKENIZER_CONFIG)
    begins = config.get("add_bos_token") is not True or _token(config.get("bos_token")) is not None
    return begins and _token(config.get("eos_token")) is not None


def chosen_documents(
    known: Documents, token_id: Callable[[str], int | None], start: str | None, end: str | None
) -> Documents:
    """The ids of the keys `text_tokenizer.document_start` and `document_end`, where given, over what is `known`.

    Raises:
        ValueError: if a key names a token that the tokenizer lacks.
    """

    def chosen(key: str, token: str) -> int:
        number = token_id(token)
        if number is None:
            raise ValueError(f"{key}={token!r}: the tokenizer has no such token")
        return number

    start_key, end_key = "text_tokenizer.document_start", "text_tokenizer.document_end"
    if start is not None:
        known = replace(known, start=None if start == NONE else chosen(start_key, start), start_from=start_key)
    if end is not None:
        known = replace(known, end=chosen(end_key, end), end_from=end_key)
    return known


def document_start(text: "TextTokenizer") -> int | None:
    """Id in front of a document; None, as for a plug-in that does not say, where it follows the end of another one."""
    start = getattr(text, "document_start", None)
    return None if start is None else int(start)


def context_id(text: "TextTokenizer") -> int:
    """The id behind which a model reads a document from its first token on."""
    start = document_start(text)
    return text.document_end if start is None else start


def document_key(text: "TextTokenizer") -> dict[str, list[int | None]]:
    """What shards of text depend on beside the tokenizer's hash; empty for documents that merely end."""
    start = document_start(text)
    if start is None and not getattr(text, "states_end", False):
        return {}
    return {"documents": [start, text.document_end]}


def leading_ids(text: "TextTokenizer", ids: list[int], limit: int) -> tuple[list[int], int]:
    """A document's ids behind what the model was trained behind, cut on the left to `limit`; and how many were cut.

    A beginning (`<bos>`) stays in front of what is left; the end of another document is cut with the rest.
    """
    start = document_start(text)
    whole = [context_id(text), *ids]
    over = max(0, len(whole) - limit)
    if start is None or not over:
        return whole[over:], over
    return [start, *whole[1 + over :]], over


def describe_documents(text: "TextTokenizer") -> str:
    """One line: the ids at both ends of a document, and where they are stated."""
    known: Documents | None = getattr(text, "documents", None)
    start, end = document_start(text), text.document_end
    begins_by, ends_by = ("plug-in", "plug-in") if known is None else (known.start_from, known.end_from)
    begins = "follow the end of another one" if start is None else f"begin with {_spelled(text, start, begins_by)}"
    return f"documents: {begins}, end with {_spelled(text, end, ends_by)}"


def _spelled(text: "TextTokenizer", token: int, origin: str) -> str:
    name = getattr(text, "token", lambda _: None)(token)
    return f"id {token} ({origin})" if name is None else f"{name} (id {token}, {origin})"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"text_tokenizer.path: {file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _token(value: Any) -> str | None:
    """The text of a token, which files hold as such or in a mapping."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _require(number: int | None, token: str, file: Path, key: str) -> int:
    if number is None:
        raise ValueError(f"text_tokenizer.path: {file} has {key}={token!r}, a token that the tokenizer lacks")
    return number
