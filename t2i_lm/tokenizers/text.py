"""Text tokenizers: sentencepiece models (loading and training) and `tokenizers` JSON (GPT-NeoX, Section 2.1)."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers

from t2i_lm.assets import resolve
from t2i_lm.config.sections import is_plugin
from t2i_lm.runtime.plugins import TEXT_TOKENIZER, find_plugin, interface
from t2i_lm.storage.reading import reading
from t2i_lm.storage.resumable import write_atomic
from t2i_lm.tokenizers.base import TextTokenizer

# Length to which a text is cut, in characters.
MAX_CHARACTERS = 100_000


class SentencePieceTokenizer:
    """A sentencepiece model, which encodes any text into ordinary pieces, never special tokens.

    Attributes:
        vocab_size: number of pieces.
        sha256: of the model file.
        document_end: id of `</s>`, which separates documents in text-only training.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads a `.model` file.

        Raises:
            ValueError: if the file is missing or is not a sentencepiece model.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"text_tokenizer.path: no sentencepiece model at {self.path}")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        if not content:  # the library would take this for no model, and encode nothing
            raise ValueError(f"text_tokenizer.path: {self.path} is not a sentencepiece model: it is empty")
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
        """Piece ids of a text."""
        return list(self._pieces.encode(clean(text)))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of piece ids."""
        return str(self._pieces.decode(list(ids)))


class JsonTokenizer:
    """A `tokenizer.json` of Hugging Face's `tokenizers`: GPT-NeoX-20B's is open_lm-1b's.

    Special tokens that occur literally in a text, such as `<|endoftext|>`, are encoded as ordinary text.

    Attributes:
        vocab_size: ids, added tokens included (50,277 for GPT-NeoX-20B, whose backbones have padding rows beyond).
        sha256: of the file.
        document_end: id that separates documents in text-only training.
    """

    # Names of the end of a document in models of this format.
    DOCUMENT_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

    def __init__(self, path: str | Path) -> None:
        """Reads a `tokenizer.json`.

        Raises:
            ValueError: if the file is missing or is not a `tokenizer.json`.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"text_tokenizer.path: no tokenizer at {self.path}")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"text_tokenizer.path: {self.path} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def document_end(self) -> int:
        ends = (self._tokenizer.token_to_id(token) for token in self.DOCUMENT_ENDS)
        found = next((end for end in ends if end is not None), None)
        if found is None:
            raise ValueError(f"{self.path} has no end-of-document token: expected {', '.join(self.DOCUMENT_ENDS)}")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(self._tokenizer.encode(clean(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        batch = self._tokenizer.encode_batch([clean(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def clean(text: str) -> str:
    """The first `MAX_CHARACTERS` characters as valid UTF-8: a lone surrogate becomes `?`, a NUL a space."""
    return text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


@dataclass(frozen=True)
class TextFormat:
    """A file of a text tokenizer: whether a path is of this format, and its reader."""

    name: str
    recognizes: Callable[[Path], bool]
    open: Callable[[Path], TextTokenizer]


# Tried in order.
FORMATS = (
    TextFormat("tokenizers", lambda path: path.suffix == ".json", JsonTokenizer),
    TextFormat("sentencepiece", lambda path: True, SentencePieceTokenizer),
)


def open_text_tokenizer(path: str | Path) -> TextTokenizer:
    """The text tokenizer at a path (`.json` of `tokenizers`, else a sentencepiece model), or of a plug-in.

    Raises:
        ValueError: if there is none, it cannot be read, or a plug-in cannot be used.
    """
    if is_plugin(str(path)):
        plugin = find_plugin(TEXT_TOKENIZER, str(path), [known.name for known in FORMATS])
        with reading(plugin.where, plugin.argument or plugin.origin):
            text: TextTokenizer = plugin.function(plugin.argument)
        plugin.require(text, interface(TextTokenizer))
        return text
    file = resolve(str(path))
    with reading("text_tokenizer.path", file):
        return next(known for known in FORMATS if known.recognizes(file)).open(file)


def train_sentencepiece(sentences: Iterator[str], vocab_size: int, path: Path) -> SentencePieceTokenizer:
    """Trains a BPE model with byte fallback and writes it to `path`; deterministic given the sentences.

    Raises:
        ValueError: if the text is too short for `vocab_size` pieces.
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
    write_atomic(path, model.getvalue())
    return SentencePieceTokenizer(path)
