"""Seeded damage of a run's folder: found and named before anything is used, and a refusal changes no byte.

T2I_LM_FAULTS is the number of damages of each kind of file, a few by default.
"""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from callbacks import DurableCheckpointIO, MetricsFile
from callbacks.checkpoints import checkpoint_path
from callbacks.files.checkpoint_io import digest_of
from callbacks.run_record import RECORD, STATE
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import may_move
from t2i_lm.config.load import flatten, flatten_mapping, load_experiment, save_experiment
from t2i_lm.storage.run_folder import CHECKPOINTS, CONFIG, METRICS, read_run
from t2i_lm.training.resumption import VALUES, find_resumption, require_same_config
from tests.faults.damage import COUNT, damage

STEPS = (10, 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    save_experiment(ExperimentConfig(), folder / CONFIG)
    record = {VALUES: flatten_mapping(yaml.safe_load((folder / CONFIG).read_text()))}
    metrics = MetricsFile(folder / METRICS)
    for step in range(1, STEPS[-1] + 1):
        metrics.append({"step": step, "train": {"all": {"nll": 1 / step}}})
        if step in STEPS:
            size, digest = metrics.end()
            state = {"metrics_size": size, "metrics_digest": digest}
            content = {"weights": torch.randn(2000), RECORD: record, "callbacks": {STATE: state}}
            DurableCheckpointIO().save_checkpoint(content, checkpoint_path(folder / CHECKPOINTS, step))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def damaged(whole: Path, folder: Path, name: str, draw: random.Random) -> bool:
    """Copies the run with one damaged file; whether a byte differs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    content = (folder / name).read_bytes()
    changed = damage(content, draw)
    (folder / name).write_bytes(changed)
    return changed != content


def resume(folder: Path) -> int:
    """The checks of `--resume` that read the run's folder; the step from which it would go on."""
    found = find_resumption(folder)
    require_same_config(load_experiment(folder / CONFIG), found)
    return found.step


def refusal(folder: Path) -> str | None:
    """Why a run is not resumed; None if it is."""
    try:
        resume(folder)
    except ValueError as error:
        return str(error)
    return None


def test_a_damaged_checkpoint_is_never_resumed_from(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, newest = random.Random(1), checkpoint_path(whole / CHECKPOINTS, 20).name
    for _ in range(COUNT):
        if damaged(whole, tmp_path / "run", f"{CHECKPOINTS}/{newest}", draw):
            assert resume(tmp_path / "run") == 10
            assert newest in capsys.readouterr().err


def test_a_damaged_digest_is_told_and_leads_to_no_other_bytes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, newest = random.Random(2), digest_of(checkpoint_path(whole / CHECKPOINTS, 20))
    hexadecimal = newest.read_text().split()[0]
    for _ in range(COUNT):
        if damaged(whole, tmp_path / "run", f"{CHECKPOINTS}/{newest.name}", draw):
            left = (tmp_path / "run" / CHECKPOINTS / newest.name).read_bytes()
            # Only the name after the digest was damaged.
            harmless = left[:64].decode(errors="replace") == hexadecimal and (left[64:65] in (b" ", b""))
            step = resume(tmp_path / "run")
            assert step == 20 if harmless else step in (10, 20)
            assert step == 20 or newest.name.removesuffix(".sha256") in capsys.readouterr().err


def test_damaged_lines_of_metrics_are_named_or_cut_and_told(whole: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    before, size = MetricsFile(whole / METRICS).read(), (whole / METRICS).stat().st_size
    for _ in range(COUNT):
        if not damaged(whole, tmp_path / "run", METRICS, draw):
            continue
        left = contents(tmp_path / "run")
        refused = refusal(tmp_path / "run")
        assert contents(tmp_path / "run") == left
        if refused is not None:
            assert re.search(rf"{METRICS}.*Restore", refused), refused
            continue
        metrics = MetricsFile(tmp_path / "run" / METRICS)
        if not metrics.cut_to(size):  # shorter, which RunCheckpoints says
            metrics.cut_after(STEPS[-1])
            assert len(metrics.read()) < len(before)
        found = metrics.read()
        assert found == before[: len(found)]


def test_a_damaged_config_is_named_or_means_the_same(whole: Path, tmp_path: Path) -> None:
    draw, before = random.Random(4), flatten(ExperimentConfig())
    for _ in range(COUNT):
        if not damaged(whole, tmp_path / "run", CONFIG, draw):
            continue
        left = contents(tmp_path / "run")
        refused = refusal(tmp_path / "run")
        assert contents(tmp_path / "run") == left
        if refused is not None:
            assert CONFIG in refused
        else:
            now = flatten(load_experiment(tmp_path / "run" / CONFIG))
            assert all(may_move(key) for key in before if now[key] != before[key])


@pytest.mark.parametrize("lost", ["*.sha256", "*.ckpt", "*"])
def test_lost_checkpoints_leave_the_folder_as_it_was(whole: Path, tmp_path: Path, lost: str) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run" / CHECKPOINTS).glob(lost):
        file.unlink()
    left = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint can be verified"):
        resume(tmp_path / "run")
    assert contents(tmp_path / "run") == left
    assert read_run(tmp_path / "run").metrics[-1]["step"] == 20
