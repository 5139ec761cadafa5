"""Models of run folders: the choice of the checkpoint, and the check of the tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.config.load import experiment_names, load_experiment
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.experiment.restore import load_trained, newest_checkpoint, without_weights
from t2i_lm.storage.run_folder import ENVIRONMENT, REPORT, Run
from t2i_lm.storage.sealed import sealed
from t2i_lm.tokenizers.text import train_sentencepiece
from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer
from tests.runs import EXPERIMENTS


@pytest.mark.parametrize("folder", [EXPERIMENTS, EXPERIMENTS / "remedies"], ids=lambda folder: folder.name)
def test_a_trained_model_of_every_shipped_experiment_can_be_built(folder: Path) -> None:
    for name in experiment_names(folder):
        config = without_weights(load_experiment(folder / f"{name}.yaml", "demo"))
        assert (config.init, config.optim.l2_sp, config.distil.weight) == ("random", 0, 0), name


def test_a_damaged_newest_checkpoint_is_named_and_so_is_the_one_that_is_used(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pretrained.folder, folder)
    older, newest = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert newest_checkpoint(folder) == newest
    assert capsys.readouterr().err == ""
    newest.write_bytes(newest.read_bytes()[:-1])
    model = load_trained(folder)
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said
    assert f"note: {older} is used" in said
    state = torch.load(older, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="has no intact checkpoint"):
        newest_checkpoint(folder)
    said = capsys.readouterr().err
    assert f"{older} is damaged" in said
    assert "is used" not in said


@pytest.mark.parametrize("name", ["text", "image"])
def test_tokenizers_of_another_hash_are_refused(name: str, pretrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pretrained.folder, folder)
    environment = json.loads((folder / ENVIRONMENT).read_text())
    environment["tokenizers"][name] = "0" * 64
    (folder / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    (folder / REPORT).unlink()
    with pytest.raises(ValueError, match=rf"{name}_tokenizer\.path holds another file .* \(000000000000\)"):
        load_trained(folder)


@pytest.mark.parametrize("name", ["backbone", "image_tokenizer"])
def test_architectures_of_another_hash_are_refused(name: str, pretrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pretrained.folder, folder)
    environment = json.loads((folder / ENVIRONMENT).read_text())
    environment["configs"][name] = "0" * 64
    (folder / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    (folder / REPORT).unlink()
    with pytest.raises(ValueError, match=rf"{name}: its config\.json is another .* \(000000000000\)"):
        load_trained(folder)


@pytest.mark.parametrize("name", ["text", "image"])
def test_a_tokenizer_of_another_size_is_named_rather_than_a_tensor(name: str, pretrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pretrained.folder, folder)
    if name == "text":
        other = tmp_path / "text.model"
        scenes = SceneSource(100, "train", 1)
        train_sentencepiece((scenes[number].captions[0] for number in range(100)), 400, other)
    else:
        other = tmp_path / "vq"
        torch.manual_seed(0)
        save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=48)), other, torch.float32)
    lines = (folder / "config.yaml").read_text().splitlines()
    at = lines.index(f"{name}_tokenizer:")
    place = next(number for number in range(at, len(lines)) if lines[number].startswith("  path:"))
    lines[place] = f"  path: {other}"
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"{name}_tokenizer\.path holds another file"):
        load_trained(folder)
