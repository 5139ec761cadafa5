"""Rules of `--resume`."""

from dataclasses import replace
from pathlib import Path

import pytest

from t2i_lm.config.load import flatten, load_experiment, save_experiment
from t2i_lm.storage.run_folder import CONFIG, ENVIRONMENT, REPORT
from t2i_lm.training.resume import resumed_run

ROOT = Path(__file__).parents[2]
EXPERIMENT = ROOT / "experiments" / "t2i_scratch.yaml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished run between two unfinished ones, and a newer one of another scale."""
    config = load_experiment(EXPERIMENT, "demo", [f"run.dir={tmp_path}"])
    for stamp in ("20260301-100000-demo", "20260301-110000-demo", "20260301-120000-demo", "20260301-130000-paper"):
        folder = tmp_path / config.name / stamp
        folder.mkdir(parents=True)
        save_experiment(replace(config, scale=stamp.split("-")[-1]), folder / CONFIG)
    (tmp_path / config.name / "20260301-120000-demo" / REPORT).write_text("{}")
    return tmp_path


def test_latest_is_the_newest_unfinished_run_of_the_scale(root: Path) -> None:
    config, folder = resumed_run("latest", EXPERIMENT, "demo", [f"run.dir={root}"])
    assert folder.name == "20260301-110000-demo"
    assert config.run.dir == str(root)


@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("latest", [False, True])
def test_a_run_from_the_config_of_another_resumes_by_the_same_command(root: Path, scale: str, latest: bool) -> None:
    stamp = {"demo": "20260301-110000-demo", "paper": "20260301-130000-paper"}[scale]
    source = root / "t2i_scratch" / stamp
    (source / ENVIRONMENT).write_text("{}")
    _, folder = resumed_run("latest" if latest else str(source), source / CONFIG, "demo", ["trainer.threads=3"])
    assert folder == source
    with pytest.raises(ValueError, match=rf"--scale flickr8k: .* has the scale of its run, {scale}; leave --scale out"):
        resumed_run("latest", source / CONFIG, "flickr8k", [])


def test_a_run_that_does_not_exist_or_is_finished_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no unfinished run of t2i_scratch at scale flickr8k"):
        resumed_run("latest", EXPERIMENT, "flickr8k", [f"run.dir={root}"])
    with pytest.raises(ValueError, match=r"a finished run is never overwritten"):
        resumed_run(str(root / "t2i_scratch" / "20260301-120000-demo"), EXPERIMENT, "demo", [])
    with pytest.raises(ValueError, match=r"absent is not a run folder"):
        resumed_run(str(root / "absent"), EXPERIMENT, "demo", [])


def test_a_run_of_another_experiment_is_refused(root: Path) -> None:
    run = root / "t2i_scratch" / "20260301-100000-demo"
    with pytest.raises(ValueError, match=r"this is a run of t2i_scratch, not of .*t2i_pretrained\.yaml"):
        resumed_run(str(run), EXPERIMENT.with_name("t2i_pretrained.yaml"), "demo", [])


def test_only_resumable_keys_may_differ(root: Path) -> None:
    run = str(root / "t2i_scratch" / "20260301-100000-demo")
    config, _ = resumed_run(run, EXPERIMENT, "demo", ["trainer.threads=3", "log.logger=csv"])
    assert (config.trainer.threads, config.log.logger) == (3, "csv")
    with pytest.raises(ValueError, match=r"optim\.lr=0\.7 differs from the run's config\.yaml \(0\.\d+\)"):
        resumed_run(run, EXPERIMENT, "demo", ["optim.lr=0.7"])


@pytest.mark.parametrize(
    "change", ["optim.lr=1e-5", "trainer.precision=32-true", "trainer.skip_loss_above=20", "trainer.rank_timeout=600"]
)
def test_what_a_stopped_run_advises_is_accepted(root: Path, change: str) -> None:
    key = change.partition("=")[0]
    allowed = () if key == "trainer.rank_timeout" else (key,)
    advice = (ROOT / "callbacks" / "nonfinite_guard.py").read_text()
    assert all(f"--allow-mismatch {one}" in advice for one in allowed)
    folder = root / load_experiment(EXPERIMENT, "demo", []).name / "20260301-110000-demo"
    config, _ = resumed_run(str(folder), EXPERIMENT, "demo", [change], allowed)
    assert str(flatten(config)[key]) == str(flatten(load_experiment(EXPERIMENT, "demo", [change]))[key])
