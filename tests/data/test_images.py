"""Images for the training of an image tokenizer: their number, and those that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_lm.config.load import load_experiment
from t2i_lm.data.images import ImageDataModule
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.train import main
from tests.training.test_pretraining import SMALL_VQ, VQ


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of 40 captioned training images and 16 validation ones."""
    random = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 16)):
        place = tmp_path / "photos" / split
        place.mkdir(parents=True)
        for index in range(number):
            Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(place / f"{index:02}.png")
        rows = [{"file_name": f"{index:02}.png", "captions": [f"image {index}"]} for index in range(number)]
        (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "photos"


def settings(folder: Path, *more: str) -> list[str]:
    short = ("trainer.max_steps=8", "trainer.val_check_interval=4", "trainer.checkpoint_interval=4")
    sizes = ("data.train_size=null", "data.val_size=null")
    own = (f"data.path={folder}", f"run.dir={folder.parent}/runs", f"data.cache_dir={folder.parent}/cache")
    return [VQ, *SMALL_VQ, "data.source=image_folder", *own, *short, *sizes, *more]


@pytest.mark.parametrize(("given", "found"), [((5, 3), (5, 3)), (("null", "null"), (40, 16)), ((50, 20), (40, 16))])
def test_train_and_val_size_are_of_stored_images_too(
    given: tuple[object, object], found: tuple[int, int], folder: Path
) -> None:
    experiment, *overrides = settings(folder, f"data.train_size={given[0]}", f"data.val_size={given[1]}")
    data = ImageDataModule(load_experiment(Path(experiment), "demo", overrides))
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == found


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_images_are_counted_and_too_many_end_the_run(
    workers: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/03.png", "train/17.png", "val/02.png"):
        (folder / name).write_bytes(b"no image")
    command = settings(folder, f"data.workers={workers}")
    assert main([*command, "data.max_reject_share=0.1"]) == 0
    error = capsys.readouterr().err
    assert "2 of 40 train samples cannot be used: 2 not an image (first: " in error
    assert "1 of 16 val samples cannot be used: 1 not an image (first: " in error
    assert "/train/03.png" in error
    run = read_run(run_folders(folder.parent / "runs")[-1])
    assert all(entry["val"]["psnr"] > 0 for entry in run.validations())
    (run.folder / "report.json").unlink()
    for path in sorted((run.folder / "checkpoints").glob("*"))[-2:]:  # the last checkpoint and its digest
        path.unlink()
    (folder / "train" / "39.png").unlink()
    table = folder / "train" / "metadata.jsonl"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    assert main([VQ, "--resume", str(run.folder)]) == 2
    assert "was started on 40 training images, now there are 39" in capsys.readouterr().err
    assert main([*command, "data.max_reject_share=0.03"]) == 2
    error = capsys.readouterr().err
    assert "cannot be used: " in error
    assert "data.max_reject_share=0.03 allows fewer. Raise it, or repair the samples" in error
