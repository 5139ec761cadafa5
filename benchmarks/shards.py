"""Token shards with random ids in the format of `prepare`, and an experiment that reads them.

Shapes: `N` image tokens.
"""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, LogConfig, OptimConfig, TrainerConfig
from t2i_lm.data.datamodules import BatchDataModule
from t2i_lm.data.shards.format import pair_features, part_folder, read_part, write_index, write_part
from t2i_lm.tokenizers.joint_vocab import BOUNDARY_TOKENS

CAPTIONS = 5  # per image, as in COCO
PAD_TO_MULTIPLE_OF = {"paper": 32}  # data.pad_to_multiple_of of scales without the default


def write_random_shards(
    folder: Path, samples: int, image_tokens: int, text_vocab: int, image_codes: int, length: int
) -> None:
    """Splits `train` and `val` (one batch) of `samples` images with captions of random lengths."""
    index: dict[str, Any] = {"tokenizers": {}, "source": "random", "splits": {}}
    longest = length - image_tokens - BOUNDARY_TOKENS
    for number, (split, count) in enumerate((("train", samples), ("val", min(samples, 16)))):

        def rows(number: int = number, count: int = count) -> Iterator[dict[str, Any]]:
            random = np.random.default_rng(number)
            for row in range(count):
                lengths_C = random.integers(1, longest, size=CAPTIONS, endpoint=True)
                yield {
                    "id": str(row),
                    "image_ids": random.integers(image_codes, size=image_tokens).astype(np.uint16),
                    "text_ids": [random.integers(text_vocab, size=size) for size in lengths_C],
                    "meaning": "",
                }

        target = part_folder(folder, split, 0)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_part(target, rows, pair_features(text_vocab, image_tokens, 2**16), dict)
        index["splits"][split] = {"rows": count, "parts": [read_part(target)["sha256"]]}
    write_index(folder, index)


def experiment(
    batch: int,
    length: int,
    steps: int,
    precision: str = "auto",
    logger: str = "none",
    accumulate: int = 1,
    scale: str = "demo",
) -> ExperimentConfig:
    """The demo's settings for `steps` steps of `accumulate` times `batch`, without validation or checkpoint in between.

    `scale` sets how lengths are rounded.
    """
    multiple = PAD_TO_MULTIPLE_OF.get(scale, DataConfig.pad_to_multiple_of)
    return ExperimentConfig(
        name="benchmark",
        data=DataConfig(batch_size=batch * accumulate, length=length, pad_to_multiple_of=multiple),
        optim=OptimConfig(warmup_steps=1),
        trainer=TrainerConfig(
            max_steps=steps,
            val_check_interval=steps,
            checkpoint_interval=steps,
            precision=precision,
            devices=1,
            accumulate_grad_batches=accumulate,
        ),
        log=LogConfig(logger=logger),
    )


def open_alone(data: BatchDataModule) -> None:
    """Sets up a data module without fitting; it requires a Trainer for rank and world size."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.setup("fit")
