"""Text tokenizers: sentencepiece models (loading and training) and `tokenizers` JSON (GPT-NeoX, Section 2.1)."""

import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from t2i_lm.assets import resolve
from t2i_lm.config.sections import is_plugin
from t2i_lm.runtime.launch import local_rank
from t2i_lm.runtime.plugins import TEXT_TOKENIZER, find_plugin, interface
from t2i_lm.storage import hub
from t2i_lm.storage.reading import reading
from t2i_lm.storage.writing import write_atomic
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.bounds import is_panic, require_bounded_charsmap, require_bounded_json
from t2i_lm.tokenizers.documents import TOKENIZER_CONFIG, Documents, chosen_documents, stated_documents, states_both
from t2i_lm.tokenizers.literal_specials import keep_specials_literal

# Length to which a text is cut, in characters.
MAX_CHARACTERS = 100_000
MAX_SENTENCE = 16_384  # bytes; a sentencepiece model is trained on no longer ones


class FileTokenizer:
    """Base of tokenizers in a file: the ends of a document, as the files of the model's folder state them.

    Attributes:
        documents: both ends, and where they are stated.
        states_end: whether the end differs from what the tokenizer's own file suggests.
    """

    path: Path
    vocab_size: int
    documents: Documents
    # Name of the tokenizer's file in a model's folder: only there, the files beside it are the model's. In an export of
    # this suite, its name begins with `text_`.
    in_folder: str
    end_names: str

    def token_id(self, token: str) -> int | None:
        """Id of a token; None for an unknown one."""
        raise NotImplementedError

    def token(self, number: int) -> str | None:
        """A token by its id; None for an unknown one."""
        raise NotImplementedError

    def put_first(self) -> int | None:
        """Id that the tokenizer's own file puts in front of a text; None where it puts none."""
        return None

    def find_documents(self, own: Documents) -> None:
        """Sets `documents`, from what the tokenizer's own file says and the files beside it."""
        self._own_end = own.end
        self.documents = own
        # Exports of earlier versions say nothing of documents, whatever lies beside them.
        exported = self.path.name == f"text_{self.in_folder}" and (self.path.parent / TOKENIZER_CONFIG).is_file()
        if exported or self.path.name == self.in_folder:
            self.documents = stated_documents(self.path.parent, self.token_id, self.vocab_size, own)

    def choose_documents(self, start: str | None, end: str | None) -> None:
        """Replaces the ends by those of config keys, where given; raises a ValueError for an unknown token."""
        self.documents = chosen_documents(self.documents, self.token_id, start, end)

    @property
    def states_end(self) -> bool:
        return self.documents.end != self._own_end

    @property
    def document_start(self) -> int | None:
        """Id in front of every document; None where a document follows the end of another one."""
        return self.documents.start

    @property
    def document_end(self) -> int:
        """Id behind every document.

        Raises:
            ValueError: if nothing names it.
        """
        if self.documents.end is None:
            raise ValueError(
                f"text_tokenizer.path: {self.path} has no end of a document ({self.end_names}): "
                "name its token by text_tokenizer.document_end"
            )
        return self.documents.end


class SentencePieceTokenizer(FileTokenizer):
    """A sentencepiece model, which encodes any text into ordinary pieces, never special tokens.

    A document ends with `</s>`; it begins with a token only where a `tokenizer_config.json` says so.

    Attributes:
        vocab_size: number of pieces.
        sha256: of the model file.
    """

    in_folder, end_names = "tokenizer.model", "</s>"

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
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
        for name in ("normalizer_spec", "denormalizer_spec"):
            require_bounded_charsmap(self.path, name, getattr(proto, name).precompiled_charsmap)
        self.vocab_size = int(self._pieces.vocab_size())
        end = int(self._pieces.eos_id())
        self.find_documents(Documents(None, end if end >= 0 else None, "sentencepiece", "sentencepiece"))

    def token_id(self, token: str) -> int | None:
        piece = int(self._pieces.piece_to_id(token))
        return piece if self._pieces.id_to_piece(piece) == token else None

    def token(self, number: int) -> str:
        return str(self._pieces.id_to_piece(number))

    def encode(self, text: str) -> list[int]:
        """Piece ids of a text."""
        return list(self._pieces.encode(clean(text)))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of piece ids."""
        return str(self._pieces.decode([int(number) for number in ids]))  # sentencepiece 0.2.0 knows no numpy


class JsonTokenizer(FileTokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`: GPT-NeoX-20B's is open_lm-1b's.

    Special tokens that occur literally in a text, such as `<|endoftext|>`, are encoded as ordinary text. A document
    begins with the token that the file's post-processor puts first, or else that of `add_bos_token` beside it.

    Attributes:
        vocab_size: ids, added tokens included (50,277 for GPT-NeoX-20B, whose backbones have padding rows beyond).
        sha256: of the file.
    """

    # Names of the end of a document in models of this format, where no file names it.
    DOCUMENT_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
    in_folder, end_names = "tokenizer.json", f"expected {', '.join(DOCUMENT_ENDS)}"

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
        except BaseException as error:  # the library raises bare Exceptions, and panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise ValueError(f"text_tokenizer.path: {self.path} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        require_bounded_json(self.path, content.decode("utf-8"), self._tokenizer.encode)
        with self._named_panics():
            keep_specials_literal(self.path, content.decode("utf-8"), self._tokenizer)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        ends = (self.token_id(token) for token in self.DOCUMENT_ENDS)
        end = next((end for end in ends if end is not None), None)
        self.find_documents(Documents(self.put_first(), end, "its post-processor", "by its name"))

    def put_first(self) -> int | None:
        """Last id that the post-processor puts in front of a text; None where it puts none."""
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        found = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return int(whole[found - 1]) if plain and found else None

    def token_id(self, token: str) -> int | None:
        number = self._tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def token(self, number: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(number)
        return token

    @property
    def encoded_size(self) -> int:
        """Size of the smallest vocabulary with all ids that encoding produces: without special tokens at the end."""
        ids = set(self._tokenizer.get_vocab(with_added_tokens=False).values())
        added = self._tokenizer.get_added_tokens_decoder()
        return 1 + max(ids | {number for number, token in added.items() if not token.special}, default=-1)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        with self._named_panics():
            return list(self._tokenizer.encode(clean(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        with self._named_panics():
            batch = self._tokenizer.encode_batch([clean(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    @contextmanager
    def _named_panics(self) -> Iterator[None]:
        """Turns a panic of the library, such as of a regular expression that backtracks for ever, into a ValueError."""
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ValueError(f"text_tokenizer.path: {self.path} cannot encode a text: {error}") from error

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
    open: Callable[[Path], SentencePieceTokenizer | JsonTokenizer]


# Tried in order.
FORMATS = (
    TextFormat("tokenizers", lambda path: path.suffix == ".json", JsonTokenizer),
    TextFormat("sentencepiece", lambda path: True, SentencePieceTokenizer),
)


def open_text_tokenizer(
    path: str | Path, document_start: str | None = None, document_end: str | None = None
) -> TextTokenizer:
    """The text tokenizer at a path (`.json` of `tokenizers`, else a sentencepiece model), or of a plug-in.

    Args:
        path: a file, `asset:NAME`, `hf://...`, or a plug-in.
        document_start: token in front of every document, or `none`; None: as the model's files say.
        document_end: token behind every document; None: as the model's files say.

    Raises:
        ValueError: if there is none, it cannot be read, a plug-in cannot be used, or it has no such token.
    """
    if is_plugin(str(path)) and (document_start or document_end):
        raise ValueError(f"text_tokenizer.document_start, document_end: expected null, {path} has its own ends")
    if is_plugin(str(path)):
        plugin = find_plugin(TEXT_TOKENIZER, str(path), [known.name for known in FORMATS])
        with reading(plugin.where, plugin.argument or plugin.origin):
            text: TextTokenizer = plugin.function(plugin.argument)
        plugin.require(text, interface(TextTokenizer))
        return text
    file = resolve(str(path), "text_tokenizer.path")
    if hub.is_hub(str(path)) and not (document_start and document_end):
        _fetch_beside(str(path), file)
    with reading("text_tokenizer.path", file):
        text = next(known for known in FORMATS if known.recognizes(file)).open(file)
    text.choose_documents(document_start, document_end)
    return text


def _fetch_beside(reference: str, file: Path) -> None:
    """Fetches the files that state the ends of a document, as far as they are read; a line says if one is unknown."""
    for other in hub.beside(reference, file):
        if states_both(file.parent):
            break
        try:
            hub.fetch_if_there(other)
        except ValueError:
            if local_rank() == 0:
                print(
                    f"note: text_tokenizer.path={reference}: {other.rpartition('/')[2]} is not in the cache and cannot "
                    "be fetched: without it, documents may begin and end otherwise than the model's. Where there is a "
                    f"network: {hub.parse(reference).command}",
                    file=sys.stderr,
                )
            break


def in_parts(text: str, characters: int, fits: Callable[[str], bool]) -> Iterator[str]:
    """A text in parts that fit, of at most `characters`, cut behind a line or a word where there is one."""
    while not fits(text):
        head = text[:characters]
        end = max(head.rfind("\n"), 0) or max(head.rfind(" "), 0) or characters
        yield text[:end]
        text = text[end:]
    yield text


def _trainable(sentence: str) -> Iterator[str]:
    """A sentence in parts that sentencepiece trains on; a character has at most four bytes."""
    return in_parts(sentence, MAX_SENTENCE // 4, lambda part: len(part.encode()) <= MAX_SENTENCE)


def train_sentencepiece(sentences: Iterator[str], vocab_size: int, path: Path) -> SentencePieceTokenizer:
    """Trains a BPE model with byte fallback and writes it to `path`; deterministic given the sentences.

    Raises:
        ValueError: if the text is too short for `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(_trainable, sentences)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=MAX_SENTENCE,
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
