"""Prepared data is reused for the content it was made from, and for no other."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from t2i_lm.assets import find
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import DataConfig, TextTokenizerConfig
from t2i_lm.data.identity import content_of
from t2i_lm.data.replay import prepare_replay
from t2i_lm.data.scenes.version import SCENES_FORMAT
from t2i_lm.data.shards.cache import KEY, Prepared, shards_of
from t2i_lm.data.shards.format import read_index, write_index
from t2i_lm.data.shards.held_out import require_other_dataset
from t2i_lm.data.shards.parts import open_split
from t2i_lm.data.shards.prepare import prepare_pairs, prepare_text
from t2i_lm.data.shards.tokenize import text_rows
from t2i_lm.tokenizers.text import open_text_tokenizer
from tests.data.shards.test_rejects import Codes, Letters
from tests.runs import PRETRAINED

ASSET = "asset:lm_rotary/text_tokenizer.model"


def text_config(folder: Path, tokenizer: str | None = ASSET) -> ExperimentConfig:
    data = DataConfig(
        source="text",
        path=str(folder / "books"),
        val_path=str(folder / "heldout.txt"),
        replay_path=str(folder / "books"),
        cache_dir=str(folder / "cache"),
        length=8,
    )
    settings = TextTokenizerConfig(path=tokenizer, vocab_size=300)
    return ExperimentConfig(task="text", init="random", data=data, text_tokenizer=settings)


def write_texts(folder: Path, word: str) -> None:
    (folder / "books").mkdir(exist_ok=True)
    for file, kind in ((folder / "books" / "one.txt", "long"), (folder / "heldout.txt", "short")):
        file.write_text("\f".join(f"{word} number {n} of a {kind} story" for n in range(60)))


def trained_tokenizer(config: ExperimentConfig) -> str:
    return prepare_text(text_config(Path(config.data.cache_dir).parent, None))[1].path.name


PREPARATIONS: dict[str, Callable[[ExperimentConfig], str]] = {
    "text shards": lambda config: prepare_text(config)[0].name,
    "replay shards": lambda config: prepare_replay(config, open_text_tokenizer(ASSET)).name,
    "text tokenizer": trained_tokenizer,
}


@pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS.keys())
def test_changed_text_is_prepared_anew_and_the_old_folder_stays(
    tmp_path: Path, prepare: Callable[[ExperimentConfig], str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_config(tmp_path)
    write_texts(tmp_path, "aaaa")
    first = prepare(config)
    capsys.readouterr()
    assert prepare(config) == first
    assert f"data: reusing {tmp_path / 'cache' / first}" in capsys.readouterr().err
    write_texts(tmp_path, "zzzz")  # of the same size
    second = prepare(config)
    assert second != first
    assert "has changed since" in capsys.readouterr().err
    assert (tmp_path / "cache" / first).exists()
    write_texts(tmp_path, "aaaa")
    assert prepare(config) == first


def test_shipped_text_is_known_by_its_content(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    shipped = replace(config, data=replace(config.data, replay_path="asset:text/relearning.txt.gz"))
    folder = prepare_replay(shipped, open_text_tokenizer(ASSET))
    (content,) = json.loads((folder / KEY).read_text())["key"]["content"].values()
    assert content == content_of(str(find("asset:text/relearning.txt.gz")))
    assert prepare_replay(shipped, open_text_tokenizer(ASSET)) == folder


def test_a_damaged_text_tokenizer_is_named(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    write_texts(tmp_path, "aaaa")
    file = tmp_path / "cache" / trained_tokenizer(config)
    content = bytearray(file.read_bytes())
    content[content.index(b"a")] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged: its sha256 differs from .*; delete {file} to make it"):
        trained_tokenizer(config)


def test_replayed_text_is_that_of_the_file(tmp_path: Path) -> None:
    text, config = open_text_tokenizer(ASSET), text_config(tmp_path)
    for word in ("aaaa", "zzzz"):
        write_texts(tmp_path, word)
        assert text.decode(open_split(prepare_replay(config, text), "train")[0]["text_ids"]).startswith(word)


def test_text_without_a_whole_row_is_refused_by_key(tmp_path: Path) -> None:
    write_texts(tmp_path, "aaaa")
    (tmp_path / "heldout.txt").write_text("word")
    with pytest.raises(ValueError, match=r"data\.val_path=.*heldout\.txt: less text than one row"):
        prepare_text(text_config(tmp_path))


SETTINGS = {"format": 3, "length": 8}


def complete(prepared: Prepared) -> Path:
    prepared.write_key()
    write_index(prepared.folder, {"tokenizers": {}, "splits": {"train": {"rows": 5}}})
    return prepared.folder


def test_what_is_reused_is_said_with_rows_hash_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    prepared = Prepared(tmp_path / "cache", "text", SETTINGS, {"data.path": str(tmp_path / "a.txt")})
    assert prepared.find() is None
    folder = complete(prepared)
    os.utime(folder / "index.json", (0, 0))
    assert prepared.find() == folder
    index = read_index(folder) or {}
    said = capsys.readouterr().err
    assert f"data: reusing {folder}: 5 train rows, data hash {index['data_hash']}, prepared 19" in said


def test_moved_data_is_found_and_other_settings_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    folder = complete(Prepared(tmp_path / "cache", "text", SETTINGS, {"data.path": str(tmp_path / "a.txt")}))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    moved = Prepared(tmp_path / "cache", "text", SETTINGS, {"data.path": str(tmp_path / "b.txt")})
    assert moved.find() == folder
    assert replace(moved, settings=SETTINGS | {"length": 9}).find() is None


def test_a_folder_of_an_older_format_is_not_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    paths = {"data.path": str(tmp_path / "a.txt")}
    older = complete(Prepared(tmp_path, "text", SETTINGS | {"format": 2}, paths))
    (tmp_path / "text-damaged").mkdir()
    (tmp_path / "text-damaged" / KEY).write_text("{")
    assert Prepared(tmp_path, "text", SETTINGS, paths).find() is None
    assert f"preparing anew: {older} is of an older format" in capsys.readouterr().err


def test_data_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    prepared = Prepared(tmp_path / "cache", "text", SETTINGS, {"data.path": str(tmp_path / "a.txt")})
    prepared.write_key()
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(ValueError, match=r"data\.path=.*a\.txt: its files have changed while they were read"):
        prepared.require_unchanged()


def rewritten(image: Path, color: int) -> None:
    Image.new("RGB", (2, 2), (color, color, color)).save(image)


class Changing(Codes):
    """Another image of the data is written in a call of the encoder: of the second training part."""

    def __init__(self, image: Path) -> None:
        super().__init__()
        self.image, self.calls = image, 0

    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            rewritten(self.image, 200)
        return super().encode(images_uint8_BCHW, low_precision)


@pytest.mark.parametrize(("share", "kept"), [(1e9, ["train/part-00000", "val/part-00000"]), (1e-9, ["val/part-00000"])])
def test_no_part_stays_that_was_written_while_the_data_changed(
    share: float, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the data is checked before every part, or just before the first and at the end."""
    monkeypatch.setattr("t2i_lm.data.shards.cache.CHECK_SHARE", share)
    colors = {"val": range(100, 102), "train": range(12)}
    for split, several in colors.items():
        (tmp_path / "photos" / split).mkdir(parents=True)
        lines = [json.dumps({"file_name": f"{color}.png", "caption": "a"}) for color in several]
        (tmp_path / "photos" / split / "metadata.jsonl").write_text("\n".join(lines))
        for color in several:
            rewritten(tmp_path / "photos" / split / f"{color}.png", color)

    def prepared(cache: str, image: Codes) -> Path:
        data = DataConfig(
            source="image_folder", path=str(tmp_path / "photos"), part_size=4, cache_dir=str(tmp_path / cache)
        )
        return prepare_pairs(ExperimentConfig(data=data), Letters(), image)

    changed = tmp_path / "photos" / "train" / "9.png"
    with pytest.raises(ValueError, match=r"data\.path=.*photos: its files have changed while they were read"):
        prepared("cache", Changing(changed))
    (folder,) = (tmp_path / "cache").glob("image_folder-*")
    assert sorted(str(part.relative_to(folder)) for part in folder.glob("*/part-*")) == kept
    rewritten(changed, 9)
    again, clean = prepared("cache", Codes()), prepared("other", Codes())
    assert (again, read_index(again)["data_hash"]) == (folder, read_index(clean)["data_hash"])


@pytest.mark.parametrize("kind", ["text shards", "replay shards"])
def test_no_text_stays_that_was_written_while_it_changed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path, "aaaa")
    with monkeypatch.context() as patch:

        def changing(*arguments: Any) -> Iterator[dict[str, Any]]:
            yield from text_rows(*arguments)
            write_texts(tmp_path, "zzzz")

        patch.setattr("t2i_lm.data.shards.tokenize.text_rows", changing)
        with pytest.raises(ValueError, match=r"its files have changed while they were read"):
            PREPARATIONS[kind](text_config(tmp_path))
    assert not list((tmp_path / "cache").rglob("part-*"))


def test_a_lost_network_is_no_change_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    prepared = Prepared(tmp_path, "hub", SETTINGS, {"data.path": "some/name"})
    with monkeypatch.context() as patch:
        patch.setattr("t2i_lm.data.identity._commit", lambda name: "commit 12")
        assert prepared.contents == {"data.path": "commit 12"}
        prepared.require_unchanged()
    prepared.require_unchanged()


def test_without_a_network_the_newest_folder_of_a_dataset_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("t2i_lm.data.identity._commit", lambda name: "commit 12")
    folder = complete(Prepared(tmp_path, "hub", SETTINGS, {"data.path": "some/name"}))
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert Prepared(tmp_path, "hub", SETTINGS, {"data.path": "some/name"}).find() == folder
    assert "some/name: without a network it is unknown whether it has changed" in capsys.readouterr().err
    assert json.loads((folder / KEY).read_text())["key"]["content"] == {"data.path": "commit 12"}


def test_scenes_of_each_version_have_their_own_folder(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_experiment(PRETRAINED, "demo", [*tiny, "data.cache_dir=cache"])
    prepared = shards_of(config, {"text": "a", "image": "b"})
    assert prepared.of_scenes(2).name == "scenes-66ef2fd17e34"
    assert prepared.of_scenes(SCENES_FORMAT) == prepared.folder
    monkeypatch.setattr("t2i_lm.data.shards.cache.SCENES_FORMAT", SCENES_FORMAT + 1)
    assert shards_of(config, {"text": "a", "image": "b"}).folder != prepared.folder
    monkeypatch.undo()
    assert shards_of(config, {"text": "a", "image": "b"}, wide_codes=True).folder != prepared.folder


def test_held_out_text_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path, "ship")
    config = text_config(tmp_path)
    inside = replace(config, data=replace(config.data, val_path=str(tmp_path / "books" / "heldout.txt")))
    (tmp_path / "heldout.txt").rename(tmp_path / "books" / "heldout.txt")
    message = (
        r"data\.val_path=.*heldout\.txt: 60 of 60 documents are also in data\.path=.*books \(the first: 'ship number 0"
    )
    with pytest.raises(ValueError, match=message):
        prepare_text(inside)
    allowed = replace(inside, data=replace(inside.data, max_recurring_share=1.0))
    prepare_text(allowed)
    with pytest.raises(ValueError, match=message):
        prepare_text(inside)  # from the index of the shards


@pytest.mark.parametrize(
    ("path", "val_path", "same"),
    [
        *(("org/a", "org/a", True), ("org/a", "org/a:train", True), ("org/a:x", "org/a:x", True)),
        *(
            ("org/a", "org/a:test", False),
            ("org/a:x", "org/a", False),
            ("org/a", "org/b", False),
            ("a.txt", "o/a", False),
        ),
    ],
)
def test_text_on_a_hub_that_is_trained_on_is_refused_by_name(
    path: str, val_path: str, same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExperimentConfig(task="text", init="random", data=DataConfig(source="text", path=path, val_path=val_path))
    if same:
        with pytest.raises(
            ValueError, match=rf"data\.val_path={val_path}: the text of data\.path={path}, .*org/a:SPLIT"
        ):
            prepare_text(config)
        config = replace(config, data=replace(config.data, max_recurring_share=1.0))
    require_other_dataset(config.data)
    assert ("are also in data.path is not known" in capsys.readouterr().err) != same


def test_splits_of_one_dataset_have_shards_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("t2i_lm.data.identity._commit", lambda name: "commit 12")
    pairs = [("org/a", "org/a:validation"), ("org/a", "org/a:test"), ("org/a:validation", "org/a:test")]
    folders = {
        Prepared(tmp_path, "text", SETTINGS, {"data.path": one, "data.val_path": other}).folder for one, other in pairs
    }
    assert len(folders) == 3


def test_shards_of_a_folder_that_is_gone_are_not_reused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("a")
    complete(Prepared(tmp_path, "image_folder", SETTINGS, {"data.path": str(tmp_path / "photos")}))
    (tmp_path / "photos").rename(tmp_path / "moved")
    for hub in (False, True):
        gone = Prepared(tmp_path, "image_folder", SETTINGS, {"data.path": str(tmp_path / "photos")}, hub=hub)
        assert gone.find() is None
