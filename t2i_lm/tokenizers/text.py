"""Text tokenizers: sentencepiece models, read and trained."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

# Longest caption or paragraph handed to a tokenizer at once, in characters.
MAX_CHARACTERS = 100_000


class SentencePieceTokenizer:
    """A sentencepiece model. Special tokens never arise from text: only ordinary pieces are produced.

    Attributes:
        vocab_size: number of pieces.
        sha256: of the model file.
        document_end: id of `</s>`, which separates documents in text-only training.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads a `.model` file.

        Raises:
            ValueError: if the file is absent or is not a sentencepiece model.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"text_tokenizer.path: no sentencepiece model at {self.path}")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(f"text_tokenizer.path: {self.path} is not a sentencepiece model") from error

    @property
    def vocab_size(self) -> int:
        return int(self._pieces.vocab_size())

    @property
    def document_end(self) -> int:
        return int(self._pieces.eos_id())

    def encode(self, text: str) -> list[int]:
        """Piece ids of a text; characters that UTF-8 cannot hold (lone surrogates) become U+FFFD."""
        clean = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
        return list(self._pieces.encode(clean))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of piece ids."""
        return str(self._pieces.decode(list(ids)))


def train_sentencepiece(sentences: Iterator[str], vocab_size: int, path: Path) -> SentencePieceTokenizer:
    """Trains a BPE model with byte fallback and writes it to `path`; deterministic for equal sentences.

    Raises:
        ValueError: if the text is too short for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=16_384,
            num_threads=1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1]
        raise ValueError(f"text_tokenizer.vocab_size={vocab_size} does not suit this text: {reason}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return SentencePieceTokenizer(path)
