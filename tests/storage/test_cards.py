"""card.json of exports: which files are verified, and what is said of cards without hashes."""

import json
from pathlib import Path

import pytest

from t2i_lm.storage.cards import CARD, require_intact, write_card


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "text.model"):
        (tmp_path / name).write_text(name)
    write_card(tmp_path, {"experiment": "x", "task": "text"})
    return tmp_path


def test_a_folder_is_verified_whole_and_a_file_with_its_config(folder: Path) -> None:
    (folder / "text.model").write_text("other")
    require_intact(folder / "model.safetensors")
    for path in (folder, folder / "text.model"):
        with pytest.raises(
            ValueError, match=rf"^{folder}/text\.model is damaged: its sha256 .*; copy it again, or exp"
        ):
            require_intact(path)
    (folder / "config.json").unlink()
    require_intact(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{folder}/config\.json is missing, which card\.json names; restore it"):
        require_intact(folder, "restore it")


def test_without_its_card_a_folder_is_used_as_it_is(folder: Path) -> None:
    (folder / "config.json").write_text("edited")
    (folder / CARD).unlink()
    require_intact(folder)


def test_cards_without_hashes_are_accepted_and_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / CARD).write_text(json.dumps({"experiment": "x", "task": "text", "steps": 3}))
    for path in (folder, folder, folder / "config.json"):
        require_intact(path)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"note: {folder / CARD} is of an older version, without hashes: its files are not verified"
    (folder / CARD).write_text(json.dumps({"license": "mit"}))  # of another program
    require_intact(folder)
    assert not capsys.readouterr().err
