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
from t2i_lm.data.pairs import MAX_PIXELS, RejectedPairError, center_crop, decode_image
from t2i_lm.data.sources import open_source
from tests.data.tar_file import write_tar


def make_image(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG")]
)
def test_every_common_mode_is_converted_to_rgb(mode: str, kind: str) -> None:
    image = Image.new("I;16", (40, 30)) if mode == "I;16" else make_image(mode)
    assert decode_image(encoded(image, kind), "x").mode == "RGB"


def test_16_bit_gray_keeps_its_brightness() -> None:
    gray = Image.fromarray(np.full((4, 4), 32_896, dtype=np.uint16))
    assert np.asarray(decode_image(encoded(gray, "PNG"), "x"))[0, 0].tolist() == [128, 128, 128]


def test_exif_rotation_is_applied_and_animations_give_their_first_frame() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(make_image(), "JPEG", exif=exif), "x").size == (30, 40)
    frames = encoded(make_image(), "GIF", save_all=True, append_images=[make_image("L")])
    assert decode_image(frames, "x").size == (40, 30)


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
    images = [encoded(make_image(), "JPEG").getvalue() for _ in captions]
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
        make_image().save(tmp_path / f"{number}.jpg")
        rows.append({"file_name": f"{number}.jpg", "captions": [f"caption {number}", "another"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_a_folder_without_splits_holds_out_every_20th_image(folder: Path) -> None:
    data = DataConfig(source="image_folder", path=str(folder))
    train, val = (open_source(data, split, 16) for split in ("train", "val"))
    assert (len(train), len(val)) == (38, 2)
    assert val[1].captions == ["caption 20", "another"]
    assert not {train[i].id for i in range(38)} & {val[i].id for i in range(2)}


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
    absent = replace(named, val_path=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"data\.val_path=.*absent"):
        open_source(absent, "val", 16)


def test_sources_without_val_path_reject_one() -> None:
    with pytest.raises(ValueError, match=r"data\.val_path='x': expected null where data\.source=hub"):
        DataConfig(source="hub", path="a/b", val_path="x")


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        open_source(DataConfig(source="image_folder", path=str(tmp_path)), "train", 16)


def test_a_bad_metadata_line_is_named(folder: Path) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + '\n{"captions": ["x"]}')
    with pytest.raises(ValueError, match="line 41"):
        open_source(DataConfig(source="image_folder", path=str(folder)), "train", 16)


def test_parquet_reads_images_and_captions(folder: Path, tmp_path: Path) -> None:
    images = [{"bytes": (folder / f"{i}.jpg").read_bytes(), "path": None} for i in range(40)]
    table = datasets.Dataset.from_dict({"image": images, "caption": [f"c{i}" for i in range(40)]})
    out = tmp_path / "parquet"
    out.mkdir()
    table.to_parquet(str(out / "part.parquet"))
    data = DataConfig(source="parquet", path=str(out), cache_dir=str(tmp_path / "cache"))
    source = open_source(data, "val", 16)
    assert len(source) == 2
    assert source[1].captions == ["c20"]
    assert source[1].image.size == (40, 30)


def test_parquet_without_known_columns_lists_its_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"pixels": [1], "words": ["x"]}).to_parquet(str(tmp_path / "x.parquet"))
    data = DataConfig(source="parquet", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="pixels, words"):
        open_source(data, "train", 16)


def test_flickr8k_has_all_images_with_five_captions(shared: Path) -> None:
    data = DataConfig(source="image_folder", path=str(shared / "data" / "flickr8k"))
    train, val = (open_source(data, split, 128) for split in ("train", "val"))
    assert len(train) + len(val) == 8091
    assert len(val[0].captions) == 5
    assert center_crop(val[0].image, 128).shape == (128, 128, 3)
