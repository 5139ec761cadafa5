"""Rows of token shards: tokenized captioned images and tokenized plain text.

Shapes: `B` images, `C` = 3 channels, `H`, `W` pixels, `N` image ids.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_lm.data.pairs import Pair, RejectedPairError, Sample, center_crop
from t2i_lm.data.shards.format import part_folder, read_part, text_features, write_part
from t2i_lm.data.shards.rejects import LOOK_AHEAD, Rejects
from t2i_lm.data.text import paragraphs
from t2i_lm.runtime.devices import is_out_of_memory
from t2i_lm.runtime.progress import Advance
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.documents import document_start
from t2i_lm.tokenizers.layout import IntArray
from t2i_lm.tokenizers.text import MAX_CHARACTERS, in_parts

# Images per call of the encoder, where its device has the memory.
ENCODE_BATCH = 64


class Encoder:
    """The encoder of an image tokenizer, whose batches are halved where the device lacks the memory for one.

    Attributes:
        at_once: images per batch.
    """

    def __init__(self, image: ImageTokenizer) -> None:
        self.image, self.at_once = image, ENCODE_BATCH

    def __call__(self, images: list[Any], low_precision: bool = False) -> Tensor:
        """Ids (B, N) int64, on the CPU, of arrays (H, W, 3).

        Raises:
            MemoryError: if a single image does not fit.
            ValueError: if the tokenizer makes other ids than it says.
        """
        ids, done = list[Tensor](), 0
        while done < len(images):
            batch_BCHW = stack_images(images[done : done + self.at_once])
            ids_BN = self._encode(batch_BCHW, low_precision)
            if ids_BN is None:
                self._halve(len(batch_BCHW))
            else:
                ids.append(ids_BN)
                done += len(batch_BCHW)
        return torch.cat(ids)

    def _halve(self, tried: int) -> None:
        size = f"of {self.image.image_size} pixels"
        if tried == 1:
            raise MemoryError(f"image_tokenizer.path: out of memory with a single image {size}")
        self.at_once = tried // 2
        print(
            f"note: out of memory with {tried} images {size}; {self.at_once} are encoded at a time",
            file=sys.stderr,
            flush=True,
        )

    def _encode(self, images_BCHW: Tensor, low_precision: bool) -> Tensor | None:
        """None if out of memory, of which the error's traceback would hold a part."""
        precision = {"low_precision": True} if low_precision else {}
        try:
            return self._valid(self.image.encode(images_BCHW, **precision).cpu(), len(images_BCHW))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _valid(self, ids_BN: Tensor, images: int) -> Tensor:
        height, width = self.image.grid
        expected, found = (images, height * width), tuple(ids_BN.shape)
        if found != expected or ids_BN.is_floating_point():
            raise ValueError(
                f"image_tokenizer.path: encodes {images} images as {ids_BN.dtype} of shape {found}; expected integers "
                f"of shape {expected}, its grid of {height} x {width}"
            )
        least, most = (int(end) for end in torch.aminmax(ids_BN))
        if least < 0 or most >= self.image.vocab_size:
            raise ValueError(
                f"image_tokenizer.path: encodes images as ids in [{least}, {most}]; expected ids in "
                f"[0, {self.image.vocab_size}), its vocab_size"
            )
        return ids_BN


@dataclass
class PairRows:
    """The rows of some samples, and statistics of them and of rejected samples.

    Attributes:
        judge: of the rejects of the whole split.
        low_precision: whether to encode images in bfloat16.
        rejects: number of unusable samples by reason.
        examples: message of the first one by reason.
        caption_tokens: number of captions by length in ids.
    """

    samples: Iterable[Sample]
    text: TextTokenizer
    image: ImageTokenizer
    advance: Advance
    judge: Rejects
    low_precision: bool = False
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    caption_tokens: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._ids = Encoder(self.image)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """One row per usable sample, in order; images are encoded in batches of `ENCODE_BATCH`.

        Raises:
            ValueError: as soon as the split has more rejects than it may have.
        """
        refused = False
        batch: list[tuple[Pair, np.ndarray[Any, np.dtype[np.uint8]]]] = []
        for number, read in enumerate(self.samples, start=1):
            try:
                pair = read()
                batch.append((pair, center_crop(pair.image, self.image.image_size)))
            except RejectedPairError as reject:
                self.advance(1)
                self.rejects[reject.reason] += 1
                self.examples.setdefault(reject.reason, str(reject))
                refused = self.judge.too_many(self.rejects)
                self.judge.note(self.rejects, self.examples, number)
            if refused and number >= LOOK_AHEAD:
                break
            if len(batch) == ENCODE_BATCH:
                if not refused:
                    yield from self._encode(batch)
                batch.clear()
        if refused:
            raise self.judge.refusal(self.rejects, self.examples, number)
        if batch:
            yield from self._encode(batch)

    def details(self) -> dict[str, Any]:
        """Fields of `part.json` beside the rows and hashes."""
        lengths = {str(length): count for length, count in sorted(self.caption_tokens.items())}
        return {"rejects": dict(self.rejects), "examples": self.examples, "caption_tokens": lengths}

    def _encode(self, batch: list[tuple[Pair, Any]]) -> Iterator[dict[str, Any]]:
        ids_BN = self._ids([image for _, image in batch], self.low_precision).numpy()
        self.advance(len(batch))
        width = np.uint16 if self.image.vocab_size <= 2**16 else np.uint32
        for (pair, _), ids_N in zip(batch, ids_BN, strict=True):
            text_ids = self.text.encode_batch(pair.captions)
            self.caption_tokens.update(len(ids) for ids in text_ids)
            meaning = "" if pair.meaning is None else json.dumps(pair.meaning)
            yield {"id": pair.id, "image_ids": ids_N.astype(width), "text_ids": text_ids, "meaning": meaning}


def stack_images(images: list[Any]) -> Tensor:
    """uint8 (B, C, H, W) of B arrays (H, W, C)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def encode_images(image: ImageTokenizer, images: Iterable[Any], low_precision: bool = False) -> IntArray:
    """Ids (B, N) int64 of arrays (H, W, 3), in batches of `ENCODE_BATCH`."""
    waiting, ids, encoder = iter(images), list[IntArray](), Encoder(image)
    while batch := list(islice(waiting, ENCODE_BATCH)):
        ids.append(encoder(batch, low_precision).numpy())
    return np.concatenate(ids) if ids else np.empty((0, 0), dtype=np.int64)


def text_rows(documents: Iterable[str], text: TextTokenizer, length: int) -> Iterator[dict[str, Any]]:
    """Rows of `length` + 1 ids over a stream of documents; `bytes` is the UTF-8 size of the row's targets.

    A document is tokenized paragraph by paragraph, each followed by a blank line, and ends with `document_end`. A row
    begins with the last id of the one before, or with the beginning of a document where the model has one. The last,
    incomplete row of the stream is dropped.
    """
    start = document_start(text)
    begin = [] if start is None else [start]
    ids: list[int] = [*begin]
    sizes: list[float] = [0.0] * len(begin)
    for document in documents:
        left = 0  # bytes without a piece
        if ids != begin:
            ids += begin
            sizes += [0.0] * len(begin)
        for part in (part for paragraph in paragraphs(document) for part in _encodable(f"{paragraph}\n\n")):
            piece_ids = text.encode(part)
            left += len(part.encode())
            if not piece_ids:  # as of control characters: the next part has the bytes
                continue
            # The bytes are spread evenly over the pieces: exact in sum, approximate at a row's edge.
            ids += piece_ids
            sizes += [left / len(piece_ids)] * len(piece_ids)
            left = 0
        ids.append(text.document_end)
        sizes.append(float(left))
        while len(ids) > length:
            yield {"text_ids": ids[: length + 1], "bytes": round(sum(sizes[1 : length + 1]))}
            done = length + len(begin)
            ids[:done], sizes[:done] = begin, [0.0] * len(begin)


def _encodable(paragraph: str) -> Iterator[str]:
    """A paragraph in parts that a tokenizer reads whole."""
    return in_parts(paragraph, MAX_CHARACTERS, lambda part: len(part) <= MAX_CHARACTERS)


def write_text_split(
    folder: Path,
    split: str,
    documents: Iterable[str],
    text: TextTokenizer,
    length: int,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Writes a split of `length` + 1 ids per row as one part, and returns its entry for the index.

    An existing part is reused; `documents` are then not read. Before the part is complete, `check` may raise an error.
    """
    target = part_folder(folder, split, 0)
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        features = text_features(text.vocab_size, length)
        write_part(target, lambda: text_rows(documents, text, length), features, dict, check)
    entry = read_part(target)
    return {"rows": entry["rows"], "parts": [entry["sha256"]]}
