import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.pairs import MAX_PIXELS, RejectedPairError, StreamedSource, center_crop, decode_image
from t2i_lm.data.sources import open_source
from tests.data.tar_file import write_tar


def make_image(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_unusable_images_are_rejected_with_a_reason(tmp_path: Path) -> None:
    whole = encoded(make_image(size=(200, 200)), "JPEG").getvalue()
    cases = {"truncated or corrupt": io.BytesIO(whole[: len(whole) // 2]), "not an image": io.BytesIO(b"hello")}
    for reason, file in cases.items():
        with pytest.raises(RejectedPairError, match=reason):
            decode_image(file, "x")
    with pytest.raises(RejectedPairError, match="missing file"):
        decode_image(tmp_path / "absent.jpg", "x")


def test_a_huge_image_is_rejected_before_decoding() -> None:
    side = int(MAX_PIXELS**0.5) + 10
    file = encoded(Image.new("1", (side, side)), "PNG")
    with pytest.raises(RejectedPairError, match="pixels"):
        decode_image(file, "bomb")


def test_the_crop_is_central_and_square() -> None:
    pixels = np.zeros((30, 90, 3), dtype=np.uint8)
    pixels[:, 30:60] = 255
    assert center_crop(Image.fromarray(pixels), 16).mean() > 250
    assert center_crop(Image.new("RGB", (1, 1)), 16).shape == (16, 16, 3)
    same = make_image(size=(16, 16))
    assert np.array_equal(center_crop(same, 16), np.asarray(same))


def write_pairs(folder: Path, source: str, captions: list[str]) -> None:
    """Writes one image per caption in the format of a source."""
    folder.mkdir()
    images = [encoded(make_image(number), "JPEG").getvalue() for number in range(len(captions))]
    if source == "parquet":
        cells = [{"bytes": image, "path": None} for image in images]
        datasets.Dataset.from_dict({"image": cells, "caption": captions}).to_parquet(str(folder / "part.parquet"))
    elif source == "webdataset":
        pairs = zip(images, captions, strict=True)
        samples = {f"{n:05}": {".jpg": image, ".txt": text.encode()} for n, (image, text) in enumerate(pairs)}
        write_tar(folder / "00000.tar", samples)
    else:
        rows = []
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            (folder / f"{number}.jpg").write_bytes(image)
            rows.append(json.dumps({"file_name": f"{number}.jpg", "captions": [caption]}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for number in range(40):
        make_image(number).save(tmp_path / f"{number}.jpg")
        rows.append({"file_name": f"{number}.jpg", "captions": [f"caption {number}", "another"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_a_folder_without_splits_holds_out_a_twentieth_of_its_images(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(source="image_folder", path=str(folder), cache_dir=str(tmp_path / "cache"))
    train, val = (open_source(data, split, 16) for split in ("train", "val"))
    assert (len(train), len(val)) == (38, 2)
    assert all(val[i].captions == [f"caption {val[i].id.removesuffix('.jpg')}", "another"] for i in range(2))
    assert not {train[i].id for i in range(38)} & {val[i].id for i in range(2)}


@pytest.mark.parametrize("source", ["image_folder", "parquet", "webdataset", "hub", "hub_stream"])
def test_rows_with_one_image_are_on_one_side_in_any_order(source: str, tmp_path: Path) -> None:
    sides = []
    for name, order in (("forward", 1), ("backward", -1)):
        captions = [f"image {number} {which}" for number in range(40) for which in range(3)][::order]
        write_rows(tmp_path / name, source, [(int(caption.split()[1]), caption) for caption in captions])
        data = DataConfig(source=source, path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        parts = {split: captions_in(open_source(data, split, 16)) for split in ("train", "val")}
        assert sorted(parts["train"] + parts["val"]) == sorted(captions)
        images = {split: {caption.split()[1] for caption in found} for split, found in parts.items()}
        assert not images["train"] & images["val"]
        assert len(images["val"]) == 2 or source == "hub_stream"
        sides.append(images)
    assert sides[0] == sides[1]


def captions_in(source: Any) -> list[str]:
    if isinstance(source, StreamedSource):
        return [
            caption for shard in range(source.shards) for read in source.shard(shard) for caption in read().captions
        ]
    return [caption for index in range(len(source)) for caption in source[index].captions]


def write_rows(folder: Path, source: str, rows: list[tuple[int, str]]) -> None:
    """Writes one row per caption, with the image of its seed."""
    folder.mkdir()
    images = {seed: encoded(make_image(seed), "PNG").getvalue() for seed, _ in rows}
    if source == "image_folder":
        for seed, content in images.items():
            (folder / f"{seed}.png").write_bytes(content)
        lines = [json.dumps({"file_name": f"{seed}.png", "text": caption}) for seed, caption in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    elif source == "webdataset":
        samples = {f"{n:05}": {".png": images[seed], ".txt": text.encode()} for n, (seed, text) in enumerate(rows)}
        write_tar(folder / "0.tar", samples)
    else:
        cells = [{"bytes": images[seed], "path": None} for seed, _ in rows]
        table = datasets.Dataset.from_dict({"image": cells, "caption": [caption for _, caption in rows]})
        table.cast_column("image", datasets.Image()).to_parquet(str(folder / "part.parquet"))


@pytest.mark.parametrize("source", ["image_folder", "parquet", "webdataset"])
def test_validation_images_are_read_from_the_val_folder_or_val_path(source: str, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        write_pairs(tmp_path / split, source, [f"{split} {number}" for number in range(count)])
    beside = DataConfig(source=source, path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    named = replace(beside, path=str(tmp_path / "train"), val_path=str(tmp_path / "val"))
    for data in (beside, named):
        train, val = (open_source(data, split, 16) for split in ("train", "val"))
        assert [train[i].captions for i in range(len(train))] == [["train 0"], ["train 1"], ["train 2"]]
        assert [val[i].captions for i in range(len(val))] == [["val 0"], ["val 1"]]
    second = open_source(replace(beside, second_val_path=str(tmp_path / "train")), "val/second", 16)
    assert [second[i].captions for i in range(len(second))] == [["train 0"], ["train 1"], ["train 2"]]
    absent = replace(named, val_path=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"data\.val_path=.*absent"):
        open_source(absent, "val", 16)


def test_sources_without_val_path_reject_one() -> None:
    with pytest.raises(ValueError, match=r"data\.val_path='x': expected null where data\.source=hub"):
        DataConfig(source="hub", path="a/b", val_path="x")
    for source in ("text", "hub", "scenes", "plugin:mine"):
        with pytest.raises(ValueError, match=rf"data\.second_val_path='x': expected null where data\.source={source}"):
            DataConfig(source=source, path="a", second_val_path="x")


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        open_source(DataConfig(source="image_folder", path=str(tmp_path)), "train", 16)


def test_a_bad_metadata_line_is_named(folder: Path) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + '\n{"captions": ["x"]}')
    source = open_source(DataConfig(source="image_folder", path=str(folder)), "train", 16)
    with pytest.raises(RejectedPairError, match=r"line 41 \(it has captions\): no image name"):
        source[len(source) - 1]


def test_parquet_reads_images_and_captions(folder: Path, tmp_path: Path) -> None:
    images = [{"bytes": (folder / f"{i}.jpg").read_bytes(), "path": None} for i in range(40)]
    table = datasets.Dataset.from_dict({"image": images, "caption": [f"c{i}" for i in range(40)]})
    out = tmp_path / "parquet"
    out.mkdir()
    table.to_parquet(str(out / "part.parquet"))
    data = DataConfig(source="parquet", path=str(out), cache_dir=str(tmp_path / "cache"))
    source = open_source(data, "val", 16)
    assert len(source) == 2
    assert source[1].captions == [f"c{source[1].id.removeprefix('row ')}"]
    assert source[1].image.size == (40, 30)


def test_parquet_without_known_columns_lists_its_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"pixels": [1], "words": ["x"]}).to_parquet(str(tmp_path / "x.parquet"))
    data = DataConfig(source="parquet", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no column image or .*; it has pixels \(int64\), words \(string\)"):
        open_source(data, "train", 16)


def test_flickr8k_has_all_images_with_five_captions(shared: Path) -> None:
    data = DataConfig(source="image_folder", path=str(shared / "data" / "flickr8k"))
    train, val = (open_source(data, split, 128) for split in ("train", "val"))
    assert len(train) + len(val) == 8091
    assert len(val[0].captions) == 5
    assert center_crop(val[0].image, 128).shape == (128, 128, 3)
