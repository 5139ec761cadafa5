"""Preparation of token shards: a source is tokenized once, its ids are reused.

The work is cut into parts. Every process that needs the shards takes parts that no other process has locked, so several
ranks of `torchrun` or several plain processes share it, and a killed process loses at most one part.
"""

import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import is_plugin
from t2i_lm.data.pairs import CaptionedSource, RejectedPairError, Sample, StreamedSource, center_crop
from t2i_lm.data.shards.format import (
    pair_features,
    part_folder,
    read_index,
    read_part,
    write_card,
    write_index,
    write_part,
)
from t2i_lm.data.shards.tokenize import ENCODE_BATCH, PairRows, stack_images, write_text_split
from t2i_lm.data.sources import SPLITS, open_source, print_notes
from t2i_lm.data.text import paragraphs, read_documents
from t2i_lm.runtime.devices import global_rank, world_size
from t2i_lm.runtime.plugins import SOURCE, find_plugin
from t2i_lm.runtime.progress import Advance, progress
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.documents import document_key
from t2i_lm.tokenizers.text import open_text_tokenizer, train_sentencepiece

# Increment when the content of shards changes, so that older caches are not reused.
FORMAT = 2
# Seconds between checks of parts that other processes are writing.
POLL_S = 0.5
# Share of ids that must equal float32's for images to be encoded in bfloat16.
MIN_EQUAL_IDS = 0.999

# One part of a source: yields its samples in order, from the start at every call.
Part = Callable[[], Iterable[Sample]]


def absolute_path(path: str | None) -> str | None:
    """The absolute path of an existing file or folder; other names, as of Hugging Face datasets, are unchanged."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def cache_folder(config: ExperimentConfig, tokenizers: dict[str, str]) -> Path:
    """Folder of an experiment's shards, named by a hash of everything that determines their content."""
    data = config.data
    key = {
        "format": FORMAT,
        "source": data.source,
        "path": str(absolute_path(data.path)),
        "val_path": absolute_path(data.val_path),
        "hold_out_pairs": data.hold_out_pairs,
        "sizes": [data.train_size, data.val_size],
        "part_size": data.part_size,
        "seed": data.seed,
        "image_size": config.image_tokenizer.size if config.task != "text" else None,
        "precision": config.image_tokenizer.precision if config.task != "text" else None,
        "length": data.length if config.task == "text" else None,
        "tokenizers": tokenizers,
    }
    if is_plugin(data.source):
        key["plugin"] = find_plugin(SOURCE, data.source).identity
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return Path(data.cache_dir) / f"{re.sub(r'[^a-zA-Z0-9_.]', '-', data.source)}-{digest}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot create {folder}: {error.strerror}") from error


def write_once(folder: Path, write: Callable[[], None]) -> None:
    """Calls `write` unless the folder is complete; other processes (ranks, a second arm) wait for the first one.

    Raises:
        ValueError: if the folder cannot be created.
    """
    _make_folder(folder)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if read_index(folder) is None:
            write()


def prepare_pairs(config: ExperimentConfig, text: TextTokenizer, image: ImageTokenizer) -> Path:
    """Token shards of a captioned source; written once, then reused.

    Raises:
        ValueError: if more than `data.max_reject_share` of a split is unusable, with the reasons, or if bfloat16
            encoding of images is configured and changes too many ids.
    """
    tokenizers = {"text": text.sha256, "image": image.sha256}
    folder = cache_folder(config, tokenizers)
    if read_index(folder) is None:
        if config.image_tokenizer.precision == "bfloat16":
            _require_equal_ids(config, image)
            image.low_precision = True
        _make_folder(folder)
        parts = {split: _write_pair_split(config, folder, split, text, image) for split in SPLITS}
        write_once(folder, lambda: _write_pair_index(config, folder, parts, tokenizers))
    return folder


def _write_pair_split(
    config: ExperimentConfig, folder: Path, split: str, text: TextTokenizer, image: ImageTokenizer
) -> list[Path]:
    """Writes the parts of a split that are missing and not locked, until none is missing; returns their folders."""
    data, features = config.data, pair_features(text.vocab_size, image.grid[0] * image.grid[1])
    source = open_source(data, split, image.image_size)
    print_notes(source)
    limit = data.train_size if split == "train" else data.val_size
    parts, total = cut(source, limit, data.part_size)
    targets = [part_folder(folder, split, number) for number in range(len(parts))]

    def missing() -> list[int]:
        return [number for number, target in enumerate(targets) if not target.exists()]

    # With several processes, this one's share of the rest is unknown.
    left = None
    if total is not None and world_size() == 1:
        left = sum(min(data.part_size, total - number * data.part_size) for number in missing())
    with progress(f"tokenizing {split} images", left, global_rank()) as advance:
        while numbers := missing():
            idle = True
            for number in numbers:
                rows = PairRows(parts[number](), text, image, advance)
                if _write_pair_part(targets[number], rows, features):
                    idle = False
            if idle:
                time.sleep(POLL_S)
    return targets


def _write_pair_part(target: Path, rows: PairRows, features: datasets.Features) -> bool:
    """Writes a part, unless it exists or another process has locked it; returns whether it was written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target.with_name(f"{target.name}.lock"), timeout=0):
            if target.exists():
                return False
            write_part(target, rows, features, rows.details)
            return True
    except Timeout:
        return False


def cut(source: CaptionedSource | StreamedSource, limit: int | None, part_size: int) -> tuple[list[Part], int | None]:
    """The parts of a source (of a stream: its shards) and its number of samples (of a stream: None)."""
    if isinstance(source, StreamedSource):
        return [partial(source.shard, number) for number in range(source.shards)], None
    sized, size = source, len(source) if limit is None else min(len(source), limit)

    def samples(start: int) -> Iterator[Sample]:
        return (partial(sized.__getitem__, index) for index in range(start, min(start + part_size, size)))

    return [partial(samples, start) for start in range(0, size, part_size)], size


def _write_pair_index(
    config: ExperimentConfig, folder: Path, parts: dict[str, list[Path]], tokenizers: dict[str, str]
) -> None:
    """Adds up the parts, checks the share of rejects, and writes README.md and the index."""
    index: dict[str, Any] = {"tokenizers": tokenizers, "source": config.data.source, "splits": {}}
    for split, folders in parts.items():
        entries = [read_part(part) for part in folders]
        rejects: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for entry in entries:
            rejects.update(entry["rejects"])
            lengths.update(entry["caption_tokens"])
            examples = entry["examples"] | examples
        rows = sum(entry["rows"] for entry in entries)
        if rejects:
            _check_rejects(config, split, rows + rejects.total(), rejects, examples, folder)
        index["splits"][split] = {
            "rows": rows,
            "parts": [entry["sha256"] for entry in entries],
            "rejects": dict(rejects),
            "caption_tokens": {length: lengths[length] for length in sorted(lengths, key=int)},
        }
    write_card(folder, index, str(config.data.path or config.data.source))
    write_index(folder, index)


def _check_rejects(
    config: ExperimentConfig, split: str, total: int, rejects: Counter[str], examples: dict[str, str], folder: Path
) -> None:
    """Prints the rejects by reason; raises if they exceed `data.max_reject_share`."""
    reasons = "; ".join(f"{count} {reason} (first: {examples[reason]})" for reason, count in rejects.most_common())
    message = f"{rejects.total()} of {total} {split} samples cannot be used: {reasons}"
    if rejects.total() / total > config.data.max_reject_share:
        raise ValueError(
            f"{message}. data.max_reject_share={config.data.max_reject_share} allows fewer. Raise it, or repair the "
            f"samples and delete {folder}"
        )
    print(message, file=sys.stderr)


def prepare_text(config: ExperimentConfig) -> tuple[Path, TextTokenizer]:
    """Token shards of plain text, and the tokenizer, which is trained here if `text_tokenizer.path` is null.

    Raises:
        ValueError: if there is no text, or no held-out text.
    """
    data = config.data
    if data.val_path is None:
        raise ValueError("data.val_path=null: held-out text is required, for example data.val_path=heldout.txt.gz")
    path = config.text_tokenizer.path
    settings = config.text_tokenizer
    text = open_text_tokenizer(path or _train_text_tokenizer(config), settings.document_start, settings.document_end)
    documents = {name: str(value) for name, value in document_key(text).items()}
    folder = cache_folder(config, {"text": text.sha256, **documents})

    def write() -> None:
        index: dict[str, Any] = {"tokenizers": {"text": text.sha256}, "source": data.source, "splits": {}}
        for split, key, source in (("train", "data.path", data.path), ("val", "data.val_path", data.val_path)):
            with progress(f"tokenizing {split} text", None, unit="documents") as advance:
                texts = _counted(read_documents(str(source), key), advance)
                index["splits"][split] = write_text_split(folder, split, texts, text, data.length)
        write_index(folder, index)

    write_once(folder, write)
    return folder, text


def _train_text_tokenizer(config: ExperimentConfig) -> Path:
    settings, data = config.text_tokenizer, config.data
    assert data.path is not None
    key = json.dumps([FORMAT, str(Path(data.path).resolve()), settings.vocab_size, settings.train_paragraphs])
    path = Path(data.cache_dir) / f"text_tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:12]}.model"
    if not path.is_file():
        every = [paragraph for document in read_documents(data.path) for paragraph in paragraphs(document)]
        stride = max(1, len(every) // settings.train_paragraphs)
        train_sentencepiece(iter(every[::stride]), settings.vocab_size, path)
    return path


def _counted(items: Iterable[str], advance: Advance) -> Iterator[str]:
    for item in items:
        yield item
        advance(1)


def equal_ids(config: ExperimentConfig, image: ImageTokenizer, images: int = 256) -> tuple[float, int]:
    """Share of ids of validation images that bfloat16 encoding leaves equal to float32's, and the number of ids."""
    parts, _ = cut(open_source(config.data, "val", image.image_size), None, images)
    readable: list[Any] = []
    for read in parts[0]():
        try:
            readable.append(center_crop(read().image, image.image_size))
        except RejectedPairError:
            continue
        if len(readable) == images:
            break
    if not readable:
        raise ValueError(f"data.path={config.data.path}: no readable image among the first {images}")
    same = total = 0
    for start in range(0, len(readable), ENCODE_BATCH):
        images_BCHW = stack_images(readable[start : start + ENCODE_BATCH])
        equal_BN = image.encode(images_BCHW) == image.encode(images_BCHW, low_precision=True)
        same, total = same + int(equal_BN.sum()), total + equal_BN.numel()
    return same / total, total


def _require_equal_ids(config: ExperimentConfig, image: ImageTokenizer) -> None:
    share, ids = equal_ids(config, image)
    if share < MIN_EQUAL_IDS:
        raise ValueError(
            f"image_tokenizer.precision=bfloat16: {share:.3%} of {ids:,} ids equal float32's, "
            f"at least {MIN_EQUAL_IDS:.1%} must"
        )
