"""Samples/s of the data module: token shards -> batches of joint ids, in one process (goal G8).

The peer reads the same shards in the common way: a map-style dataset of single samples, packed by the collate
function. Files are in the page cache, since they have just been written; on Linux ours is also timed without it:
files are opened, then dropped from the cache.

Shapes: `B` batch, `T` tokens.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.rounds import OURS, Contender, GateError, Report, compare, exit_code, interleave, parser, rates

EXAMPLE = "python -m benchmarks.loader --shape paper --threads 1"
# (image tokens, text vocabulary, image codes, positions, batch)
SHAPES = {"demo": (64, 4096, 512, 112, 16), "paper": (1024, 50_432, 16_384, 1152, 14)}


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("loader", "Batches from prepared token shards.", EXAMPLE)
    arguments.add_argument("--shape", choices=tuple(SHAPES), default="demo", help="default: %(default)s")
    arguments.add_argument("--samples", type=int, default=8192, help="samples in the shards (default: %(default)s)")
    arguments.add_argument("--batches", type=int, default=200, help="batches per repetition (default: %(default)s)")
    return arguments.parse_args(argv)


def open_data(folder: Path, scale: str, batches: int) -> Any:
    """Our data module over a folder."""
    from benchmarks.shards import experiment, open_alone
    from t2i_lm.data.datamodules import PairDataModule
    from t2i_lm.tokenizers.joint_vocab import JointVocab
    from t2i_lm.tokenizers.layout import Layout

    image_tokens, text_vocab, image_codes, length, batch = SHAPES[scale]
    layout = Layout(JointVocab(text_vocab, image_codes), image_tokens, length)
    data = PairDataModule(experiment(batch, length, batches, scale=scale), folder, layout)
    open_alone(data)
    return data


def one_at_a_time(data: Any) -> Callable[[], Any]:
    """The same batches, read sample by sample."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from t2i_lm.data.datamodules import make_sampler
    from t2i_lm.data.sampler import choose_caption
    from t2i_lm.data.shards.parts import open_split

    split, layout, config = open_split(data.folder, "train"), data.layout, data.config

    class Samples(Dataset[Any]):
        def __getitem__(self, draw: Any) -> Any:
            epoch, index = draw
            row = split[index]
            chosen = choose_caption(len(row["text_ids"]), config.seed, epoch, index)
            return layout.pack([row["text_ids"][chosen]], row["image_ids"][None])[0]

    sampler = make_sampler(config, len(split))
    return lambda: DataLoader(Samples(), batch_sampler=sampler, collate_fn=torch.stack)


def check(data: Any, theirs: Callable[[], Any], batches: int) -> dict[str, int]:
    """Our batches equal the peer's up to trimmed pads, and a resumed stream equals the rest of an uninterrupted one.

    Raises:
        GateError: naming the first batch that differs.
    """
    import torch

    from t2i_lm.data.order import CURRENT

    uninterrupted = [batch["ids_BT"] for batch in data.train_dataloader()]
    if len(uninterrupted) != batches:
        raise GateError(f"{len(uninterrupted)} batches, expected {batches}")
    pad = data.layout.vocab.pad
    for number, (ids_BT, padded_BT) in enumerate(zip(uninterrupted, theirs(), strict=True)):
        length = ids_BT.shape[1]
        if not torch.equal(ids_BT, padded_BT[:, :length]) or not bool((padded_BT[:, length:] == pad).all()):
            raise GateError(f"batch {number} differs from the peer's: not timed")
    half = batches // 2
    data.load_state_dict({"consumed": half * data.config.data.batch_size, "order": CURRENT})
    resumed = [batch["ids_BT"] for batch in data.train_dataloader()]
    data.load_state_dict({"consumed": 0, "order": CURRENT})
    if len(resumed) != batches - half or not all(
        torch.equal(after, before) for after, before in zip(resumed, uninterrupted[half:], strict=True)
    ):
        raise GateError(f"the stream resumed after batch {half} differs: not timed")
    return {"batches_equal": batches, "resumed_batches_equal": batches - half}


def drop_from_memory(data: Any) -> bool:
    """Reopens the shards, verifies them, which reads them, and drops them from memory; whether that worked."""
    data.setup("fit")
    parts = data.train_set.columns.parts
    for number in range(len(parts.rows)):
        parts.files(number)
    gc.collect()  # mapped files of an earlier dataset would stay in memory
    return all(_forget(path) for path in Path(data.folder, "train").rglob("*.arrow"))


def _forget(path: Path) -> bool:
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file)  # unwritten pages would stay in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return 2 * share_in_memory(file) < 1  # headers stay: opening maps them


def share_in_memory(file: IO[bytes]) -> float:
    """Share of a file's pages that are in the page cache, by `mincore`: reading, even without waiting, adds pages."""
    import ctypes

    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as pages:  # ctypes requires a writable buffer
        present = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        try:
            failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), present)
        finally:
            del start  # else the mapping could not be closed
    return 1.0 if failed else sum(page & 1 for page in present) / len(present)


def measure(options: argparse.Namespace) -> None:
    """Writes shards, checks, times, reports."""
    report = Report("loader", options)
    from benchmarks.shards import write_random_shards

    if options.quick:
        # Opening maps the first pages of a file, which then stay in memory: the file is larger than twice these.
        options.samples, options.batches = 4096, 6
    image_tokens, text_vocab, image_codes, length, batch = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as place:
        folder, aside = Path(place, "warm"), Path(place, "cold")
        write_random_shards(folder, options.samples, image_tokens, text_vocab, image_codes, length)
        data = open_data(folder, options.shape, options.batches)
        theirs = one_at_a_time(data)
        agreement = check(data, theirs, options.batches)

        def read(loader: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                for _ in loader():
                    pass

            return run

        contenders = [
            Contender(OURS, OURS, read(data.train_dataloader)),
            Contender("sample by sample", "sample by sample", read(theirs)),
        ]
        shutil.copytree(folder, aside)  # files mapped by the others would stay in memory
        unread = open_data(aside, options.shape, options.batches)
        dropped: list[bool] = []
        name = f"{OURS}, files not in memory"
        cold = Contender(name, name, read(unread.train_dataloader), lambda: dropped.append(drop_from_memory(unread)))
        if drop_from_memory(unread):
            contenders.append(cold)
        seconds = interleave(contenders, options.rounds, 1, "cpu")
        if cold not in contenders or not all(dropped):
            print("files stay in memory: reading from disk is not reported", file=sys.stderr)
            contenders = [one for one in contenders if one is not cold]
            seconds.pop(name, None)
        report.write(
            gate=agreement,
            image_tokens=image_tokens,
            batch=batch,
            **compare(contenders, seconds),
            samples_per_s=rates(seconds, options.batches * batch),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())
