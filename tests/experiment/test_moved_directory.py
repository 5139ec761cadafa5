"""A run's relative paths, opened from another working directory than the run's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import t2i_lm
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import PATH_KEYS
from t2i_lm.config.load import load_experiment, load_run, located, require_located, save_experiment
from t2i_lm.config.sections import BackboneConfig
from t2i_lm.experiment.build import open_backbone
from t2i_lm.experiment.restore import load_trained
from t2i_lm.export import main as export
from t2i_lm.sample import main as sample
from t2i_lm.storage.run_folder import CONFIG, ENVIRONMENT, REPORT, Run
from t2i_lm.storage.sealed import sealed
from t2i_lm.train import main as train
from tests.runs import PRETRAINED

pytestmark = pytest.mark.slow

# What no working directory changes.
ELSEWHERE = ("asset:image_tokenizer", "hf://org/name", "plugin:colors:here", "/absolute/here", "org/name")


def run_at(folder: Path, start: Path | None, **sections: object) -> Path:
    """A run folder of a config."""
    folder.mkdir(parents=True)
    save_experiment(replace(ExperimentConfig(), **sections), folder / CONFIG)
    (folder / ENVIRONMENT).write_text(json.dumps({} if start is None else {"directory": str(start)}))
    return folder


OWN_RULES = ("run.dir", "aligned_rows", "data.val_path", "data.second_val_path")


@pytest.mark.parametrize("key", [key for key in PATH_KEYS if key not in OWN_RULES])
def test_every_relative_path_starts_where_the_run_was_started(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, other = tmp_path / "start", tmp_path / "other"
    for folder in (start, other):
        folder.mkdir()
    (start / "here").mkdir()
    monkeypatch.chdir(other)
    section, name = key.split(".")
    for path in ("here", "absent", *ELSEWHERE) if key == "backbone.path" else ("here",):
        changed = replace(getattr(ExperimentConfig(), section), **{name: path})
        run = run_at(tmp_path / f"run-{path.replace('/', '-')}", start, **{section: changed})
        assert load_run(run).value(key) == (str(start / "here") if path == "here" else path)


def test_a_path_that_is_in_neither_place_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    lm = BackboneConfig(path="models/lm")
    here = rf"{tmp_path}/other"
    for start, message in (
        (tmp_path, rf"not found in {tmp_path}, where this run was started, nor in {here}$"),
        (None, rf"not found in {here}; call this command where the run was started$"),
    ):
        run = run_at(tmp_path / f"run{start is None}", start, backbone=lm)
        with pytest.raises(ValueError, match=rf"^backbone\.path=models/lm of \S+: {message}"):
            require_located(load_run(run), run, ["backbone.path"])
    (tmp_path / "other" / "models" / "lm").mkdir(parents=True)
    for run in (tmp_path / "runFalse", tmp_path / "runTrue"):
        require_located(load_run(run), run, ["backbone.path"])


@pytest.fixture
def moved(pretrained: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose config.yaml names its files relative to a directory that is not the working directory."""
    assert pretrained.environment["directory"] == str(Path.cwd())
    parts = Path(tiny[0].partition("=")[2]).parent
    folder = Path(shutil.copytree(pretrained.folder, tmp_path / "runs" / "t2i_pretrained" / pretrained.folder.name))
    config = folder / CONFIG
    config.write_text(config.read_text().replace(f"{parts}/", ""))
    assert load_experiment(config).backbone.path == "lm"
    environment = json.loads((folder / ENVIRONMENT).read_text()) | {"directory": str(parts)}
    (folder / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    (folder / REPORT).unlink()  # it names the former env.json
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    return folder


def test_a_run_is_opened_sampled_exported_and_resumed_from_another_directory(
    moved: Path, pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(["--checkpoint", str(moved), "a red circle", "--out", str(tmp_path / "out")]) == 0
    assert export([str(moved), "--out", str(tmp_path / "exported")]) == 0
    assert t2i_lm.load(moved).sample("a red circle")
    experiment = Path(__file__).parents[2] / "experiments" / Path(PRETRAINED).name
    assert train([str(experiment), "--resume", str(moved)]) == 0
    report = json.loads((moved / REPORT).read_text())
    assert pretrained.report is not None
    clocks = dict.fromkeys(("wall_s", "environment_digest", "digest"))
    assert report | clocks == pretrained.report | clocks
    capsys.readouterr()
    (moved / ENVIRONMENT).write_text("{}")  # of an earlier version
    (moved / REPORT).unlink()
    assert sample(["--checkpoint", str(moved), "a red circle"]) == 2
    assert "backbone.path=lm" in capsys.readouterr().err


def test_the_export_of_an_image_model_is_told_when_it_is_a_backbone(
    pretrained: Run, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(pretrained.folder), "--out", str(tmp_path / "exported")]) == 0
    for path in (tmp_path / "exported", tmp_path / "exported" / "model.safetensors"):
        capsys.readouterr()
        overrides = [*tiny, f"backbone.path={path}"]
        open_backbone(load_experiment(PRETRAINED, "demo", overrides))
        (line,) = capsys.readouterr().err.splitlines()
        assert "beside its 512 text rows, 7 special and 32 image rows count as text rows of the new model" in line
    open_backbone(load_experiment(PRETRAINED, "demo", tiny))
    assert not capsys.readouterr().err
    assert load_trained(pretrained.folder).decoder.config.vocab_size == 512


def test_located_keeps_a_config_without_relative_paths(tmp_path: Path) -> None:
    config = load_experiment(PRETRAINED, "demo")
    assert located(config, run_at(tmp_path / "run", tmp_path)) == config


def test_a_folder_named_like_a_preset_does_not_replace_it(tmp_path: Path) -> None:
    (tmp_path / "open_lm_1b").mkdir()
    config = replace(ExperimentConfig(), backbone=BackboneConfig("open_lm_1b/x.pt", "open_lm_1b"))
    assert located(config, run_at(tmp_path / "run", tmp_path)).backbone.config == "open_lm_1b"
