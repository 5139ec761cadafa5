"""Tar files in the format of img2dataset, intact and damaged."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.data.shards.parts import open_split
from t2i_lm.data.sources import open_source
from t2i_lm.data.tars import find_tars, open_tars
from t2i_lm.prepare import main
from tests.data.tar_file import write_tar

ROOT = Path(__file__).parents[2]
PRETRAINED = str(ROOT / "experiments" / "t2i_pretrained.yaml")


def bitmap(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")  # the same bytes, and so split, with every version of Pillow
    return file.getvalue()


def test_samples_are_read_in_place_and_in_order(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "00000.tar", {f"{n:04}": {".png": bitmap(n), ".txt": f"caption {n}".encode()} for n in range(3)}
    )
    meta = json.dumps({"caption": "from json", "url": "x"}).encode()
    write_tar(tmp_path / "00001.tar", {"a": {".png": bitmap(9), ".json": meta, ".cls": b"7"}})
    source = open_tars(find_tars(tmp_path))
    assert [source[n].captions for n in range(4)] == [["caption 0"], ["caption 1"], ["caption 2"], ["from json"]]
    assert source[3].id == "00001.tar:a"
    assert source[0].image.size == (64, 70)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".tar"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({".txt": b"no image"}, "no image"),
        ({".png": bitmap(0)}, "no caption"),
        ({".png": bitmap(0), ".txt": b"\xff\xfe"}, "unreadable caption"),
        ({".png": bitmap(0), ".json": b"{"}, "unreadable caption"),
        ({".png": bitmap(0), ".txt": b"x" * 1_000_001}, "caption over 1,000,000 bytes"),
        ({".png": b"broken", ".txt": b"x"}, "not an image"),
    ],
)
def test_unusable_samples_are_rejected_with_a_reason(files: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    source = open_tars([write_tar(tmp_path / "x.tar", {"a": files})])
    with pytest.raises(RejectedPairError) as reject:
        source[0]
    assert reject.value.reason == reason


def test_pickles_are_ignored(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    files = {".pkl": pickle.dumps(Bomb()), ".pyd": pickle.dumps(Bomb()), ".png": bitmap(0), ".txt": b"fine"}
    assert open_tars([write_tar(tmp_path / "x.tar", {"a": files})])[0].captions == ["fine"]
    assert not (tmp_path / "ran").exists()


def test_a_truncated_tar_yields_its_complete_samples_and_names_the_damage(tmp_path: Path) -> None:
    samples = {f"{n}": {".png": bitmap(n), ".txt": b"x"} for n in range(5)}
    path = write_tar(tmp_path / "x.tar", samples)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    source = open_tars([path])
    assert "damaged" in source.notes[0]
    assert [source[n].captions for n in range(len(source) - 1)] == [["x"]] * (len(source) - 1)
    assert 1 < len(source) < 5
    with pytest.raises(RejectedPairError, match=r"x\.tar (ends at|after) byte"):
        source[len(source) - 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no tar file in .*it is empty"):
        find_tars(tmp_path / "empty")


Captioned = tuple[bytes, list[str]]


def shards_from_each_source(pairs: dict[str, Captioned], suffix: str, tiny: list[str], root: Path) -> list[Path]:
    """Prepares the pairs as a folder, as tars and as Parquet, asserts that the shards are equal, returns them."""
    (root / "folder").mkdir()
    (root / "tars").mkdir()
    rows = [{"file_name": f"{key}{suffix}", "captions": captions} for key, (_, captions) in pairs.items()]
    for key, (image, _) in pairs.items():
        (root / "folder" / f"{key}{suffix}").write_bytes(image)
    (root / "folder" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    samples = {
        key: {suffix: image, ".json": json.dumps({"captions": captions}).encode()}
        for key, (image, captions) in pairs.items()
    }
    write_tar(root / "tars" / "00000.tar", dict(list(samples.items())[:35]))
    write_tar(root / "tars" / "00001.tar", dict(list(samples.items())[35:]))
    table = {"image": [{"bytes": image, "path": None} for image, _ in pairs.values()]}
    table |= {"captions": [captions for _, captions in pairs.values()]}  # type: ignore[misc]
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(root / "pairs.parquet")
    base = [item for item in tiny if "_size=" not in item or "batch" in item]
    shards = []
    for source, path in (("image_folder", "folder"), ("webdataset", "tars"), ("parquet", "pairs.parquet")):
        cache = root / "cache" / source
        changes = [*base, f"data.source={source}", f"data.path={root / path}", f"data.cache_dir={cache}"]
        assert main([PRETRAINED, *changes]) == 0
        shards.append(next(cache.glob(f"{source}-*/index.json")).parent)
    for split in ("train", "val"):
        first, *others = (open_split(folder, split) for folder in shards)
        for other in others:
            assert other.features == first.features
            for ours, theirs in zip(first, other, strict=True):
                assert (ours["image_ids"] == theirs["image_ids"]).all()
                assert [list(ids) for ids in ours["text_ids"]] == [list(ids) for ids in theirs["text_ids"]]
    return shards


def test_folder_tars_and_parquet_of_the_same_images_give_equal_shards(tiny: list[str], tmp_path: Path) -> None:
    pairs = {f"{n:04}": (bitmap(n), [f"image number {n}"]) for n in range(60)}
    folder = shards_from_each_source(pairs, ".png", tiny, tmp_path)[0]
    assert [len(open_split(folder, split)) for split in ("train", "val")] == [57, 3]
    assert "57 images, 57 captions" in (folder / "README.md").read_text()


def test_photographs_with_five_captions_give_equal_shards_from_all_sources(
    shared: Path, tiny: list[str], tmp_path: Path
) -> None:
    source = shared / "data" / "flickr8k" / "val"
    pairs = {}
    for line in (source / "metadata.jsonl").read_text().splitlines()[:80]:
        row = json.loads(line)
        pairs[Path(row["file_name"]).stem] = ((source / row["file_name"]).read_bytes(), row["captions"])
    folder = shards_from_each_source(pairs, ".jpg", tiny, tmp_path)[0]
    assert {len(texts) for texts in open_split(folder, "train")["text_ids"]} == {5}


def test_a_stream_yields_every_sample_once_and_rejects_a_size(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    for shard in range(2):
        numbers = range(30 * shard, 30 * shard + 30)
        table: dict[str, list[Any]] = {"image": [{"bytes": bitmap(n), "path": None} for n in numbers]}
        table["image"][4] = {"bytes": b"broken", "path": None}
        rows = datasets.Dataset.from_dict(table | {"caption": [f"image {n}" for n in numbers]})
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "pairs" / f"train-{shard}.parquet")
    base = [item for item in tiny if "_size=" not in item or "batch" in item]
    changes = [
        *base,
        "data.source=hub_stream",
        f"data.path={tmp_path}/pairs",
        "data.train_size=null",
        "data.val_size=null",
    ]
    changes.append(f"data.cache_dir={tmp_path}/cache")
    assert main([PRETRAINED, *changes, "data.max_reject_share=0.1"]) == 0
    folder = next((tmp_path / "cache").glob("hub_stream-*/index.json")).parent
    train, val = open_split(folder, "train"), open_split(folder, "val")
    assert len(train) + len(val) == 58
    assert len(val) > 0
    expected = {f"shard {shard} row {n}" for shard in range(2) for n in range(30) if n != 4}
    assert {*train["id"], *val["id"]} == expected
    assert main([PRETRAINED, *changes, "data.train_size=10"]) == 2


def test_a_stream_cannot_train_an_image_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train_size=10: expected null"):
        open_source(DataConfig(source="hub_stream", path=str(tmp_path), train_size=10), "train", 64)


def test_a_twentieth_of_the_images_is_held_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"{n:03}": {".png": bitmap(n % 41), ".txt": b"x"} for n in range(82)})
    data = DataConfig(source="webdataset", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    train, val = (open_source(data, split, 64) for split in ("train", "val"))
    assert (len(train), len(val)) == (78, 4)
    first, second = sorted(int(val[n].id.removeprefix("x.tar:")) for n in range(4))[:2]
    assert {val[n].id for n in range(4)} == {f"x.tar:{n:03}" for n in (first, second, first + 41, second + 41)}
    assert load_experiment(PRETRAINED, "demo", ["data.source=webdataset", "data.path=x"]).data.source == "webdataset"


@pytest.mark.parametrize("damage", ["header", "member boundary", "inside a header"])
def test_every_kind_of_damaged_tar_is_reported(damage: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{n}": {".png": bitmap(n), ".txt": b"x"} for n in range(10)})
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[10].offset
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[middle : middle + 512] = b"\x07" * 512
    path.write_bytes(content if damage == "header" else content[: middle + (100 if damage == "inside a header" else 0)])
    source = open_tars([path])
    assert len(source) < 10
    with pytest.raises(RejectedPairError, match=r"x\.tar .*damaged"):
        source[len(source) - 1]


def test_samples_of_equal_names_in_several_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", {"x": {".png": bitmap(0), ".txt": folder.encode()}})
    tars = open_tars(find_tars(tmp_path))
    assert [(tars[index].id, tars[index].captions) for index in range(2)] == [
        ("a/0.tar:x", ["a"]),
        ("b/0.tar:x", ["b"]),
    ]
    (alone,) = open_tars([tmp_path / "a" / "0.tar"]).samples
    assert alone.name == "0.tar:x"
