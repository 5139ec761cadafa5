"""Token shards: tokenize a source once, keep the ids.

Work is cut into parts. Every process that needs the shards takes parts that nobody works on, so `torchrun` over
GPUs or several plain processes share it, and one that was killed loses at most its part.
"""

import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
from t2i_lm.data.sources import SPLITS, open_source
from t2i_lm.data.text import paragraphs, read_documents
from t2i_lm.runtime.devices import global_rank, world_size
from t2i_lm.runtime.plugins import SOURCE, find_plugin
from t2i_lm.runtime.progress import Advance, progress
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer, train_sentencepiece

# Bump when the meaning of a shard changes, so that stale caches are not read.
FORMAT = 2
# Seconds between looks at a part that another process works on.
PATIENCE = 0.5
# Share of ids that must not change for images to be encoded in bfloat16.
EQUAL_IDS = 0.999


def cache_folder(config: ExperimentConfig, tokenizers: dict[str, str]) -> Path:
    """Where the shards of an experiment's data lie: named by everything that decides their content."""
    data = config.data
    path, val_path = (
        Path(given).resolve() if given and Path(given).exists() else given for given in (data.path, data.val_path)
    )
    key = {
        "format": FORMAT,
        "source": data.source,
        "path": str(path),
        "val_path": None if val_path is None else str(val_path),
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


def prepare_pairs(config: ExperimentConfig, text: TextTokenizer, image: ImageTokenizer) -> Path:
    """Token shards of a captioned source; done once, then found again.

    Raises:
        ValueError: if more than `data.max_reject_share` of a split cannot be used, with the reasons, or if
            images should be encoded in bfloat16 and that changes too many ids.
    """
    tokenizers = {"text": text.sha256, "image": image.sha256}
    folder = cache_folder(config, tokenizers)
    if read_index(folder) is None:
        if config.image_tokenizer.precision == "bfloat16":
            _require_equal_ids(config, image)
            image.low_precision = True
        _make(folder)
        counts = {}
        for split in SPLITS:
            source = open_source(config.data, split, image.image_size)
            parts, total = cut(source, _limit(config, split), config.data.part_size)
            counts[split] = len(parts)
            size = config.data.part_size
            # How much of what is left falls to this process is known only where it is alone.
            left = None
            if total is not None and world_size() == 1:
                left = sum(min(size, total - number * size) for number in _missing(folder, split, len(parts)))
            with progress(f"tokenizing {split} images", left, global_rank()) as tell:
                _write_parts(parts, folder, split, text, image, tell)
        with _alone(folder):
            if read_index(folder) is None:
                _finish_pairs(config, counts, tokenizers, folder)
    return folder


# A part of a source: gives its samples in order, each time anew.
Part = Callable[[], Iterable[Sample]]


def cut(source: CaptionedSource | StreamedSource, limit: int | None, part_size: int) -> tuple[list[Part], int | None]:
    """The parts of a source, and its number of samples where it is known; a stream's shard is a part."""
    if isinstance(source, StreamedSource):
        return [partial(source.shard, number) for number in range(source.shards)], None
    sized, size = source, len(source) if limit is None else min(len(source), limit)

    def samples(start: int) -> Iterator[Sample]:
        return (partial(sized.__getitem__, index) for index in range(start, min(start + part_size, size)))

    return [partial(samples, start) for start in range(0, size, part_size)], size


def _missing(folder: Path, split: str, parts: int) -> list[int]:
    """Numbers of the parts that nobody has finished."""
    return [number for number in range(parts) if not part_folder(folder, split, number).exists()]


def _write_parts(
    parts: list[Part],
    folder: Path,
    split: str,
    text: TextTokenizer,
    image: ImageTokenizer,
    tell: Advance,
) -> None:
    """Writes the parts that are missing and free, until none is missing."""
    features = pair_features(text.vocab_size, image.grid[0] * image.grid[1])
    while missing := _missing(folder, split, len(parts)):
        idle = True
        for number in missing:
            target = part_folder(folder, split, number)
            target.parent.mkdir(exist_ok=True)
            try:
                with FileLock(target.with_name(f"{target.name}.lock"), timeout=0):
                    if not target.exists():
                        rows = PairRows(parts[number](), text, image, tell)
                        write_part(target, rows, features, rows.details)
                        idle = False
            except Timeout:
                continue
        if idle:
            time.sleep(PATIENCE)


def _finish_pairs(config: ExperimentConfig, counts: dict[str, int], tokenizers: dict[str, str], folder: Path) -> None:
    """Adds the parts up, judges what was rejected, and writes the card and the index."""
    index: dict[str, Any] = {"tokenizers": tokenizers, "source": config.data.source, "splits": {}}
    for split, count in counts.items():
        folders = [part_folder(folder, split, number) for number in range(count)]
        entries = [read_part(part) for part in folders]
        rows = sum(entry["rows"] for entry in entries)
        rejects: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for entry in entries:
            rejects.update(entry["rejects"])
            lengths.update(entry["caption_tokens"])
            examples = entry["examples"] | examples
        _check_rejects(config, split, rows + rejects.total(), rejects, examples, folder)
        index["splits"][split] = {
            "rows": rows,
            "parts": [entry["sha256"] for entry in entries],
            "rejects": dict(rejects),
            "caption_tokens": {length: lengths[length] for length in sorted(lengths, key=int)},
        }
    write_card(folder, index, str(config.data.path or config.data.source))
    write_index(folder, index)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot make {folder}: {error.strerror}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the others (ranks, a second arm) wait and then find the work done."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def _limit(config: ExperimentConfig, split: str) -> int | None:
    return config.data.train_size if split == "train" else config.data.val_size


def _check_rejects(
    config: ExperimentConfig, split: str, total: int, rejects: Counter[str], examples: dict[str, str], folder: Path
) -> None:
    if not rejects:
        return
    reasons = "; ".join(f"{count} {reason} (first: {examples[reason]})" for reason, count in rejects.most_common())
    share = rejects.total() / total
    message = f"{rejects.total()} of {total} {split} samples cannot be used: {reasons}"
    if share > config.data.max_reject_share:
        raise ValueError(
            f"{message}. data.max_reject_share={config.data.max_reject_share} allows fewer. Raise it, or mend the "
            f"samples and delete {folder}"
        )
    print(message, file=sys.stderr)


def prepare_text(config: ExperimentConfig) -> tuple[Path, TextTokenizer]:
    """Token shards of plain text, and the tokenizer, trained here where `text_tokenizer.path` is null.

    Raises:
        ValueError: if there is no text, or no held-out text.
    """
    if config.data.val_path is None:
        raise ValueError("data.val_path=null: give held-out text, for example data.val_path=books_heldout.txt.gz")
    trained = config.text_tokenizer.path
    text = open_text_tokenizer(trained or _train_text_tokenizer(config))
    folder = cache_folder(config, {"text": text.sha256})
    _make(folder)
    with _alone(folder):
        if read_index(folder) is None:
            _write_text(config, text, folder)
    return folder, text


def _write_text(config: ExperimentConfig, text: TextTokenizer, folder: Path) -> None:
    data = config.data
    index: dict[str, Any] = {"tokenizers": {"text": text.sha256}, "source": data.source, "splits": {}}
    for split, path in (("train", data.path), ("val", data.val_path)):
        with progress(f"tokenizing {split} text", None, unit="documents") as tell:
            documents = _counted(read_documents(str(path)), tell)
            index["splits"][split] = write_text_split(folder, split, documents, text, data.length)
    write_index(folder, index)


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


def _counted(items: Iterable[str], tell: Advance) -> Iterator[str]:
    for item in items:
        yield item
        tell(1)


def equal_ids(config: ExperimentConfig, image: ImageTokenizer, images: int = 256) -> tuple[float, int]:
    """Share of ids that bfloat16 encoding leaves equal to float32's, and of how many, on validation images."""
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
        agree_BN = image.encode(images_BCHW) == image.encode(images_BCHW, low_precision=True)
        same, total = same + int(agree_BN.sum()), total + agree_BN.numel()
    return same / total, total


def _require_equal_ids(config: ExperimentConfig, image: ImageTokenizer) -> None:
    share, ids = equal_ids(config, image)
    if share < EQUAL_IDS:
        raise ValueError(
            f"image_tokenizer.precision=bfloat16: {share:.3%} of {ids:,} ids equal float32's, "
            f"at least {EQUAL_IDS:.1%} must"
        )
