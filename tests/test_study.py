"""A study: its runs, their state and cost; one trained, compared, drawn and continued."""

import json
from pathlib import Path

import pytest

from t2i_lm.comparison.plan import read_study
from t2i_lm.storage.run_folder import run_folders
from t2i_lm.study import main
from t2i_lm.training.study import estimate, progress_of, progress_table, study_runs

EXPERIMENTS = Path("experiments")
PLAN = """
seeds: [3, 4]
secondary: [val.text.nll]
comparisons:
  pretraining: {arms: [t2i_pretrained, t2i_scratch]}
  slower: {arms: [t2i_pretrained, t2i_scratch], where: {optim.lr: 1e-4}, secondary: []}
runs:
  shuffled: {arms: [t2i_shuffled]}
  again: {arms: [t2i_pretrained]}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan beside copies of the experiments that it names."""
    folder = tmp_path / "experiments"
    (folder / "scale").mkdir(parents=True)
    for name in ("base", "scale/demo", "t2i_pretrained", "t2i_scratch", "t2i_shuffled"):
        (folder / f"{name}.yaml").write_text((EXPERIMENTS / f"{name}.yaml").read_text())
    (folder / "study.yaml").write_text(PLAN)
    return folder / "study.yaml"


def test_a_study_has_each_run_once_seed_by_seed_in_the_folder_of_its_setting(plan: Path) -> None:
    runs = study_runs(read_study(plan), plan.parent, ["run.dir=here"])
    seen = [(run.seed, run.arm, run.uses, run.job.config.run.dir) for run in runs]
    assert seen == [
        (3, "t2i_pretrained", ("pretraining", "again"), "here/study"),
        (3, "t2i_scratch", ("pretraining",), "here/study"),
        (3, "t2i_pretrained", ("slower",), "here/study/optim.lr=1e-4"),
        (3, "t2i_scratch", ("slower",), "here/study/optim.lr=1e-4"),
        (3, "t2i_shuffled", ("shuffled",), "here/study"),
        (4, "t2i_pretrained", ("pretraining",), "here/study"),
        (4, "t2i_scratch", ("pretraining",), "here/study"),
        (4, "t2i_pretrained", ("slower",), "here/study/optim.lr=1e-4"),
        (4, "t2i_scratch", ("slower",), "here/study/optim.lr=1e-4"),
    ]
    assert {run.job.config.samples.prompts > 0 for run in runs if run.seed == 3} == {True}
    assert {run.job.config.samples.prompts > 0 for run in runs if run.seed == 4} == {False}


def test_a_value_of_a_setting_wins_over_one_for_every_run(plan: Path) -> None:
    runs = study_runs(read_study(plan), plan.parent, ["optim.lr=2e-3"])
    assert {run.job.config.optim.lr for run in runs if "slower" in run.uses} == {1e-4}
    assert {run.job.config.optim.lr for run in runs if "pretraining" in run.uses} == {2e-3}


def test_the_shipped_study_is_complete() -> None:
    study = read_study(EXPERIMENTS / "study.yaml")
    runs = study_runs(study, EXPERIMENTS)
    assert {name for run in runs for name in run.uses} == {*study.comparisons, *study.runs}
    assert {run.seed for run in runs if "pretraining" in run.uses} == set(study.seeds)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("comparisons: {one: {arms: [t2i_pretrained, t2i_scrach]}}", "no experiment t2i_scrach; expected one of"),
        ("comparisons: {one: {arm: [a, b]}}", "unknown key comparisons.one.'arm'; did you mean 'arms'"),
        ("comparisons: {one: 3}", "one=3: expected keys and values"),
        ("runs: {one: {arms: [t2i_scratch], where: {optim.rl: 1}}}", "unknown key 'optim.rl'"),
        ("seeds: [0]", "comparisons={}: expected at least one comparison"),
        ("seeds: zero\ncomparisons: {one: {}}", "seeds"),
    ],
)
def test_a_faulty_study_is_refused_by_name(
    content: str, words: str, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.write_text(content)
    assert main([str(plan), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_too_many_seeds_are_refused(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plan), "--dry-run", "--seeds", "3"]) == 2
    assert "--seeds=3: expected 1 to 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_trains_compares_draws_and_goes_on(
    plan: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.write_text("seeds: [3, 4]\nsecondary: []\ncomparisons: {pretraining: {}}\n")
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "optim.warmup_steps=0", "log.interval=1"]
    command = [str(plan), *tiny, *steps, f"run.dir={tmp_path}", "--out", str(tmp_path / "out"), "samples.prompts=0"]
    command += ["samples.preference_scenes=0"]
    assert main([*command, "--seeds", "1"]) == 0
    output = capsys.readouterr().out
    assert "2 of 2 runs to train, 4 steps; their time is estimated once a run is finished" in output
    assert "undecided, one pair" in output
    assert len(run_folders(tmp_path / "study")) == 2

    words = [word for word in command[1:] if "=" in word]
    runs = study_runs(read_study(plan), plan.parent, words)
    states = progress_of(runs)
    assert [str(state) for state in states] == ["finished", "finished", "missing", "missing"]
    assert "t2i_scratch     finished  missing" in progress_table(runs, states)
    assert "2 of 4 runs to train, 4 steps; about 0:00:" in estimate(runs, states, 1)

    assert main(command) == 0
    assert len(run_folders(tmp_path / "study")) == 4
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pretraining.txt", "pretraining.json", "figure3.png", "figure4.png", "report.html"} <= out
    content = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert content["seeds"] == [3, 4]
    assert len(content["runs"]) == 4
