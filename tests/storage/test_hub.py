"""References to the hub's files, the cache, and errors without a network."""

import hashlib
from pathlib import Path

import pytest

from t2i_lm.assets import find, resolve
from t2i_lm.storage.hub import HubFile, parse
from tests.storage.hub_cache import offline_snapshot


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("hf://a/b", HubFile("a/b", None, None, None)),
        ("hf://a/b.c-d@v1/x/y.ckpt", HubFile("a/b.c-d", "v1", "x/y.ckpt", None)),
        (f"hf://a/b/f.json#sha256={'a' * 64}", HubFile("a/b", None, "f.json", "a" * 64)),
    ],
)
def test_references_are_read(reference: str, expected: HubFile) -> None:
    assert parse(reference) == expected


@pytest.mark.parametrize("reference", ["hf://", "hf://a", "hf://a/b/f#sha256=12", f"hf://a/b#sha256={'a' * 64}"])
def test_other_forms_are_refused(reference: str) -> None:
    with pytest.raises(ValueError, match="hf://"):
        parse(reference)


def test_the_former_spelling_is_read_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("hub:a/former.pt") == parse("hf://a/former.pt")
    assert capsys.readouterr().err == "note: hub:a/former.pt is now written hf://a/former.pt\n"


KEY = "backbone.path"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with one file, and no network."""
    snapshot = offline_snapshot(tmp_path, "some/tokenizer", monkeypatch)
    snapshot.mkdir()
    (snapshot / "tokenizer.json").write_text("{}")
    return tmp_path


def test_fetched_files_work_offline(cache: Path) -> None:
    digest = hashlib.sha256(b"{}").hexdigest()
    path = resolve(f"hf://some/tokenizer/tokenizer.json#sha256={digest}", KEY)
    assert path.read_text() == "{}"
    assert find("hf://some/tokenizer/tokenizer.json") == path
    assert (resolve("hf://some/tokenizer", KEY) / "tokenizer.json").is_file()


def test_an_absent_file_names_the_command_that_fetches_it(cache: Path) -> None:
    assert find("hf://some/model/m.ckpt") is None
    with pytest.raises(
        ValueError, match=r"^backbone\.path=hf://some/model@v2/m\.ckpt.*hf download some/model m\.ckpt --revision v2"
    ):
        resolve("hf://some/model@v2/m.ckpt", KEY)


def test_another_file_than_promised_is_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="has sha256"):
        resolve(f"hf://some/tokenizer/tokenizer.json#sha256={'a' * 64}", KEY)
