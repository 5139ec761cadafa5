"""Whether a text tokenizer is the one that the backbone was trained with: of another one, all ids are other words."""

import sys
from contextlib import suppress
from pathlib import Path

from t2i_lm.assets import find
from t2i_lm.config.sections import is_plugin
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer

# Files of the tokenizer beside a model's weights: of transformers, and of this suite's exports.
BESIDE = ("tokenizer.json", "tokenizer.model", "text_tokenizer.model")
# Two files of one tokenizer encode it into the same ids, whatever their format, but for spaces or capitals that one of
# them normalizes; the ids of another tokenizer have next to nothing in common with them.
SAMPLE = "A large red circle, left of 12 Blue squares; it wasn't seen in 1867."


def require_own_tokenizer(text: TextTokenizer, rows: int, backbone: str | None = None) -> None:
    """Checks that a backbone has a row for every id that encoding produces; notes other ids without a row.

    Args:
        text: the text tokenizer.
        rows: of the backbone.
        backbone: `backbone.path` where its weights are used, whose folder may have the tokenizer.

    Raises:
        ValueError: if it has not, or if the tokenizer beside its weights encodes text otherwise.
    """
    if text.vocab_size > rows:
        _require_rows(text, rows)
    beside = _beside(backbone)
    if beside and not any(_is_equal(text, file) for file in beside):
        raise ValueError(
            f"text_tokenizer.path: encodes text otherwise than {beside[0]}, which lies beside the weights of "
            f"backbone.path: to the backbone its ids would be other words; set text_tokenizer.path={beside[0]}"
        )


def _require_rows(text: TextTokenizer, rows: int) -> None:
    encoded = max(getattr(text, "encoded_size", text.vocab_size), text.document_end + 1)
    if encoded > rows:
        raise ValueError(
            f"text_tokenizer.path has {text.vocab_size} pieces but the backbone {rows} rows: this is not the tokenizer "
            "that the backbone was trained with"
        )
    print(
        f"note: {text.vocab_size - rows} special tokens of text_tokenizer.path have no row in the backbone; no text is "
        "encoded as one",
        file=sys.stderr,
    )


def _beside(backbone: str | None) -> list[Path]:
    if backbone is None or is_plugin(backbone):
        return []
    folder = find(backbone)
    return [] if folder is None else [folder / name for name in BESIDE if (folder / name).is_file()]


def _is_equal(text: TextTokenizer, file: Path) -> bool:
    """Whether most ids of a tokenizer's file are those of `text`; assumed of a file that cannot be read."""
    if file_sha256(file) == text.sha256:
        return True
    with suppress(ValueError):
        own, ids = set(open_text_tokenizer(file).encode(SAMPLE)), set(text.encode(SAMPLE))
        return 2 * len(own & ids) > len(own)
    return True
