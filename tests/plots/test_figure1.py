"""Figure 1 and the originals of a run's samples."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_lm.config.load import load_run
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.shards.parts import open_split
from t2i_lm.evaluation.originals import originals
from t2i_lm.experiment.build import prepare
from t2i_lm.generation.grid import grid_cells
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.plots.figure1 import TokenizedImage, _decibels, newest_run, tokenized_images
from t2i_lm.storage.run_folder import THINNED, TOKENS, Run
from tests.plots.synthetic_runs import write_run, write_tokens


def test_figure_1_shows_images_their_ids_and_the_expanded_matrices(pretrained: Run) -> None:
    images, vocab, width = tokenized_images(pretrained)
    split = open_split(prepare(load_run(pretrained.folder), 0), "val/iid")
    for image, ids in zip(images, split[:2]["image_ids"], strict=True):
        assert image.ids_hw.ravel().tolist() == list(ids)  # as the run was trained on
        assert image.original_HW3.shape == image.reconstruction_HW3.shape == (64, 64, 3)
        assert 0 < image.psnr < 60
    assert (vocab.text_size, vocab.image_size, width) == (512, 32, 32)
    rendered = FIGURES["1"](Request(pretrained.folder.parents[1], pretrained=pretrained.folder))
    words = " ".join(text.get_text() for axes in rendered.figure.axes for text in axes.texts)
    for part in ("512\ntext rows", "7 special rows", "32\nimage rows", f"{512 + 7 + 32:,} x 32"):
        assert part in words
    assert images[0].caption in rendered.caption


def test_a_dollar_in_a_caption_begins_no_formula(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_pretrained")
    write_tokens(folder)
    with np.load(folder / TOKENS) as stored:
        arrays = {**stored, "captions": np.array(["a coin of $1__2$", "a note of $5"])}
    np.savez(folder / TOKENS, **arrays)
    rendered = FIGURES["1"](Request(tmp_path))
    assert "$1__2$" in rendered.caption
    assert rendered.save(tmp_path / "figure1")


def test_figure_1_needs_one_run(tmp_path: Path) -> None:
    assert newest_run(tmp_path) is None
    with pytest.raises(ValueError, match=r"has no samples/tokens.npz; to make it: .* --report"):
        tokenized_images(Run(tmp_path, {}, {}, [], None))
    (tmp_path / THINNED).touch()
    with pytest.raises(ValueError, match="lack it; collect the run again with --images"):
        tokenized_images(Run(tmp_path, {}, {}, [], None))
    with pytest.raises(ValueError, match="make exp-pretrained"):
        FIGURES["1"](Request(tmp_path))


FILES = ("originals", "reconstructions")


def test_originals_of_scenes_are_the_rendered_scenes(pretrained: Run) -> None:
    config = load_run(pretrained.folder)
    rows = open_split(prepare(config, 0), "val/compositional")[:3]
    source = SceneSource(3, "compositional", config.data.seed)
    for index, image in enumerate(originals(config, "val/compositional", rows, 64)):
        assert np.array_equal(image, np.asarray(source[index].image))


@pytest.mark.parametrize(("suffix", "split"), [("", "iid"), ("_compositional", "compositional")])
def test_originals_png_holds_originals_and_the_other_file_what_the_tokenizer_makes_of_them(
    suffix: str, split: str, pretrained: Run
) -> None:
    folder = pretrained.folder / "samples"
    source = SceneSource(100, split, load_run(pretrained.folder).data.seed)
    originals_png, reconstructions = (grid_cells(folder / f"{name}{suffix}.png") for name in FILES)
    assert len(originals_png) == len(reconstructions) >= 2
    for index, (original, other) in enumerate(zip(originals_png, reconstructions, strict=True)):
        expected = np.asarray(source[index].image)
        assert original.caption == other.caption == source.caption(index)
        drawn, decoded = (np.asarray(one.image.resize((64, 64), Image.Resampling.NEAREST)) for one in (original, other))
        assert np.array_equal(drawn, expected)
        assert not np.array_equal(decoded, expected)


def test_originals_of_a_folder_are_found_by_id_and_a_lost_one_is_named(pretrained: Run, tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (80, 64), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = (json.dumps({"file_name": f"{number}.png", "captions": ["an image"]}) for number in range(6))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    config = load_run(pretrained.folder)
    folder = replace(config, data=replace(config.data, source="image_folder", path=str(tmp_path), train_size=None))
    rows: dict[str, Any] = {"id": ["4.png", "1.png"]}
    found = originals(folder, "train", rows, 64)
    assert [int(image[0, 0, 0]) for image in found] == [160, 40]
    (tmp_path / "4.png").unlink()
    with pytest.raises(ValueError, match=r"the original of 4\.png is not among"):
        originals(folder, "train", rows, 64)


def test_an_exact_reconstruction_has_no_number_of_decibels() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    assert TokenizedImage(image, image[:, :, 0], image, "a").psnr == math.inf
    assert (_decibels(math.inf, 1), _decibels(26.04, 1)) == ("exact", "26.0 dB")
