"""Whether a text tokenizer is the one that the backbone was trained with: of another one, all ids are other words."""

import sys
from contextlib import suppress
from pathlib import Path

import torch

from t2i_lm.assets import find
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.presets import PRESETS
from t2i_lm.config.sections import is_plugin, require
from t2i_lm.models.factory import empty_backbone
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.hub import TOKENIZERS
from t2i_lm.storage.reading import reading
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import document_start
from t2i_lm.tokenizers.text import open_text_tokenizer

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
        ValueError: if it has not, or none for the beginning or the end of a document, or if the tokenizer beside its
            weights encodes text otherwise.
    """
    if text.vocab_size > rows:
        _require_rows(text, rows)
    beside = _beside(backbone)
    if beside and not any(_is_equal(text, file) for file in beside):
        raise ValueError(
            f"text_tokenizer.path: encodes text otherwise than {beside[0]}, which lies beside the weights of "
            f"backbone.path: to the backbone its ids would be other words; set text_tokenizer.path={beside[0]}"
        )


def require_tokenizer(config: ExperimentConfig, text: TextTokenizer | None, rows: int) -> None:
    """Checks the text tokenizer of an experiment against the rows of its backbone.

    Args:
        config: the experiment.
        text: its text tokenizer; None where one of `text_tokenizer.vocab_size` is trained.
        rows: of the backbone.

    Raises:
        ValueError: as `require_own_tokenizer`, or if the one to train has more pieces than the backbone rows.
    """
    size, reads_weights = config.text_tokenizer.vocab_size, config.init != "random" or config.reads_rows
    if text is None:
        allowed = f"at most {rows}, the rows of the backbone"
        require(size <= rows, "text_tokenizer.vocab_size", size, allowed)
    else:
        require_own_tokenizer(text, rows, config.backbone.path if reads_weights else None)


def require_tokenizer_at_hand(config: ExperimentConfig, text: TextTokenizer | None) -> None:
    """`require_tokenizer` without the backbone's weights, where the files that state its rows are on this machine.

    Raises:
        ValueError: as it does, or if the backbone's architecture cannot be read.
    """
    key = "backbone.path" if config.backbone.config is None else "backbone.config"
    path = config.value(key)
    if path is None or not (path in PRESETS or is_plugin(path) or find(path)):
        return
    with reading(key, path), torch.device("meta"):
        rows = empty_backbone(config).config.vocab_size
    require_tokenizer(config, text, rows)


def _require_rows(text: TextTokenizer, rows: int) -> None:
    encoded = max(getattr(text, "encoded_size", text.vocab_size), text.document_end + 1)
    if encoded > rows:
        raise ValueError(
            f"text_tokenizer.path has {text.vocab_size} pieces but the backbone {rows} rows: this is not the tokenizer "
            "that the backbone was trained with"
        )
    start = document_start(text)
    if start is not None and start >= rows:
        raise ValueError(
            f"text_tokenizer.document_start: id {start} has no row in the backbone, which has {rows} rows: expected a "
            "token with a row, or none"
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
    return [] if folder is None else [folder / name for name in TOKENIZERS if (folder / name).is_file()]


def _is_equal(text: TextTokenizer, file: Path) -> bool:
    """Whether most ids of a tokenizer's file are those of `text`; assumed of a file that cannot be read."""
    if file_sha256(file) == text.sha256:
        return True
    with suppress(ValueError):
        own, ids = set(open_text_tokenizer(file).encode(SAMPLE)), set(text.encode(SAMPLE))
        return 2 * len(own & ids) > len(own)
    return True
