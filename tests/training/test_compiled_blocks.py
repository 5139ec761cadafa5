"""Recomputed and compiled blocks train as ordinary ones do."""

import shutil
from pathlib import Path

import pytest

from t2i_lm.runtime.devices import COMPILERS
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from tests.test_train import PRETRAINED, curve, launch, pretrained, same_losses, train

__all__ = ["pretrained"]


def test_recomputed_activations_give_the_same_run(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    run = train(PRETRAINED, tmp_path, *tiny, "trainer.activation_checkpointing=true")
    assert curve(run) == curve(pretrained)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_compiled_blocks_give_the_same_losses(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    # In a process of its own: a warning inside torch's tracer would be an error here.
    output, _ = (process := launch(PRETRAINED, tmp_path, *tiny, "trainer.compile=true")).communicate(timeout=300)
    assert process.returncode == 0, output
    same_losses(read_run(run_folders(tmp_path)[0]), pretrained, 1e-5)


def test_without_a_compiler_blocks_run_eagerly(
    pretrained: Run,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("t2i_lm.runtime.devices.which", lambda _: None)
    run = train(PRETRAINED, tmp_path, *tiny, "trainer.compile=true")
    assert "trainer.compile: none of c++" in capsys.readouterr().err
    assert curve(run) == curve(pretrained)
