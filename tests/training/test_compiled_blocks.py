"""Recomputed and compiled blocks train as ordinary ones do."""

from pathlib import Path

import pytest

from t2i_lm.storage.run_folder import Run, read_run, run_folders
from tests.marks import needs_compiler
from tests.runs import PRETRAINED, QUICK, Forked, curve, same_losses, succeed, train


@pytest.mark.slow
def test_recomputed_activations_give_the_same_run(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    run = train(PRETRAINED, tmp_path, *tiny, "trainer.activation_checkpointing=true")
    assert curve(run) == curve(pretrained)


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_give_the_same_losses(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    # In a process of its own: a warning inside torch's tracer would be an error here.
    # Batches of one length: every other would be compiled anew.
    changes = [*tiny, *QUICK, "trainer.compile=true", "data.pad_to_multiple_of=112", f"run.dir={tmp_path}"]
    succeed(Forked("t2i_lm.train", PRETRAINED, *changes))
    same_losses(read_run(run_folders(tmp_path)[0]), pretrained, 1e-5)


@pytest.mark.slow
def test_without_a_compiler_blocks_run_eagerly(
    pretrained: Run,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("t2i_lm.runtime.devices.which", lambda _: None)
    run = train(PRETRAINED, tmp_path, *tiny, "trainer.compile=true")
    assert "trainer.compile: no compiler (" in capsys.readouterr().err
    assert curve(run) == curve(pretrained)
