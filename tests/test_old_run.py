"""A run folder that an early version wrote is read, resumed, sampled, evaluated and drawn by this one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from t2i_lm.compare import main as compare
from t2i_lm.data.scenes.version import SCENES_FORMAT
from t2i_lm.evaluate import main as evaluate
from t2i_lm.figures import main as figures
from t2i_lm.sample import main as sample
from t2i_lm.storage.run_folder import REPORT, Run, read_run, run_folders
from t2i_lm.train import main as train
from tests.runs import PRETRAINED, curve, losses

FOLDER = Path(__file__).with_name("data_files") / "old_run"
# Where sums are added in another order, the last bits of a loss may differ. It was trained on an AMD processor with
# AVX-512; MKL has other kernels for Intel's.
PROCESSOR = (torch.backends.cpu.get_cpu_capability(), str(torch.cpu.get_capabilities().get("cpu_name"))[:3])
SAME_ARITHMETIC = torch.__version__.startswith("2.15.0") and PROCESSOR == ("AVX512", "AMD")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy, whose config names its models relative to the working directory."""
    shutil.copytree(FOLDER, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    (folder,) = run_folders(Path("runs"), "t2i_pretrained")
    return read_run(folder)


def test_an_old_run_is_read(old: Run) -> None:
    assert old.environment["git"].startswith("e77443d")
    assert old.config["name"] == "t2i_pretrained"
    assert old.validation_splits == ()
    assert [record["step"] for record in old.validations()] == [0, 4, 8]
    assert old.report is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")  # by a newer one
def test_an_old_run_is_resumed_with_its_own_losses(old: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (old.folder / REPORT).unlink()
    assert train([PRETRAINED, "--resume", str(old.folder)]) == 0
    assert "ceiling failed: scenes of an earlier version" in capsys.readouterr().err
    resumed = read_run(old.folder)
    assert resumed.report is not None
    if SAME_ARITHMETIC:
        assert curve(resumed) == curve(old)
    assert len(resumed.metrics) == len(old.metrics)
    for ours, theirs in zip(resumed.metrics, old.metrics, strict=True):
        for key, entries in losses(theirs).items():
            for name, entry in entries.items():
                assert ours[key][name] == pytest.approx(entry, rel=1e-6), (theirs["step"], name)


def test_an_old_run_without_its_shards_is_refused_before_any_preparation(
    old: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (old.folder / REPORT).unlink()
    shutil.rmtree(next(Path("cache").glob("scenes-*")))
    before = sorted(Path().rglob("*"))
    assert train([PRETRAINED, "--resume", str(old.folder)]) == 2
    refusal = (
        f"the run was trained on version 2 of the scenes, this code generates version {SCENES_FORMAT}, and its shards"
    )
    assert refusal in capsys.readouterr().err.splitlines()[-1]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
def test_an_old_run_samples(old: Run, tmp_path: Path) -> None:
    assert sample(["--checkpoint", str(old.folder), "a red circle.", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-a-red-circle.png", "grid.png"]


@pytest.mark.slow
def test_an_old_run_is_evaluated(old: Run, book: Path, tmp_path: Path) -> None:
    words = ["--forgetting", str(book), "--rows", "4", "--length", "32", "--out", str(tmp_path / "out")]
    assert evaluate(["--checkpoint", str(old.folder), *words]) == 0
    found = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert found["text"]["targets"] == 4 * 32


def test_old_arms_are_compared_on_their_one_validation_set(old: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(["--runs", "runs"]) == 0
    assert "val.image.nll (nats/token) *" in capsys.readouterr().out


def test_an_old_run_is_drawn(old: Run, tmp_path: Path) -> None:
    assert figures(["--figure", "4", "--runs", "runs", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "figure4.png").is_file()
