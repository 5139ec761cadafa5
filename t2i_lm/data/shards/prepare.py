"""Preparation of token shards: a source is tokenized once, its ids are reused.

The work is cut into parts. Every process that needs the shards takes parts that no other process is writing, so several
ranks of `torchrun` or several plain processes share it, and a killed process loses at most one part.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.control_text import control_documents
from t2i_lm.data.pairs import CaptionedSource, Sample, StreamedSource, cropped_images
from t2i_lm.data.scenes.version import SCENES, SCENES_FORMAT
from t2i_lm.data.shards.cache import (
    FORMAT,
    PartsGuard,
    Prepared,
    Waiting,
    former_scenes,
    say,
    shards_of,
    when,
    write_once,
)
from t2i_lm.data.shards.format import (
    pair_features,
    part_folder,
    read_index,
    read_part,
    write_card,
    write_index,
    write_part,
)
from t2i_lm.data.shards.held_out import (
    RECURRING_TEXT,
    require_held_out,
    require_held_out_text,
    require_other_dataset,
)
from t2i_lm.data.shards.rejects import Rejects, require_few_rejects
from t2i_lm.data.shards.stored import stored_shards
from t2i_lm.data.shards.tokenize import PairRows, encode_images, write_text_split
from t2i_lm.data.sources import open_source
from t2i_lm.data.splits import validations_of
from t2i_lm.data.text import paragraphs, read_documents, recurring_documents
from t2i_lm.runtime.launch import global_rank, world_size
from t2i_lm.runtime.progress import Advance, progress
from t2i_lm.storage.owner import OwnedError, own
from t2i_lm.storage.run_folder import OWNER
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.documents import document_key
from t2i_lm.tokenizers.text import open_text_tokenizer, train_sentencepiece

# Share of ids that must equal float32's for images to be encoded in bfloat16.
MIN_EQUAL_IDS = 0.999

# One part of a source: yields its samples in order, from the start at every call.
Part = Callable[[], Iterable[Sample]]


def prepare_pairs(
    config: ExperimentConfig,
    text: TextTokenizer,
    image: ImageTokenizer,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Token shards of a captioned source; written once, then reused for the same data.

    Args:
        config: the experiment.
        text: its text tokenizer.
        image: its image tokenizer.
        run: env.json of the run that continues; None for a new one.

    Raises:
        ValueError: if a split has no usable sample, if more than `data.max_reject_share` of it is unusable, with the
            reasons, if validation images recur in training, if bfloat16 encoding of images is configured and changes
            too many ids, or if the run is of an older version of scenes (`former_scenes`).
    """
    tokenizers = {"text": text.sha256, "image": image.sha256}
    if config.data.source == "shards":
        return stored_shards(config, tokenizers, image.grid[0] * image.grid[1])
    prepared = shards_of(config, tokenizers, image.vocab_size > 2**16)
    folder = former_scenes(config, prepared, run) or prepared.find()
    if folder is None:
        if config.image_tokenizer.precision == "bfloat16":
            _require_equal_ids(config, image)
        validations = validations_of(config.data)
        sources = {split: open_source(config.data, split, image.image_size) for split in ("train", *validations)}
        for split, source in sources.items():
            if not isinstance(source, StreamedSource) and not len(source):
                raise ValueError(f"{_origin(config)}: no {split} sample{_sizes(sources)}; expected at least one")
        prepared.write_key()
        guard = PartsGuard(prepared)
        # The smaller splits first, so that their faults appear before the work on the largest.
        parts = {
            split: write_pair_split(config, prepared.folder, split, sources[split], text, image, guard.before_part)
            for split in (*validations, "train")
        }
        guard.check()
        notes = {split: lines for split, source in sources.items() if (lines := list(getattr(source, "notes", ())))}
        folder = write_once(prepared, lambda folder: _write_pair_index(config, folder, parts, tokenizers, notes))
    else:
        require_few_rejects(config.data.max_reject_share, read_index(folder) or {}, _origin(config))
    require_held_out(config, folder)
    return folder


def _origin(config: ExperimentConfig) -> str:
    return f"data.path={config.data.path}" if config.data.path else f"data.source={config.data.source}"


def _sizes(sources: Mapping[str, CaptionedSource | StreamedSource]) -> str:
    sizes = [f"{len(s)} {split}" for split, s in sources.items() if not isinstance(s, StreamedSource)]
    return f" ({', '.join(sizes)})" if len(sizes) == len(sources) else ""


def write_pair_split(
    config: ExperimentConfig,
    folder: Path,
    split: str,
    source: CaptionedSource | StreamedSource,
    text: TextTokenizer,
    image: ImageTokenizer,
    check: Callable[[Path], None] = lambda part: None,
) -> list[Path]:
    """Writes the parts of a split that are missing and not owned, until none is missing; returns their folders.

    Before a part is complete, `check` of its folder may raise an error.

    Raises:
        ValueError: if too many samples are unusable, or none is usable.
    """
    data = config.data
    features = pair_features(text.vocab_size, image.grid[0] * image.grid[1], image.vocab_size)
    limit = data.train_size if split == "train" else data.val_size
    parts, total = cut(source, limit, data.part_size)
    targets = [part_folder(folder, split, number) for number in range(len(parts))]
    # Files that are repaired have another folder.
    remedy = "" if data.path and Path(data.path).exists() else f" and delete {folder}"
    rejects = Rejects(data.max_reject_share, split, total, _origin(config), remedy)
    low_precision, waited = config.image_tokenizer.precision == "bfloat16", Waiting()

    def missing() -> list[int]:
        return [number for number, target in enumerate(targets) if not target.exists()]

    # With several processes, this one's share of the rest is unknown.
    left = None
    if total is not None and world_size() == 1:
        left = sum(min(data.part_size, total - number * data.part_size) for number in missing())
    with progress(f"tokenizing {split} images", left, global_rank()) as advance:
        while numbers := missing():
            held: OwnedError | None = None
            idle = True
            for number in numbers:
                rejects.add_parts(targets)
                rows = PairRows(parts[number](), text, image, advance, rejects, low_precision)
                try:
                    idle = not _write_pair_part(targets[number], rows, features, check) and idle
                except OwnedError as error:
                    held = error
            if idle and held is not None:
                waited.sleep(held)
    rejects.add_parts(targets)
    rejects.require_usable()
    return targets


def _write_pair_part(target: Path, rows: PairRows, features: datasets.Features, check: Callable[[Path], None]) -> bool:
    """Writes a part, unless it exists; returns whether it was written.

    Raises:
        OwnedError: if another process is writing it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with own(target.with_name(f"{target.name}.{OWNER}")):
        if target.exists():
            return False
        write_part(target, rows, features, rows.details, partial(check, target))
        return True


def cut(source: CaptionedSource | StreamedSource, limit: int | None, part_size: int) -> tuple[list[Part], int | None]:
    """The parts of a source (of a stream: its shards) and its number of samples (of a stream: None)."""
    if isinstance(source, StreamedSource):
        return [partial(source.shard, number) for number in range(source.shards)], None
    sized, size = source, len(source) if limit is None else min(len(source), limit)

    def samples(start: int) -> Iterator[Sample]:
        return (partial(sized.__getitem__, index) for index in range(start, min(start + part_size, size)))

    return [partial(samples, start) for start in range(0, size, part_size)], size


def _write_pair_index(
    config: ExperimentConfig,
    folder: Path,
    parts: dict[str, list[Path]],
    tokenizers: dict[str, str],
    notes: dict[str, list[str]],
) -> None:
    """Adds up the parts, and writes README.md and the index."""
    for left in folder.rglob(f"part-*.{OWNER}"):  # of processes that were killed
        left.unlink(missing_ok=True)
    index: dict[str, Any] = {"tokenizers": tokenizers, "source": config.data.source, "notes": notes, "splits": {}}
    if config.data.source == "scenes":
        index[SCENES] = SCENES_FORMAT
    for split in sorted(parts, key=lambda name: name != "train"):
        index["splits"][split] = split_entry(parts[split])
    write_card(folder, index, str(config.data.path or config.data.source))
    write_index(folder, index)


def split_entry(parts: Iterable[Path]) -> dict[str, Any]:
    """The index's entry of a split: what its parts count, added up."""
    entries = [read_part(part) for part in parts]
    rejects: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for entry in entries:
        rejects.update(entry["rejects"])
        lengths.update(entry["caption_tokens"])
    return {
        "rows": sum(entry["rows"] for entry in entries),
        "parts": [entry["sha256"] for entry in entries],
        "rejects": dict(rejects),
        "caption_tokens": {length: lengths[length] for length in sorted(lengths, key=int)},
    }


def prepare_text(config: ExperimentConfig) -> tuple[Path, TextTokenizer]:
    """Token shards of plain text, and the tokenizer, which is trained here if `text_tokenizer.path` is null.

    Raises:
        ValueError: if there is no text, no held-out text, or too much of it is trained on.
    """
    data = config.data
    if data.val_path is None:
        raise ValueError("data.val_path=null: held-out text is required, for example data.val_path=heldout.txt.gz")
    require_other_dataset(data)
    path = config.text_tokenizer.path
    settings = config.text_tokenizer
    text = open_text_tokenizer(path or _train_text_tokenizer(config), settings.document_start, settings.document_end)
    documents = {name: str(value) for name, value in document_key(text).items()}
    prepared = shards_of(config, {"text": text.sha256, **documents})

    def write(folder: Path) -> None:
        index: dict[str, Any] = {"tokenizers": {"text": text.sha256}, "source": data.source, "splits": {}}
        index[RECURRING_TEXT] = recurring_documents(str(data.val_path), "data.val_path", str(data.path))
        require_held_out_text(config, index)
        for key, split, source in (("data.path", "train", data.path), ("data.val_path", "val", data.val_path)):
            with progress(f"tokenizing {split} text", None, unit="documents") as advance:
                texts = control_documents(_counted(read_documents(str(source), key), advance), data.control)
                entry = write_text_split(folder, split, texts, text, data.length, prepared.require_unchanged)
            if not entry["rows"]:
                raise ValueError(f"{key}={source}: less text than one row of data.length={data.length} ids")
            index["splits"][split] = entry
        prepared.require_unchanged()  # documents were compared, too
        write_index(folder, index)

    folder = prepared.find() or write_once(prepared, write)
    require_held_out_text(config, read_index(folder) or {})
    return folder, text


def _train_text_tokenizer(config: ExperimentConfig) -> Path:
    settings, data = config.text_tokenizer, config.data
    assert data.path is not None
    sizes = [settings.vocab_size, settings.train_paragraphs]
    prepared = Prepared(
        Path(data.cache_dir),
        "text_tokenizer",
        {"format": FORMAT, "sizes": sizes},
        {"data.path": data.path},
        (data.cache_dir, config.run.dir),
        suffix=".model",
    )
    file = prepared.folder
    if file.is_file():
        prepared.require_recorded_file()
        say(f"reusing {file}, trained {when(file)}")
        return file
    prepared.say_why_anew()
    every = [paragraph for document in read_documents(data.path) for paragraph in paragraphs(document)]
    stride = max(1, len(every) // settings.train_paragraphs)
    prepared.require_unchanged()
    prepared.write_key()
    train_sentencepiece(iter(every[::stride]), settings.vocab_size, file)
    prepared.record_file()
    return file


def _counted(items: Iterable[str], advance: Advance) -> Iterator[str]:
    for item in items:
        yield item
        advance(1)


def equal_ids(config: ExperimentConfig, image: ImageTokenizer, images: int = 256) -> tuple[float, int]:
    """Share of ids of validation images that bfloat16 encoding leaves equal to float32's, and the number of ids."""
    split = validations_of(config.data)[0]
    parts, _ = cut(open_source(config.data, split, image.image_size), None, images)
    readable = [one for _, one in islice(cropped_images(parts[0](), image.image_size), images)]
    if not readable:
        raise ValueError(f"data.path={config.data.path}: no readable image among the first {images}")
    float32_BN, bfloat16_BN = (encode_images(image, readable, low_precision) for low_precision in (False, True))
    return float((float32_BN == bfloat16_BN).mean()), float32_BN.size


def _require_equal_ids(config: ExperimentConfig, image: ImageTokenizer) -> None:
    share, ids = equal_ids(config, image)
    if share < MIN_EQUAL_IDS:
        raise ValueError(
            f"image_tokenizer.precision=bfloat16: {share:.3%} of {ids:,} ids equal float32's, "
            f"at least {MIN_EQUAL_IDS:.1%} must"
        )
