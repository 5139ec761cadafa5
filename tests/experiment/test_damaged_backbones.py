"""Damaged files of a backbone: one line that names them, in a run and in a dry run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import open_backbone
from t2i_lm.train import main
from tests.runs import PRETRAINED

NOT_OURS = (b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe", b'{"hidden_dim": "x"}', b'{"model_type": 3}')


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(write("config.json", content) for content in NOT_OURS),
        *(write("model.safetensors", content) for content in (b"", b"\xff" * 50, b"version https://git-lfs")),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
    ],
)
def test_a_damaged_backbone_is_named_in_one_line(
    damage: Callable[[Path], object], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(tiny[0].partition("=")[2], folder)
    damage(folder)
    overrides = [*tiny, f"backbone.path={folder}"]
    with pytest.raises(ValueError, match=f"{folder}"):
        open_backbone(load_experiment(PRETRAINED, "demo", overrides))
    capsys.readouterr()
    assert main([PRETRAINED, *overrides, f"run.dir={tmp_path}"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert str(folder) in line
    assert not list(tmp_path.rglob("config.yaml"))
