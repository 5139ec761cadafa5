"""Hashes of weights, which a run records for its initial ones."""

from hashlib import sha256
from pathlib import Path

import pytest

from t2i_lm.storage.hashing import weights_sha256
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.train import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_weights_are_hashed_by_file(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.bin", "config.json"):
        (tmp_path / name).write_text(name)
    assert weights_sha256(tmp_path) == {name: sha256(name.encode()).hexdigest() for name in ("a.bin", "b.safetensors")}
    assert weights_sha256(tmp_path / "config.json") == {"config.json": sha256(b"config.json").hexdigest()}


@pytest.mark.slow
def test_a_run_records_the_hash_of_its_initial_weights(tiny: list[str], tmp_path: Path) -> None:
    backbone = Path(tiny[0].removeprefix("backbone.path="))
    short = [
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "trainer.checkpoint_interval=1",
        "optim.warmup_steps=0",
    ]
    for arm in ("pretrained", "scratch"):
        experiment = str(EXPERIMENTS / f"t2i_{arm}.yaml")
        assert main([experiment, *tiny, *short, "samples.prompts=0", f"run.dir={tmp_path}"]) == 0
    first, second = (read_run(folder).environment["backbone"] for folder in run_folders(tmp_path))
    assert first == weights_sha256(backbone) != {}
    assert second is None
