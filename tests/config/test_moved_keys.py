"""Former keys and values, in files and overrides."""

from pathlib import Path

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import MOVED_KEYS, flatten, flatten_mapping, load_experiment, migrate, save_experiment

PRETRAINED = Path(__file__).parents[2] / "experiments" / "t2i_pretrained.yaml"


def test_a_run_folder_written_before_is_read_with_one_line_per_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "config.yaml"
    save_experiment(load_experiment(PRETRAINED, "demo", ["data.pad_to_multiple_of=24", "align.neighbors=3"]), saved)
    text = saved.read_text()
    text = text.replace("pad_to_multiple_of", "trim").replace("neighbors", "neighbours")
    saved.write_text(text.replace("path: asset:lm_rotary\n", "path: hub:org/lm@v1/model.pt\n"))
    config = load_experiment(saved)
    assert (config.data.pad_to_multiple_of, config.align.neighbors) == (24, 3)
    assert config.backbone.path == "hf://org/lm@v1/model.pt"
    assert capsys.readouterr().err.splitlines() == [
        f"note: {saved}: data.trim is now data.pad_to_multiple_of",
        f"note: {saved}: align.neighbours is now align.neighbors",
        f"note: {saved}: backbone.path=hub:org/lm@v1/model.pt is now written hf://org/lm@v1/model.pt",
    ]
    assert load_experiment(saved) == config
    assert not capsys.readouterr().err  # the same file again


def test_an_override_by_a_former_name_wins_over_files(tmp_path: Path) -> None:
    config = load_experiment(PRETRAINED, "paper", ["data.trim=48", "data.path=x"])
    assert config.data.pad_to_multiple_of == 48


def test_both_names_of_a_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.trim is the former name of data\.pad_to_multiple_of"):
        load_experiment(PRETRAINED, "demo", ["data.trim=8", "data.pad_to_multiple_of=8"])


def test_moved_keys_lead_to_keys_that_exist() -> None:
    known = flatten(ExperimentConfig())
    assert not MOVED_KEYS.keys() & known.keys()
    assert set(MOVED_KEYS.values()) <= known.keys()


def test_migration_copies() -> None:
    tree = {"data": {"trim": 8}, "name": "x"}
    assert migrate(tree, "here") == {"data": {"pad_to_multiple_of": 8}, "name": "x"}
    assert tree == {"data": {"trim": 8}, "name": "x"}


def test_leaves_of_a_nested_mapping() -> None:
    assert flatten_mapping({"a": {"b": {"c": 1}, "d": [2]}, "e": None, "f": {}}) == {"a.b.c": 1, "a.d": [2], "e": None}
