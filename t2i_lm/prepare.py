"""Token shards: tokenise a source once, keep the ids (`python -m t2i_lm.prepare`)."""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.config import ExperimentConfig
from t2i_lm.load import SCALES, load_experiment

if TYPE_CHECKING:
    from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer

EXAMPLE = "example: python -m t2i_lm.prepare experiments/t2i_pretrained.yaml --scale demo data.train_size=1000"
# Pictures encoded at once.
ENCODE_BATCH = 64
# Bump when the meaning of a shard changes, so that stale caches are not read.
FORMAT = 1


def cache_folder(config: ExperimentConfig, tokenizers: dict[str, str]) -> Path:
    """Where the shards of an experiment's data lie: named by everything that decides their content."""
    data = config.data
    path = Path(data.path).resolve() if data.path and Path(data.path).exists() else data.path
    key = {
        "format": FORMAT,
        "source": data.source,
        "path": str(path),
        "val_path": data.val_path,
        "hold_out_pairs": data.hold_out_pairs,
        "sizes": [data.train_size, data.val_size],
        "seed": data.seed,
        "image_size": config.image_tokenizer.size if config.task != "text" else None,
        "length": data.length if config.task == "text" else None,
        "tokenizers": tokenizers,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return Path(data.cache_dir) / f"{data.source}-{digest}"


def prepare_pairs(config: ExperimentConfig, text: "TextTokenizer", image: "ImageTokenizer") -> Path:
    """Token shards of a captioned source; done once, then found again.

    Raises:
        ValueError: if more than `data.max_reject_share` of a split cannot be used, with the reasons.
    """
    from t2i_lm.data.tokens import read_index

    tokenizers = {"text": text.sha256, "image": image.sha256}
    folder = cache_folder(config, tokenizers)
    with _only_one(folder):
        if read_index(folder) is None:
            _write_pairs(config, text, image, folder)
    return folder


def _write_pairs(config: ExperimentConfig, text: "TextTokenizer", image: "ImageTokenizer", folder: Path) -> None:
    from t2i_lm.data.sources import SPLITS, open_source
    from t2i_lm.data.tokens import pair_features, write_index, write_split

    tokenizers = {"text": text.sha256, "image": image.sha256}
    features = pair_features(text.vocab_size, image.grid[0] * image.grid[1])
    index: dict[str, Any] = {"tokenizers": tokenizers, "source": config.data.source, "splits": {}}
    for split in SPLITS:
        source = open_source(config.data, split, image.image_size)
        total = _limit(config, split, len(source))
        rejects: Counter[str] = Counter()
        examples: dict[str, str] = {}
        lengths: Counter[int] = Counter()

        def rows(
            source: Any = source,
            total: int = total,
            split: str = split,
            rejects: Counter[str] = rejects,
            examples: dict[str, str] = examples,
            lengths: Counter[int] = lengths,
        ) -> Iterator[dict[str, Any]]:
            yield from _pair_rows(source, total, split, text, image, rejects, examples, lengths)

        entry = write_split(folder, split, rows, features)
        _check_rejects(config, split, total, rejects, examples)
        entry["rejects"] = dict(rejects)
        entry["caption_tokens"] = {str(length): count for length, count in sorted(lengths.items())}
        index["splits"][split] = entry
    write_index(folder, index)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One process prepares a folder; the others (ranks, a second arm) wait and then find it done."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot make {folder}: {error.strerror}") from error
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def _limit(config: ExperimentConfig, split: str, size: int) -> int:
    wanted = config.data.train_size if split == "train" else config.data.val_size
    return size if wanted is None else min(size, wanted)


def _pair_rows(
    source: Any,
    total: int,
    split: str,
    text: "TextTokenizer",
    image: "ImageTokenizer",
    rejects: Counter[str],
    examples: dict[str, str],
    lengths: Counter[int],
) -> Iterator[dict[str, Any]]:
    import numpy as np
    import torch

    from t2i_lm.data.sources import RejectedPairError, centre_crop

    pairs: list[Any] = []
    pictures: list[Any] = []

    def flush() -> Iterator[dict[str, Any]]:
        images_BCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        for pair, ids_N in zip(pairs, image.encode(images_BCHW).cpu().numpy(), strict=True):
            text_ids = text.encode_batch(pair.captions)
            lengths.update(len(ids) for ids in text_ids)
            meaning = "" if pair.meaning is None else json.dumps(pair.meaning)
            yield {"id": pair.id, "image_ids": ids_N.astype(np.uint16), "text_ids": text_ids, "meaning": meaning}
        pairs.clear()
        pictures.clear()

    for number in _track(range(total), f"tokenising {split} pictures"):
        try:
            pair = source[number]
        except RejectedPairError as reject:
            rejects[reject.reason] += 1
            examples.setdefault(reject.reason, str(reject))
            continue
        pairs.append(pair)
        pictures.append(centre_crop(pair.image, image.image_size))
        if len(pairs) == ENCODE_BATCH:
            yield from flush()
    if pairs:
        yield from flush()


def _check_rejects(
    config: ExperimentConfig, split: str, total: int, rejects: Counter[str], examples: dict[str, str]
) -> None:
    if not rejects:
        return
    reasons = "; ".join(f"{count} {reason} (first: {examples[reason]})" for reason, count in rejects.most_common())
    share = rejects.total() / total
    message = f"{rejects.total()} of {total} {split} samples cannot be used: {reasons}"
    if share > config.data.max_reject_share:
        raise ValueError(f"{message}. data.max_reject_share={config.data.max_reject_share} allows fewer")
    print(message, file=sys.stderr)


def prepare_text(config: ExperimentConfig) -> tuple[Path, "TextTokenizer"]:
    """Token shards of plain text, and the tokenizer, trained here where `text_tokenizer.path` is null.

    Raises:
        ValueError: if there is no text, or no held-out text.
    """
    from t2i_lm.assets import resolve
    from t2i_lm.data.tokens import read_index
    from t2i_lm.tokenizers.text import open_text_tokenizer

    if config.data.val_path is None:
        raise ValueError("data.val_path=null: give held-out text, for example data.val_path=books_heldout.txt.gz")
    trained = config.text_tokenizer.path
    text = open_text_tokenizer(resolve(trained) if trained else _train_text_tokenizer(config))
    folder = cache_folder(config, {"text": text.sha256})
    with _only_one(folder):
        if read_index(folder) is None:
            _write_text(config, text, folder)
    return folder, text


def _write_text(config: ExperimentConfig, text: "TextTokenizer", folder: Path) -> None:
    from t2i_lm.data.text import read_documents
    from t2i_lm.data.tokens import text_features, write_index, write_split

    data = config.data
    index: dict[str, Any] = {"tokenizers": {"text": text.sha256}, "source": data.source, "splits": {}}
    for split, path in (("train", data.path), ("val", data.val_path)):
        documents = _track(read_documents(str(path)), f"tokenising {split} documents")

        def rows(documents: Iterable[str] = documents) -> Iterator[dict[str, Any]]:
            yield from text_rows(documents, text, data.length)

        index["splits"][split] = write_split(folder, split, rows, text_features(text.vocab_size, data.length))
    write_index(folder, index)


def text_rows(documents: Iterable[str], text: "TextTokenizer", length: int) -> Iterator[dict[str, Any]]:
    """Rows of `length` + 1 ids over a stream of documents; `bytes` is the UTF-8 size of the row's targets.

    A document is tokenised paragraph by paragraph, each followed by a blank line, and ends with `</s>`.
    The last, incomplete row of the stream is dropped.
    """
    from t2i_lm.data.text import paragraphs

    ids: list[int] = []
    sizes: list[float] = []
    for document in documents:
        for paragraph in paragraphs(document):
            piece_ids = text.encode(f"{paragraph}\n\n")
            ids += piece_ids
            # A paragraph's bytes are spread evenly over its pieces: exact in sum, near enough at a row's edge.
            sizes += [len(f"{paragraph}\n\n".encode()) / len(piece_ids)] * len(piece_ids)
        ids.append(text.document_end)
        sizes.append(0.0)
        while len(ids) > length:
            yield {"text_ids": ids[: length + 1], "bytes": round(sum(sizes[1 : length + 1]))}
            del ids[:length], sizes[:length]


def _train_text_tokenizer(config: ExperimentConfig) -> Path:
    from t2i_lm.data.text import paragraphs, read_documents
    from t2i_lm.tokenizers.text import train_sentencepiece

    settings, data = config.text_tokenizer, config.data
    assert data.path is not None
    key = json.dumps([FORMAT, str(Path(data.path).resolve()), settings.vocab_size, settings.train_paragraphs])
    path = Path(data.cache_dir) / f"text_tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:12]}.model"
    if not path.is_file():
        every = [paragraph for document in read_documents(data.path) for paragraph in paragraphs(document)]
        stride = max(1, len(every) // settings.train_paragraphs)
        train_sentencepiece(iter(every[::stride]), settings.vocab_size, path)
    return path


def _track(items: Iterable[Any], what: str) -> Iterator[Any]:
    """Progress with ETA on a terminal, one line otherwise."""
    from rich.progress import track

    if sys.stderr.isatty():
        yield from track(items, description=what)
    else:
        print(what, file=sys.stderr, flush=True)
        yield from items


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares an experiment's data and says where it lies; returns the exit code."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.prepare",
        description="Tokenise an experiment's data once; training runs find the shards again.",
        epilog=EXAMPLE,
    )
    arguments.add_argument("experiment", type=Path, help="experiment YAML")
    arguments.add_argument("--scale", default="demo", help=f"one of {', '.join(SCALES)} (default: %(default)s)")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    options = arguments.parse_intermixed_args(argv)
    try:
        config = load_experiment(options.experiment, options.scale, options.overrides)
        if config.task == "image_tokenizer":
            raise ValueError("task=image_tokenizer reads its pictures directly; there is nothing to prepare")
        from t2i_lm.build import build
        from t2i_lm.data.tokens import read_index

        folder = build(config).shards
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert folder is not None
    index = read_index(folder)
    assert index is not None
    print(f"{folder}  data hash {index['data_hash']}")
    for split, entry in index["splits"].items():
        print(f"  {split}: {entry['rows']:,} rows; rejected: {entry.get('rejects') or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
