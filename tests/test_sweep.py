"""A sweep: its runs, figure and table."""

from pathlib import Path
from statistics import fmean, stdev

import pytest

from t2i_lm.plots.sweep import Outcome, draw_sweep, sweep_caption, sweep_table
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.sweep import main
from t2i_lm.training.sweep import ARMS, split_keys, sweep_jobs
from tests.plots.synthetic_runs import write_run

SWEPT = ["optim.lr=1e-3,3e-3", "seed=0,1"]


def test_keys_with_several_values_are_distinguished_from_lists_and_single_values() -> None:
    key, several, fixed = split_keys([*SWEPT, "freeze=[ffn,norm]", "trainer.max_steps=5", "optim.betas=[0.9,0.9]"])
    assert key == "optim.lr"
    assert several == {"optim.lr": ["1e-3", "3e-3"], "seed": ["0", "1"]}
    assert fixed == ["freeze=[ffn,norm]", "trainer.max_steps=5", "optim.betas=[0.9,0.9]"]
    assert split_keys(["seed=0,1"])[0] == "seed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1e-3"], "no key has several values"),
        (["optim.lr=1e-3,2e-3", "data.batch_size=8,16"], "optim.lr and data.batch_size have several values"),
        (["optim.lrr=1e-3,2e-3"], "did you mean 'optim.lr'"),
        (["optim.lr=1e-3,fast"], "optim.lr"),
        (["optim.lr=1e-3,0.001"], "two of the values are the same"),
        (["optim.lr=1e-3,2e-3", "--arm", "align"], "task=align has no loss of text or image tokens"),
        (["optim.lr=1e-3,2e-3", "--arm", "t2i_scrach"], "--arm t2i_scrach: expected one of align,"),
    ],
)
def test_an_impossible_sweep_is_refused_by_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_every_arm_runs_at_every_value_with_every_seed() -> None:
    _, jobs = sweep_jobs([*SWEPT, "run.dir=here", "samples.prompts=3"], ARMS, "demo")
    settings = {(job.config.name, job.config.optim.lr, job.config.seed) for job in jobs.values()}
    assert settings == {(arm, lr, seed) for arm in ARMS for lr in (1e-3, 3e-3) for seed in (0, 1)}
    for job in jobs.values():
        assert job.config.run.dir == "here/sweep"
        assert (job.config.samples.prompts, job.config.samples.preference_scenes) == (3, 0)


@pytest.mark.slow
def test_a_sweep_trains_the_remaining_runs_draws_and_compares_the_best(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["trainer.max_steps=2", "trainer.val_check_interval=2", "optim.warmup_steps=0", f"run.dir={tmp_path}"]
    command = ["optim.lr=1e-4,1e-2", *tiny, *short, "--out", str(tmp_path / "figures")]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert len(run_folders(tmp_path / "sweep")) == 4
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "figure_sweep_optim_lr.png",
        "figure_sweep_optim_lr.pdf",
    }
    assert "scratch - pretrained, each at its best (*):" in output
    assert main(command) == 0
    assert capsys.readouterr().out.count("(finished: ") == 4
    assert len(run_folders(tmp_path / "sweep")) == 4


def outcomes(root: Path) -> list[Outcome]:
    made = []
    for arm in ("pretrained", "scratch"):
        for value in ("0.003", "0.001", "0.009"):
            for seed in (0, 1):
                stamp = f"20260301-1{seed}{value[-1]}000"
                folder = write_run(root, f"t2i_{arm}", stamp, config={"optim.lr": float(value), "seed": seed})
                made.append(Outcome(arm, value, read_run(folder)))
    return made


def test_the_figure_shows_means_ranges_and_the_best(tmp_path: Path) -> None:
    found = outcomes(tmp_path)
    caption = sweep_caption("optim.lr", found)
    assert "bars ranges over seeds 0, 1" in caption
    assert "NOT CONTROLLED" not in caption
    image, text = draw_sweep("optim.lr", found, caption).axes
    assert image.get_xscale() == "log"
    assert [label.get_text() for label in image.get_xticklabels()] == ["0.003", "0.001", "0.009"]
    assert len(image.containers) == len(text.containers) == 2
    line = image.containers[0][0]
    assert list(line.get_xdata()) == [0.001, 0.003, 0.009]
    for place, value in enumerate(("0.001", "0.003", "0.009")):
        nll = [outcome.nll("image") for outcome in found if (outcome.arm, outcome.value) == ("pretrained", value)]
        assert line.get_ydata()[place] == pytest.approx(sum(filter(None, nll)) / 2)


def test_the_table_compares_at_equal_values_and_at_each_ones_best(tmp_path: Path) -> None:
    found = outcomes(tmp_path)
    table = sweep_table("optim.lr", found).splitlines()
    rows = [line for line in table if line.startswith("scratch ") and "best" not in line]
    assert len(rows) == 6  # three values, two modalities
    assert sum(row.endswith("*") for row in rows) == 2
    assert sum(line.startswith("scratch - pretrained, each at its best (*):") for line in table) == 2


def test_seeds_have_no_best_and_their_means_are_paired(tmp_path: Path) -> None:
    found = []
    for arm in ("pretrained", "scratch"):
        for seed in (0, 1, 2):
            folder = write_run(tmp_path, f"t2i_{arm}", f"20260301-1{seed}0000", config={"seed": seed})
            found.append(Outcome(arm, str(seed), read_run(folder)))
    table = sweep_table("seed", found)
    assert "*" not in table
    assert "best" not in table
    pretrained, scratch = ([run.nll("image") for run in found if run.arm == arm] for arm in ("pretrained", "scratch"))
    gaps = [theirs - ours for ours, theirs in zip(pretrained, scratch, strict=True)]
    stated = f"mean {fmean(gaps):+.4f} nats/token, standard deviation {stdev(gaps):.4f} (3 seeds)"
    assert f"scratch - pretrained, at equal seeds: {stated}" in table
    caption = sweep_caption("seed", found)
    assert "best" not in caption
    assert "seeds 0, 1, 2," in caption
    image, _ = draw_sweep("seed", found, caption).axes
    assert not [line for line in image.lines if (line.get_gid() or "").endswith("/best")]
    assert {line.get_linestyle() for line in image.lines} == {"None"}, "seeds have no order"
