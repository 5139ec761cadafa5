"""What reads each kind of file, as a command would."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import BackboneConfig, DataConfig


def read_image(path: Path) -> None:
    from t2i_lm.data.pairs import RejectedPairError, center_crop, decode_image

    try:
        center_crop(decode_image(str(path), str(path)), 256)
    except RejectedPairError as error:
        raise ValueError(str(error)) from None


def read_source(kind: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        from t2i_lm.data.pairs import RejectedPairError
        from t2i_lm.data.sources import open_source, print_notes

        folder = path if path.is_dir() else path.parent
        data = DataConfig(source=kind, path=str(path), cache_dir=str(folder / "cache"))
        source = open_source(data, "train", 16)
        print_notes(source)
        for number in range(len(source)):
            try:
                source[number]
            except RejectedPairError as error:
                print(f"reject: {error}")

    return read


def read_text(path: Path) -> None:
    from t2i_lm.data.text import read_documents

    list(read_documents(str(path)))


def read_plan(path: Path) -> None:
    from t2i_lm.comparison.study_plan import read_study

    read_study(path)


def read_run_folder(path: Path) -> None:
    from t2i_lm.config.load import load_run
    from t2i_lm.storage.run_folder import read_run, require_no_links

    require_no_links(path)
    read_run(path)
    load_run(path)


def read_checkpoint(path: Path) -> None:
    from t2i_lm.experiment.restore import _load_weights, newest_checkpoint

    _load_weights(torch.nn.Linear(2, 2), newest_checkpoint(path))


def read_text_tokenizer(path: Path) -> None:
    from t2i_lm.tokenizers.text import open_text_tokenizer

    text = open_text_tokenizer(path)
    text.encode_batch(["a cat " * 1000, "aaaa" * 1000])


def read_image_tokenizer(path: Path) -> None:
    from t2i_lm.tokenizers.image import open_image_tokenizer

    open_image_tokenizer(path, 32).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def read_backbone(path: Path) -> None:
    from t2i_lm.models.factory import pretrained_backbone

    config = ExperimentConfig()
    pretrained_backbone(replace(config, backbone=BackboneConfig(path=str(path)), data=replace(config.data, length=8)))


def read_inception(path: Path) -> None:
    from callbacks.metrics.inception import Inception

    Inception(path, 64)


def read_coco(path: Path) -> None:
    from t2i_lm.data.coco import read_coco as read
    from t2i_lm.data.coco import read_images

    coco = read(path)
    read_images(coco, coco.images)
