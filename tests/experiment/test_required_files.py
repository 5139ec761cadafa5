"""What a run reads and this machine lacks: named by key and path; names on the hub and plug-ins are no files."""

from pathlib import Path

import pytest

from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.required_files import absent_files, missing_paths, to_fetch
from t2i_lm.train import main
from tests.runs import EXPERIMENTS, PRETRAINED

ALIGNED = str(EXPERIMENTS / "t2i_aligned.yaml")
TEXT = str(EXPERIMENTS / "text_lm.yaml")
REPLAY = str(EXPERIMENTS / "remedies" / "replay.yaml")
FOLDER = ("data.source=image_folder", "data.path=.")


@pytest.mark.parametrize(
    ("experiment", "key", "others"),
    [
        (PRETRAINED, "backbone.path", ()),
        (PRETRAINED, "text_tokenizer.path", ()),
        (PRETRAINED, "image_tokenizer.path", ()),
        (str(EXPERIMENTS / "t2i_scratch.yaml"), "backbone.config", ("backbone.path=null",)),
        (ALIGNED, "aligned_rows", ()),
        (PRETRAINED, "data.path", FOLDER[:1]),
        (PRETRAINED, "data.val_path", FOLDER),
        (PRETRAINED, "data.second_val_path", (*FOLDER, "data.val_path=.")),
        (REPLAY, "data.replay_path", ()),
        (PRETRAINED, "forgetting.text", ()),
        (PRETRAINED, "forgetting.second_text", ()),
        (PRETRAINED, "forgetting.tasks", ()),
        (PRETRAINED, "fid.coco", ("fid.interval=10", "fid.weights=README.md")),
        (PRETRAINED, "fid.weights", ("fid.interval=10", "fid.coco=.")),
        (PRETRAINED, "data.path", ("data.source=shards", "data.train_size=null", "data.val_size=null")),
        (TEXT, "data.path", ("data.val_path=README.md",)),
        (TEXT, "backbone.path", ("data.path=README.md", "data.val_path=README.md", "backbone.config=null")),
        (TEXT, "text_tokenizer.path", ("data.path=README.md", "data.val_path=README.md")),
    ],
)
def test_an_absent_file_is_named_by_its_key(experiment: str, key: str, others: tuple[str, ...], tmp_path: Path) -> None:
    path = f"{tmp_path}/absent.json"
    config = load_experiment(experiment, "demo", [*others, f"{key}={path}"])
    assert absent_files(config) == {key: path}
    assert missing_paths([config, config]) == [f"missing path: {key}={path} (2 runs to train)"]


def test_what_a_run_does_not_read_is_not_missing() -> None:
    random = ["backbone.path=nowhere", "backbone.config=demo_7m"]
    assert absent_files(load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", random)) == {}
    unread = ["data.replay_path=nowhere.txt", "fid.coco=nowhere", "fid.weights=nowhere"]
    unread += ["forgetting.interval=null", "forgetting.text=nowhere.txt"]
    assert absent_files(load_experiment(PRETRAINED, "demo", unread)) == {}


def test_what_is_required_and_not_set_is_null() -> None:
    values = ["backbone.path=null", "data.source=parquet"]
    assert absent_files(load_experiment(PRETRAINED, "demo", values)) == {"backbone.path": "null", "data.path": "null"}
    assert absent_files(load_experiment(REPLAY, "demo", [])) == {"data.replay_path": "null"}


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext", "org/text-1.0:train[:1%]"])
def test_a_datasets_name_is_no_file(name: str) -> None:
    texts = [f"forgetting.text={name}", f"data.replay_path={name}"]
    assert absent_files(load_experiment(REPLAY, "demo", texts)) == {}
    assert absent_files(load_experiment(TEXT, "demo", [f"data.path={name}", "data.val_path=a/b"])) == {}
    assert absent_files(load_experiment(PRETRAINED, "demo", ["data.source=hub", f"data.path={name}"])) == {}


@pytest.mark.parametrize(
    "path",
    ["/no/folder", "./texts", "../texts", "a/b/c", "book.txt", "org/book.txt.gz", "s3://a/b", "hf://a/b", "C:/a"],
)
def test_a_path_is_no_datasets_name(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_experiment(PRETRAINED, "demo", [f"forgetting.text={path}"])
    assert [*absent_files(config)] == ["forgetting.text"]
    assert main([PRETRAINED, f"forgetting.text={path}", f"run.dir={tmp_path}"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_hub_is_fetched() -> None:
    absent = absent_files(load_experiment(PRETRAINED, "demo", ["backbone.path=hf://org/never-cached"]))
    assert absent == {"backbone.path": "hf://org/never-cached"}
    assert to_fetch(absent) == {"backbone.path": "hf download org/never-cached"}
    assert missing_paths([load_experiment(PRETRAINED, "demo", ["backbone.path=hf://org/never-cached"])]) == []


def test_images_of_the_hub_are_not_fetched_by_a_path() -> None:
    path = "hf://org/name/x.parquet"
    absent = absent_files(load_experiment(PRETRAINED, "demo", ["data.source=parquet", f"data.path={path}"]))
    assert (absent, to_fetch(absent)) == ({"data.path": path}, {})


@pytest.mark.parametrize("key", ["backbone.path", "text_tokenizer.path", "image_tokenizer.path", "forgetting.text"])
def test_an_unknown_asset_is_refused_by_its_key_with_those_that_exist(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--dry-run"], []):
        assert main([PRETRAINED, *words, f"{key}=asset:nothing"]) == 2
        assert f"error: {key}=asset:nothing: expected one of asset:" in capsys.readouterr().err
