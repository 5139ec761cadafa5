"""Images of one's own with a second held-out set, data.second_val_path."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_lm.data.shards.format import read_index
from t2i_lm.report import main as report
from t2i_lm.storage.run_folder import Run
from t2i_lm.train import main
from tests.runs import PRETRAINED, SCRATCH, train


def write_images(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    rows = []
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        rows.append(json.dumps({"file_name": f"{seed}.png", "captions": ["a red circle.", "a ring."]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def changes(tiny: list[str], tmp_path: Path) -> list[str]:
    """A tiny run on 24 images; the held-out sets are `near` and `far`, of 9 and 7."""
    images = write_images(tmp_path / "images", range(24))
    write_images(tmp_path / "near", range(100, 109))
    write_images(tmp_path / "far", range(200, 207))
    kept = [item for item in tiny if not item.startswith(("data.train_size", "data.val_size", "samples."))]
    paths = ["data.source=image_folder", f"data.path={images}", f"data.cache_dir={tmp_path}/cache"]
    sizes = ["data.train_size=null", "data.val_size=null", "data.max_recurring_share=0"]
    return [*kept, *paths, *sizes, "samples.prompts=2", "trainer.max_steps=4"]


def last_image_loss(run: Run, split: str | None = None) -> float:
    return float(run.validations(split)[-1]["val"]["image"]["nll"])


@pytest.mark.slow
def test_both_sets_are_measured_and_neither_changes_the_other(changes: list[str], tmp_path: Path) -> None:
    near, far = (f"{tmp_path}/{name}" for name in ("near", "far"))
    both = [*changes, f"data.val_path={near}", f"data.second_val_path={far}"]
    run = train(PRETRAINED, tmp_path / "runs", *both)
    assert run.validation_splits == ("first", "second")
    counts = run.environment["data"]
    assert (counts["val/first"]["rows"], counts["val/second"]["rows"]) == (9, 7)
    assert counts["recurring_images"] == {"val/first": 0, "val/second": 0}
    for split, folder in (("first", near), ("second", far)):
        alone = train(PRETRAINED, tmp_path / split, *changes, f"data.val_path={folder}")
        assert [line["train"] for line in alone.records("train")] == [line["train"] for line in run.records("train")]
        assert last_image_loss(alone) == last_image_loss(run, split)
    assert last_image_loss(run, "first") != last_image_loss(run, "second")
    assert {"val/first", "val/second"} <= (run.report or {}).keys()
    assert {path.name for path in (run.folder / "samples").glob("originals*")} == {
        "originals.png",
        "originals_second.png",
    }

    train(SCRATCH, tmp_path / "runs", *both)
    assert report(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "held-out image loss (the second held-out set)" in page
    assert "first, the first held-out set (filled); second, the second held-out set (hollow)" in page
    assert page.index("The first held-out set") < page.index("The second held-out set")  # samples


def test_an_image_that_is_trained_on_is_named_in_either_set(
    changes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near, trained = f"{tmp_path}/near", write_images(tmp_path / "trained", range(20, 26))
    pair = {"data.val_path": near, "data.second_val_path": str(trained)}
    arguments = [*changes, *(f"{key}={path}" for key, path in pair.items()), f"run.dir={tmp_path}/runs"]
    assert main([PRETRAINED, *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(r"4 of 6 images of val/second have the ids of a training image", said), said
    index = read_index(next((tmp_path / "cache").glob("image_folder-*/index.json")).parent)
    assert index is not None
    assert index["recurring"]["val/first"]["images"] == 0
