"""Text replay: a fixed share of every batch is plain text, the language model's pre-training data.

Which positions of the sample stream are replaced, and by which window of text, depends on the position alone: a resumed
run continues exactly, and every pair that is not replaced keeps its position.
"""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.datamodules import Batch, Batches, PairBatches, PairDataModule
from t2i_lm.data.order import CURRENT, Indices, former_permutation, keyed
from t2i_lm.data.sampler import REPLAYED, Draw
from t2i_lm.data.shards.cache import FORMAT, Prepared, write_once
from t2i_lm.data.shards.format import write_index
from t2i_lm.data.shards.parts import Parts
from t2i_lm.data.shards.tokenize import write_text_split
from t2i_lm.data.text import read_documents
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import document_key
from t2i_lm.tokenizers.layout import Layout


class ReplayBatches(Batches):
    """Batches of pairs and text windows; all sequences have full length."""

    def __init__(self, pairs: PairBatches, windows: datasets.Dataset, seed: int, parts: Parts) -> None:
        """`windows` are the rows of `parts`, text shards, and have the layout's length."""
        self.pairs, self.windows, self.seed, self.parts = pairs, windows, seed, parts

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def part_sizes(self) -> Indices:
        return self.pairs.part_sizes

    @property
    def announce(self) -> Callable[[Indices], None] | None:
        return self.pairs.announce

    def close(self) -> None:
        self.pairs.close()

    def __getitems__(self, draws: list[Draw]) -> Batch:
        replayed_B = torch.tensor([epoch == REPLAYED for epoch, _ in draws])
        length, pad = self.pairs.layout.length, self.pairs.layout.vocab.pad
        ids_BT = torch.full((len(draws), length), pad, dtype=torch.int64)
        if not replayed_B.all():
            pairs_BT = self.pairs.__getitems__([draw for draw in draws if draw[0] != REPLAYED])["ids_BT"]
            ids_BT[~replayed_B, : pairs_BT.shape[1]] = pairs_BT
        if replayed_B.any():
            self.parts.require_unchanged()
            rows = self.windows[[self._window(number) for epoch, number in draws if epoch == REPLAYED]]
            ids_BT[replayed_B] = torch.from_numpy(np.stack(rows["text_ids"]).astype(np.int64))
            self.parts.require_unchanged()
        return {
            "ids_BT": ids_BT,
            "samples": len(draws),
            "tokens_nominal": len(draws) * length,
            "tokens_real": (ids_BT != pad).sum(),
        }

    def _window(self, number: int) -> int:
        """Index of the `number`-th replayed window: one permutation of all windows per epoch."""
        epoch, place = divmod(number, len(self.windows))
        if self.order < CURRENT:
            return int(former_permutation(len(self.windows), self.seed, epoch, 2)[place])
        return keyed(len(self.windows), "replay", self.seed, epoch)[place]


def prepare_replay(config: ExperimentConfig, text: TextTokenizer) -> Path:
    """Token shards of the replayed text, in rows of `data.length` ids; written once, then reused for the same text.

    Raises:
        ValueError: if there is no text or less than one row of it.
    """
    data, path, length = config.data, str(config.data.replay_path), config.data.length
    prepared = Prepared(
        Path(data.cache_dir),
        "replay",
        {"format": FORMAT, "length": length, "tokenizer": text.sha256, **document_key(text)},
        {"data.replay_path": path},
        (data.cache_dir, config.run.dir),
    )

    def write(folder: Path) -> None:
        documents = read_documents(path, "data.replay_path")
        split = write_text_split(folder, "train", documents, text, length - 1, prepared.require_unchanged)
        if not split["rows"]:
            raise ValueError(f"data.replay_path={path}: less text than one row of data.length={length} ids")
        write_index(folder, {"tokenizers": {"text": text.sha256}, "source": "replay", "splits": {"train": split}})

    return prepared.find() or write_once(prepared, write)


class ReplayDataModule(PairDataModule):
    """Caption-image pairs; in training some sequences are replaced by text."""

    def __init__(self, config: ExperimentConfig, folder: Path, layout: Layout, replay: Path) -> None:
        """`replay` is the folder of `prepare_replay`."""
        super().__init__(config, folder, layout)
        self.replay = replay

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert isinstance(self.train_set, PairBatches)
        text = self.open(self.replay, "train")
        self.train_set = ReplayBatches(self.train_set, text.dataset(), self.config.seed, text)
