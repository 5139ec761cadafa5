"""Tar files as people write them: keys, orders, joined archives, several files of a kind, what is not read."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.data.sources import open_source
from t2i_lm.data.tars import TarFolder, find_tars, open_tars, scan_tar

Members = list[tuple[str, bytes]]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


PNG = [png(number) for number in range(6)]


def tar_bytes(members: Members) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def opened(folder: Path, *archives: Members) -> TarFolder:
    (folder / "0.tar").write_bytes(b"".join(map(tar_bytes, archives)))
    return open_tars(find_tars(folder))


def captions(source: TarFolder) -> dict[str, list[str]]:
    return {source[index].id: source[index].captions for index in range(len(source))}


def member_json(value: Any) -> bytes:
    return json.dumps(value).encode()


LAYOUTS: dict[str, Any] = {
    "beside each other": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.txt", b"%d" % n)],
    "caption first": lambda n: [(f"{n}.txt", b"%d" % n), (f"{n}.png", PNG[n])],
    "upper case": lambda n: [(f"{n}.PNG", PNG[n]), (f"{n}.TXT", b"%d" % n)],
    "dotted suffixes": lambda n: [(f"{n}.input.png", PNG[n]), (f"{n}.output.txt", b"%d" % n)],
    "another dotted file": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.meta.json", b"{}"), (f"{n}.txt", b"%d" % n)],
    "a dotted image": lambda n: [(f"{n}.seg.png", b"no"), (f"{n}.png", PNG[n]), (f"{n}.txt", b"%d" % n)],
    "folders": lambda n: [(f"a.b/{n}/image.png", PNG[n]), (f"a.b/{n}/image.txt", b"%d" % n)],
    "below a dot": lambda n: [(f"./{n}.png", PNG[n]), (f"{n}.txt", b"%d" % n)],
    "class labels": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.cls", b"3"), (f"{n}.txt", b"%d" % n)],
    "json caption": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.json", member_json({"caption": str(n), "url": "x"}))],
    "json text": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.json", member_json({"TEXT": str(n)}))],
    "json captions": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.json", member_json({"captions": [str(n)]}))],
    "blank text beside json": lambda n: [
        (f"{n}.png", PNG[n]),
        (f"{n}.txt", b" \n"),
        (f"{n}.json", member_json({"caption": str(n)})),
    ],
    "byte order mark": lambda n: [(f"{n}.png", PNG[n]), (f"{n}.txt", b"\xef\xbb\xbf%d\r\n" % n)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_every_pair_whatever_the_order_of_files(layout: str, tmp_path: Path) -> None:
    members = [member for n in range(3) for member in LAYOUTS[layout](n)]
    found = [list(captions(opened(tmp_path, members)).values())]
    by_kind = sorted(members, key=lambda member: member[0].rpartition(".")[2].lower())
    found.append(sorted(captions(opened(tmp_path, by_kind)).values()))
    assert found == [[["0"], ["1"], ["2"]]] * 2


@settings(deadline=None)
@given(order=st.permutations(range(8)), cut=st.integers(0, 8))
def test_files_are_joined_by_key_within_an_archive_alone(
    order: list[int], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tars")
    members = [member for n in range(4) for member in LAYOUTS["beside each other"](n)]
    shuffled = [members[number] for number in order]
    assert sorted(captions(opened(folder, shuffled)).values()) == [["0"], ["1"], ["2"], ["3"]]
    joined = opened(folder, shuffled[:cut], shuffled[cut:])
    assert len(joined) == len({name[0] for name, _ in shuffled[:cut]}) + len({name[0] for name, _ in shuffled[cut:]})


def test_joined_archives_are_read_to_the_end_with_equal_keys_kept_apart(tmp_path: Path) -> None:
    first, second = ([(f"{n}.png", PNG[n + k]), (f"{n}.txt", b"%d" % (n + k))] for n, k in ((0, 0), (0, 3)))
    source = opened(tmp_path, first, second, first)
    assert captions(source) == {"0.tar:0": ["0"], "0.tar:1/0": ["3"], "0.tar:2/0": ["0"]}
    assert not source.notes


def test_keys_that_are_not_utf_8_give_ids_that_are(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (("\xe9.png", PNG[0]), ("\xe9.txt", b"a")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert captions(open_tars([tmp_path / "0.tar"])) == {"0.tar:\\udce9": ["a"]}


def test_bytes_after_the_archive_that_are_no_tar_are_told(tmp_path: Path) -> None:
    content = tar_bytes(LAYOUTS["beside each other"](0))
    (tmp_path / "0.tar").write_bytes(content + b"\1" * 700)
    source = open_tars([tmp_path / "0.tar"])
    assert len(source) == 1
    assert f"the last 700 of {len(content) + 700:,} bytes are no tar and not used" in source.notes[0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.png", PNG[0]), ("0.jpg", PNG[1]), ("0.txt", b"a")], r"0\.tar:0 \(\.png, \.jpg\): several images"),
        ([("0.a.png", PNG[0]), ("0.b.png", PNG[1]), ("0.txt", b"a")], r"several images"),
        ([("0.png", PNG[0]), ("0.txt", b"a"), ("0.caption", b"b")], r"several captions"),
        ([("0.png", PNG[0]), ("0.txt", b"a"), ("0.txt", b"b")], r"0\.tar:0\.txt: member occurs twice"),
        ([("0.png", PNG[0])], r"0\.tar:0 \(it has \.png\): no caption"),
        ([("0.txt", b"a")], r"0\.tar:0 \(it has \.txt\): no image"),
        ([("0.png", PNG[0]), ("0.txt", b"")], r"0\.tar:0\.txt: no caption"),
        ([("0.png", PNG[0]), ("0.json", b'{"url": 1}')], r"0\.tar:0\.json \(it has url\): no caption"),
        (
            [("0.png", PNG[0]), ("0.json", b'{"caption": {"en": "a"}}')],
            r"0\.tar:0\.json \(keys en\): caption is an object",
        ),
        ([("0.png", PNG[0]), ("0.json", b'{"caption": NaN}')], r"0\.tar:0\.json: caption is NaN"),
        ([("0.png", PNG[0]), ("0.json", b'{"caption": null}')], r"0\.tar:0\.json: caption is null"),
        ([("0.png", PNG[0]), ("0.json", b'{"caption": "a", "caption": "b"}')], r"given more than once"),
        ([("0.png", PNG[0]), ("0.json", b'["a"]')], r"expected a JSON object, not .*: unreadable caption"),
        ([("0.png", PNG[0]), ("0.json", b"[" * 100_000)], r"nested too deeply\): unreadable caption"),
        ([("0.png", PNG[0]), ("0.json", b'{"caption": %s}' % (b"1" * 5000))], r"digits.*: unreadable caption"),
        ([("0.png", PNG[0]), ("0.txt", "a".encode("utf-16"))], r"0\.tar:0\.txt \(not UTF-8.*unreadable caption"),
    ],
)
def test_a_sample_that_is_not_understood_is_a_reject_that_lists_its_files(
    members: Members, reason: str, tmp_path: Path
) -> None:
    source = opened(tmp_path, members)
    assert len(source) == 1
    with pytest.raises(RejectedPairError, match=reason):
        source[0]


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path: Path) -> None:
    members = [member for layout in ("class labels", "a dotted image") for member in LAYOUTS[layout](0)]
    source = opened(tmp_path, [*members[:3], ("._0.png", b"x"), ("README", b"x")], members[3:])
    assert source.notes == [
        "files in tars that are not read: 2 links or files without a key or suffix, 1 .cls, 1 .seg.png"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.tar", gzip.compress(tar_bytes([]), mtime=0), r"0\.tar is compressed \(gzip\).*decompress it first"),
        ("0.tar.gz", b"", r"0\.tar\.gz is compressed"),
        ("0.tgz", b"", r"0\.tgz is compressed"),
        ("0.tar", b"<!DOCTYPE html>" + b" " * 600, r"0\.tar is no tar file: .*<!DOCTYPE html>"),
        ("0.tar", b"", r"0\.tar is no tar file"),
        ("0.tar", b"version https://git-lfs.github.com/spec/v1\n", r"0\.tar is no tar file: .*git-lfs"),
        ("0.tar", tar_bytes([]), r"no sample has an image .* and a caption .*files found: none"),
        ("0.tar", tar_bytes([("0.mp4", b"x"), ("0.srt", b"x")]), r"files found: none; .*1 \.mp4, 1 \.srt"),
        ("0.tar", tar_bytes([("0.png", b"x"), ("1.txt", b"x")]), r"files found: 1 \.png, 1 \.txt"),
        ("0.zip", b"x", r"no tar file in .*it holds 0\.zip"),
    ],
)
def test_files_that_are_no_tars_of_pairs_are_refused_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_source(DataConfig(source="webdataset", path=str(tmp_path)), "train", 16)
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(data=st.data())
def test_no_damage_ends_in_another_error_or_loses_samples_in_silence(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(tar_bytes([member for n in range(4) for member in LAYOUTS["beside each other"](n)]))
    start = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "zeros", "noise"]))
    if kind == "cut":
        del content[start:]
    else:
        length = min(data.draw(st.integers(1, 1500)), len(content) - start)
        content[start : start + length] = (b"\0" if kind == "zeros" else b"\xa5") * length
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    path.write_bytes(content)
    try:
        scan = scan_tar(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    whole = [sample for sample in scan.samples if set(sample.files) == {".png", ".txt"}]
    assert len(whole) >= 4 or scan.notes or scan.ignored or len(scan.samples) > len(whole)


def test_tars_named_after_splits_are_kept_apart(tmp_path: Path) -> None:
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        members = [member for n in numbers for member in LAYOUTS["beside each other"](n)]
        (tmp_path / f"{split}-000.tar").write_bytes(tar_bytes(members))
    data = DataConfig(source="webdataset", path=str(tmp_path))
    train, val = (open_source(data, split, 16) for split in ("train", "val"))
    assert captions(train) == {"train-000.tar:0": ["0"], "train-000.tar:1": ["1"]}
    assert captions(val) == {"val-000.tar:2": ["2"]}
    assert "left out: test data (test-000.tar)" in train.notes[0]
