"""A study: its runs, their state and cost; one trained, compared, drawn and continued."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from t2i_lm.collect import main as collect
from t2i_lm.comparison.arms import find_arms
from t2i_lm.comparison.grid_tables import grid_text
from t2i_lm.comparison.plan import setting_words
from t2i_lm.comparison.study_plan import DRAWN, read_study
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import RunConfig
from t2i_lm.plots.catalogue import FIGURES, stem
from t2i_lm.reporting.search import RunSearch
from t2i_lm.storage.run_folder import REPORT, read_run, run_folders
from t2i_lm.study import main
from t2i_lm.training import cost
from t2i_lm.training.cost import estimate
from t2i_lm.training.jobs import Job
from t2i_lm.training.remedies import read_strengths
from t2i_lm.training.study import (
    StudyRun,
    compare_arms,
    progress_of,
    progress_table,
    shown_runs,
    study_runs,
    without_relearning,
)
from t2i_lm.training.study_results import results_of
from tests.plots.synthetic_runs import write_relearning
from tests.runs import QUICK, Forked
from tests.study_folders import finish

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
    seen = [(run.seed, run.job.config.name, run.uses, run.job.config.run.dir) for run in runs]
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
    with_samples = [run for run in runs if run.job.config.samples.prompts > 0]
    assert with_samples == [run for run in runs if run.seed == 3 and "pretraining" in run.uses]


def test_a_value_of_a_setting_wins_over_one_for_every_run(plan: Path) -> None:
    runs = study_runs(read_study(plan), plan.parent, ["optim.lr=2e-3"])
    assert {run.job.config.optim.lr for run in runs if "slower" in run.uses} == {1e-4}
    assert {run.job.config.optim.lr for run in runs if "pretraining" in run.uses} == {2e-3}


def test_an_override_that_changes_no_run_is_refused_and_one_of_some_runs_is_named(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(plan), "--dry-run", "seed=5"]) == 2
    assert "error: seed='5': expected --seeds N with a study" in capsys.readouterr().err
    study_runs(read_study(plan), plan.parent, ["optim.lr=2e-3"])
    assert capsys.readouterr().err == "note: optim.lr=2e-3 has no effect in slower, where the plan sets optim.lr\n"
    plan.write_text("seeds: [0]\ncomparisons: {one: {where: {optim.lr: 1e-4}}}")
    assert main([str(plan), "--dry-run", "optim.lr=2e-3"]) == 2
    assert "optim.lr=2e-3: no effect on any run, the plan sets optim.lr itself" in capsys.readouterr().err
    slow, fast = (f"{{experiment: t2i_scratch, optim.lr: {lr}}}" for lr in ("1e-4", "1"))
    arms = f"{{slow: {slow}, t2i_scratch: {{}}, fast: {fast}}}"
    runs = configs(plan, f"seeds: [0]\ncomparisons: {{one: {{arms: {arms}}}}}", "optim.lr=2e-3")
    assert sorted(run.job.config.optim.lr for run in runs) == [1e-4, 2e-3, 1]


def configs(plan: Path, content: str, *overrides: str) -> list[StudyRun]:
    plan.write_text(content)
    return study_runs(read_study(plan), plan.parent, overrides)


def test_every_run_whose_samples_are_an_endpoint_has_some(plan: Path) -> None:
    endpoint = "primary: report.iid.preference.kind.preferred, margin: '0.02', secondary: []"
    rates = "{over: {optim.lr: [1e-3, 2e-3]}}"
    runs = configs(plan, f"seeds: [0, 1]\ncomparisons: {{plain: {{}}, measured: {{{endpoint}, {rates[1:]}}}")
    with_samples = {(run.seed, run.uses) for run in runs if run.job.config.samples.preference_scenes > 0}
    names = {use for _, uses in with_samples for use in uses}
    assert names == {"plain", "measured_optim.lr=1e-3", "measured_optim.lr=2e-3"}
    assert {seed for seed, uses in with_samples if uses != ("plain",)} == {0, 1}
    assert {seed for seed, uses in with_samples if uses == ("plain",)} == {0}


def test_seeds_are_trained_one_after_the_other_and_comparisons_of_fewer_seeds_last(plan: Path) -> None:
    runs = configs(plan, "seeds: [0, 1]\ncomparisons: {few: {seeds: [0], where: {optim.lr: 1e-4}}, all: {}}")
    assert [(run.uses, run.seed) for run in runs] == [
        *[(("all",), seed) for seed in (0, 0, 1, 1)],
        (("few",), 0),
        (("few",), 0),
    ]


def test_arms_have_settings_of_their_own_and_a_shared_config_is_one_run(plan: Path) -> None:
    arms = "{t2i_pretrained: {optim.lr: 1e-3}, low: {experiment: t2i_scratch, optim.lr: 1e-4}, t2i_scratch: {}}"
    runs = configs(plan, f"seeds: [0]\ncomparisons: {{one: {{arms: {arms}}}, two: {{}}}}", "run.dir=here")
    seen = {(run.job.config.name, run.job.config.optim.lr): (run.uses, run.job.config.run.dir) for run in runs}
    assert seen == {
        ("t2i_pretrained", 1e-3): (("one_t2i_pretrained",), "here/study/optim.lr=1e-3"),
        ("t2i_scratch", 1e-4): (("one_low",), "here/study/optim.lr=1e-4"),
        ("t2i_scratch", 3e-3): (("one_t2i_pretrained", "one_low", "two"), "here/study"),
        ("t2i_pretrained", 3e-3): (("two",), "here/study"),
    }
    shown = {run.job.config.optim.lr for run in runs if any(role.shown for role in run.roles.values())}
    assert shown == {1e-3, 3e-3}, "an arm of another name than its experiment's is in no figure"
    table = progress_table(runs, progress_of(runs))
    assert "one  low             optim.lr=1e-4  missing" in table


def test_points_of_a_grid_have_no_samples_unless_another_comparison_shows_the_run(plan: Path, tmp_path: Path) -> None:
    grid = "grid: {over: {optim.lr: [1e-3, 3e-3]}}"
    for order in (f"{{plain: {{}}, {grid}}}", f"{{{grid}, plain: {{}}}}"):
        runs = configs(plan, f"seeds: [0]\ncomparisons: {order}", f"run.dir={tmp_path}")
        sampled = {(run.job.config.optim.lr, run.job.config.samples.prompts > 0) for run in runs}
        assert (len(runs), sampled) == (4, {(1e-3, False), (3e-3, True)})
    finish([run for run in runs if "plain" in run.uses], lambda _: 1.0)
    alone = configs(plan, f"seeds: [0]\ncomparisons: {{{grid}}}", f"run.dir={tmp_path}")
    assert [str(state) for state in progress_of(alone)] == ["missing", "missing", "finished", "finished"]


def test_a_grid_over_steps_takes_warm_up_and_intervals_along(plan: Path) -> None:
    over = "over: {trainer.max_steps: [300, 1200, 4800]}"
    runs = configs(plan, f"seeds: [0]\ncomparisons: {{one: {{{over}}}}}", "run.dir=here")
    seen = {
        config.trainer.max_steps: (config.optim.warmup_steps, config.trainer.val_check_interval, config.log.interval)
        for config in (run.job.config for run in runs)
    }
    assert seen == {300: (10, 100, 2), 1200: (40, 400, 10), 4800: (160, 1600, 40)}
    folders = {run.job.config.run.dir for run in runs}
    assert folders == {"here/study", "here/study/trainer.max_steps=300", "here/study/trainer.max_steps=4800"}
    fixed = configs(plan, f"seeds: [0]\ncomparisons: {{one: {{{over}, where: {{optim.warmup_steps: 7}}}}}}")
    assert {run.job.config.optim.warmup_steps for run in fixed} == {7}
    short = configs(plan, "seeds: [0]\ncomparisons: {one: {over: {trainer.max_steps: [20, 40, 80]}}}")
    assert {(run.job.config.trainer.max_steps, run.job.config.optim.warmup_steps) for run in short} == {
        (20, 1),
        (40, 1),
        (80, 3),
    }, "less than the experiment's warm-up"


def test_steps_of_a_comparison_take_warm_up_and_intervals_along(plan: Path) -> None:
    runs = configs(plan, "seeds: [0]\ncomparisons: {one: {where: {trainer.max_steps: 300, log.interval: 5}}}")
    seen = {
        (one.trainer.max_steps, one.optim.warmup_steps, one.trainer.val_check_interval, one.log.interval)
        for one in (run.job.config for run in runs)
    }
    assert seen == {(300, 10, 100, 5)}


def test_a_plan_measures_rounding_by_other_threads(plan: Path, tmp_path: Path) -> None:
    content = "seeds: [0, 1]\nsecondary: []\nrounding: 3\ncomparisons: {one: {}, two: {where: {optim.lr: 1e-3}}}"
    runs = configs(plan, content, f"run.dir={tmp_path}")
    repeated = [run for run in runs if run.repeats]
    assert [(run.job.config.name, run.seed, run.uses) for run in repeated] == [
        ("t2i_pretrained", 0, ("one",)),
        ("t2i_scratch", 0, ("one",)),
    ]
    assert "one  t2i_pretrained  trainer.threads=3  missing" in progress_table(runs, progress_of(runs))
    finish([run for run in runs if not run.repeats], lambda _: 1.0)
    assert [str(state) for state in progress_of(repeated)] == ["missing", "missing"]
    finish(repeated, lambda _: 1.01, first=50, threads=3)
    assert all(state.finished for state in progress_of(runs))
    folders = [state.folder for state in progress_of(runs)]
    assert len(set(folders)) == len(folders)
    one, two = compare_arms(read_study(plan), runs)
    assert one.arms is not None
    assert not any("rounding" in note for note in one.arms.notes)
    assert one.results[0].rounding_sd == pytest.approx(0.01 / 2**0.5)
    assert two.results[0].rounding_sd is None
    with pytest.raises(ValueError, match=r"rounding=3: expected another number than trainer.threads"):
        configs(plan, content, "trainer.threads=3")


def test_a_setting_of_the_whole_study_is_shown(plan: Path) -> None:
    steps = "where: {trainer.max_steps: 300}"
    content = f"seeds: [0]\ncomparisons: {{one: {{{steps}, over: {{optim.lr: [1e-3, 3e-3]}}}}, two: {{{steps}}}}}"
    shown = [run.job.config for run in configs(plan, content) if any(role.shown for role in run.roles.values())]
    assert {(one.trainer.max_steps, one.optim.lr) for one in shown} == {(300, 3e-3)}


def test_of_several_settings_of_an_experiment_one_is_shown(plan: Path, tmp_path: Path) -> None:
    content = "seeds: [0]\ncomparisons: {one: {where: {optim.lr: 1e-3}}, two: {where: {optim.lr: 1e-4}}}"
    runs = configs(plan, content, f"run.dir={tmp_path}")
    finish(runs, lambda _: 1.0)
    shown, _ = shown_runs(runs)
    assert [(run.config["name"], run.config["optim"]["lr"]) for run in shown] == [
        ("t2i_pretrained", 1e-3),
        ("t2i_scratch", 1e-3),
    ]


def test_runs_of_an_equal_config_stand_for_each_other_whatever_plan_made_them(plan: Path, tmp_path: Path) -> None:
    where = f"run.dir={tmp_path}"
    made = configs(plan, "seeds: [0]\ncomparisons: {one: {where: {optim.lr: 1e-3, data.batch_size: 8}}}", where)
    finish(made, lambda _: 1.0)
    content = "seeds: [0]\ncomparisons: {two: {over: {data.batch_size: [8, 16]}, where: {optim.lr: 0.001}}}"
    runs = configs(plan, content, where)
    assert [str(state) for state in progress_of(runs)] == ["finished", "finished", "missing", "missing"]
    two = compare_arms(read_study(plan), runs)[0]
    assert two.arms is not None
    assert "2 of 4 runs to train, 2,400 steps; about 0:04:00, by 2 finished runs" in estimate(
        runs, progress_of(runs), 1
    )
    for file in tmp_path.rglob("env.json"):  # runs of code that computes other numbers stand for none
        file.write_text(json.dumps({**json.loads(file.read_text()), "numerics": 99}))
    assert {str(state) for state in progress_of(runs)} == {"missing"}


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["run", "experiment", "setting"])
def test_finished_runs_on_another_disk_behind_a_link_are_not_missing(depth: int, plan: Path, tmp_path: Path) -> None:
    content = "seeds: [0]\ncomparisons: {one: {where: {optim.lr: 1e-3}}}"
    runs = configs(plan, content, f"run.dir={tmp_path}/runs")
    folder = finish(runs, lambda _: 1.0)[0]
    linked = (folder, *folder.parents)[depth]
    linked.rename(tmp_path / "moved")
    linked.symlink_to(tmp_path / "moved")
    assert [str(state) for state in progress_of(runs)] == ["finished", "finished"]
    study = read_study(plan)
    (compared,) = study.plans().values()
    assert len(find_arms(compared, tmp_path / "runs").runs) == 2
    assert RunSearch(tmp_path / "runs").comparisons(study, strict=True)[0].arms is not None


def test_collected_results_are_finished_runs_and_nothing_is_trained_among_them(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = configs(plan, "seeds: [0]\ncomparisons: {one: {}}", f"run.dir={tmp_path}/runs")
    finish(made[:1], lambda _: 1.0)
    results = tmp_path / "results"
    assert collect(["--runs", str(tmp_path / "runs"), "--out", str(results)]) == 0
    elsewhere = [f"run.dir={tmp_path}/new"]
    assert {str(state) for state in progress_of(study_runs(read_study(plan), plan.parent, elsewhere))} == {"missing"}
    runs = study_runs(read_study(plan), plan.parent, elsewhere, results)
    assert [str(state) for state in progress_of(runs)] == ["finished", "missing"]
    finish(runs[1:], lambda _: 1.0)
    both = compare_arms(read_study(plan), runs)[0].arms
    assert both is not None
    assert [run.folder.is_relative_to(results) for run in both.runs] == [True, False]
    capsys.readouterr()
    assert main([str(plan), f"run.dir={results}"]) == 2
    assert f"error: {results / 'study'} holds collected results" in capsys.readouterr().err
    assert main([str(plan), "--results", str(tmp_path / "nowhere")]) == 2
    assert f"error: --results {tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err
    inside = study_runs(read_study(plan), plan.parent, elsewhere, results / "study")
    assert [state.folder for state in progress_of(inside)] == [state.folder for state in progress_of(runs)]
    assert main([str(plan), "--results", str(tmp_path / "new" / "study" / "t2i_scratch")]) == 2
    assert "t2i_scratch: expected a folder that holds study, or study itself" in capsys.readouterr().err


def test_collected_results_without_samples_stand_for_runs_that_show_some_but_measure_none(
    plan: Path, tmp_path: Path
) -> None:
    where = f"run.dir={tmp_path}/runs"
    made = configs(plan, "seeds: [0]\ncomparisons: {one: {}}", where, "samples.prompts=0")
    finish(made, lambda _: 1.0)
    results = tmp_path / "results"
    assert collect(["--runs", str(tmp_path / "runs"), "--out", str(results)]) == 0

    def states(secondary: str) -> set[str]:
        plan.write_text(f"seeds: [0]\nsecondary: [{secondary}]\ncomparisons: {{one: {{}}}}")
        runs = study_runs(read_study(plan), plan.parent, [f"run.dir={tmp_path}/new"], results)
        return {str(state) for state in progress_of(runs)}

    assert states("val.text.nll") == {"finished"}
    assert states("report.iid.preference.kind.preferred") == {"missing"}
    plain = configs(plan, "seeds: [0]\ncomparisons: {one: {}}", where)
    assert {str(state) for state in progress_of(plain)} == {"missing"}, "can be trained with samples"


def test_the_cost_is_that_of_each_setting_else_of_alike_runs_elsewhere(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: dict[int, float | None] = {16: 1.0, 32: 3.0}  # seconds per step, by batch size
    monkeypatch.setattr(cost, "step_seconds", lambda config: times[config.data.batch_size])
    monkeypatch.setattr(cost, "steps_in_all", lambda config: config.trainer.max_steps)
    content = "seeds: [0, 1]\ncomparisons: {one: {arms: {t2i_pretrained: {data.batch_size: 32}, t2i_scratch: {}}}}"
    where = f"run.dir={tmp_path}"
    runs = configs(plan, content, where)
    timed = "by training steps timed on this machine"
    assert estimate(runs, progress_of(runs), 2) == f"4 of 4 runs to train, 4,800 steps; about 2:40:00, {timed}"
    times[32] = None  # as the mean of the others
    assert estimate(runs, progress_of(runs), 2) == f"4 of 4 runs to train, 4,800 steps; about 1:20:00, {timed}"
    times[16] = None
    assert estimate(runs, progress_of(runs), 1).endswith("their time is estimated once a run is finished")
    (other,) = [run for run in configs(plan, "comparisons: {one: {}}", "run.dir=x") if run.uses == ("one",)][:1]
    config = replace(other.job.config, run=RunConfig(str(tmp_path)))
    finish([StudyRun({}, 0, Job(config))], lambda _: 1.0)
    words = estimate(runs, progress_of(runs), 1)
    assert "; about 0:08:00, by 1 finished runs of the same scale and size outside of the study, the newest " in words
    finish(runs[:2], lambda _: 1.0)
    for run, seconds in zip(runs[:2], (3200, 160), strict=True):
        report = next(Path(run.job.config.run.dir).glob(f"{run.job.config.name}/*/report.json"))
        report.write_text(json.dumps({**json.loads(report.read_text()), "wall_s": seconds}))
    assert "2 of 4 runs to train, 2,400 steps; about 0:56:00, by 2 finished runs" in estimate(
        runs, progress_of(runs), 1
    )


def test_a_missing_path_is_named_before_anything_is_trained(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "step_seconds", lambda config: 1.0)
    plan.write_text(
        "seeds: [0, 1]\ncomparisons: {one: {arms: {dose: {experiment: t2i_pretrained, backbone.path: no/where}, "
        "t2i_scratch: {}}}}"
    )
    words = "missing path: backbone.path=no/where (2 runs to train)"
    assert main([str(plan), "--dry-run", f"run.dir={tmp_path}"]) == 2
    output = capsys.readouterr()
    assert "4 of 4 runs to train" in output.out
    assert words in output.err
    assert main([str(plan), f"run.dir={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    own = "{other: {experiment: t2i_scratch, backbone.path: null, backbone.config: %s}, t2i_scratch: {}}"
    for name, code in (("no/where.json", 2), ("demo_7m", 0)):
        plan.write_text(f"seeds: [0]\ncomparisons: {{one: {{arms: {own % name}}}}}")
        assert main([str(plan), "--dry-run", f"run.dir={tmp_path}"]) == code
        assert ("missing path: backbone.config=no/where.json" in capsys.readouterr().err) == bool(code)


def test_runs_whose_relearning_is_an_endpoint_are_measured_once(plan: Path, tmp_path: Path) -> None:
    where = f"run.dir={tmp_path}/runs"
    content = "seeds: [0]\ncomparisons: {one: {secondary: [relearning.step_10.nll]}, two: {where: {optim.lr: 1e-4}}}"
    runs = configs(plan, content, where)
    study = read_study(plan)
    assert without_relearning(study, runs) == []
    finish(runs, lambda _: 1.0)
    folders = without_relearning(study, runs)
    assert [(folder.parent.name, folder.parents[1].name) for folder in folders] == [
        ("t2i_pretrained", "study"),
        ("t2i_scratch", "study"),
    ]
    write_relearning(folders[0], 9.0)
    assert without_relearning(study, runs) == folders[1:]
    write_relearning(folders[1], 9.0)
    assert collect(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]) == 0
    again = study_runs(study, plan.parent, [f"run.dir={tmp_path}/new"], tmp_path / "results")
    assert without_relearning(study, again) == []
    one = compare_arms(study, again)[0]
    assert [result.endpoint.name for result in one.results] == ["val/iid.image.nll", "relearning.step_10.nll"]


@pytest.mark.parametrize("file", sorted((EXPERIMENTS / "plans").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_plan_names_its_question_endpoint_margin_and_cost(file: Path) -> None:
    text = file.read_text()
    assert "?" in text.splitlines()[0]
    assert "# Cost: " in text
    if file.stem == "pretraining":  # of `compare`
        return
    if file.stem == "remedies":  # of `remedies`
        assert read_strengths(file)
        return
    study = read_study(file)
    assert "primary: " in text
    assert "margin: " in text
    seen = set()
    for need in study.needed(1):
        for arm in need.arms:
            kind = (arm.experiment, *need.where, *arm.own)  # the values of a key are of one type
            if kind not in seen:
                seen.add(kind)
                words = setting_words({**need.where, **arm.own})
                load_experiment(EXPERIMENTS / f"{arm.experiment}.yaml", need.scale, words)


def test_the_shipped_study_is_complete() -> None:
    study = read_study(EXPERIMENTS / "study.yaml")
    runs = study_runs(study, EXPERIMENTS)
    assert {name for run in runs for name in run.uses} == {*study.plans(), *study.runs}
    for name in study.plans():
        assert {run.seed for run in runs if name in run.uses} == set(study.seeds)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("comparisons: {one: {arms: [t2i_pretrained, t2i_scrach]}}", "no experiment t2i_scrach in "),
        ("comparisons: {one: {arm: [a, b]}}", "unknown key comparisons.one.'arm'; did you mean 'arms'"),
        ("comparisons: {one: 3}", "comparisons.one=3: expected keys and values"),
        ("comparisons: {one: null}\nruns: {one: {arms: [t2i_scratch]}}", "comparisons.one=None: expected keys and"),
        ("comparisons: {one: {}}\nruns: {one: {arms: [t2i_scratch]}}", "a name that comparisons and runs do not share"),
        ("comparisons: {one: {seeds: []}}", "comparisons.one.seeds=[]: expected at least one seed"),
        ("runs: {one: {arms: []}}", "runs.one.arms=[]: expected at least one experiment"),
        ("runs: {one: {arms: [t2i_scratch], seeds: []}}", "runs.one.seeds=[]: expected at least one seed"),
        ("comparisons:\n  one: {}\n  one: {}", "is not YAML: line 3: the key 'one' occurs twice"),
        ("comparisons: {one: {over: {optim.lr: [3e-3, 0.003]}}}", "comparisons.one.over.optim.lr=['3e-3', 0.003]: "),
        (
            "comparisons: {one: {arms: {a: {experiment: b, optim.lr: 3e-3}, c: {experiment: b, optim.lr: 0.003}}}}",
            "comparisons.one.arms.c={'experiment': 'b', 'optim.lr': 0.003}: expected another",
        ),
        (
            "comparisons: {one: {arms: {a: {experiment: t2i_scratch, optim.lr: 3e-3}, t2i_scratch: {}}}}",
            "one: the arms a and t2i_scratch have equal configs",
        ),
        (
            "comparisons: {one: {arms: {a: {experiment: t2i_scratch, data.workers: 1}, t2i_scratch: {}}}}",
            "expected arms that differ in a key that changes what a run computes or reports",
        ),
        (
            "runs: {one: {arms: [t2i_scratch], where: {optim.rl: 1}}}",
            "runs.one.where.optim.rl=1: expected a config key",
        ),
        (
            "runs: {one: {arms: [t2i_scratch], where: {seed: 4}}}",
            "runs.one.where.seed=4: expected another key than seed",
        ),
        (
            "comparisons: {one: {where: {name: foo}}}",
            "comparisons.one.where.name='foo': expected another key than seed",
        ),
        (
            "comparisons: {one: {where: {optim: null}}}",
            "comparisons.one.where.optim: optim is a section of keys, such as",
        ),
        (
            "comparisons: {one: {arms: ['', t2i_scratch]}}",
            "comparisons.one.arms=['', 't2i_scratch']: expected names of",
        ),
        ("seeds: [0]", "comparisons={}: expected at least one comparison"),
        ("seeds: zero\ncomparisons: {one: {}}", "seeds='zero': expected a list of whole numbers"),
        ("comparisons: {1: {}}", "comparisons.1: Key 1 (int)"),
        ("comparisons: {one: {where: {data.path: 2024-01-01}}}", "comparisons.one.where.data.path: Value 'date'"),
        ("alpha: much\ncomparisons: {one: {}}", "alpha='much': expected a number"),
        ("comparisons: [one]", "comparisons=['one']: expected keys and values"),
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


def test_drawing_a_study_without_a_finished_run_is_refused(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(plan), "--no-train", f"run.dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: --no-train: no run of {plan} is finished, so there is nothing to draw\n"


def test_too_many_seeds_are_refused(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plan), "--dry-run", "--seeds", "3"]) == 2
    assert "--seeds=3: expected 1 to 2" in capsys.readouterr().err


def test_seeds_of_a_comparison_are_counted_and_its_first_one_has_samples(plan: Path) -> None:
    plan.write_text("comparisons: {one: {seeds: [5, 6, 7, 8]}}\nruns: {more: {arms: [t2i_shuffled]}}")
    study = read_study(plan)
    runs = study_runs(study, plan.parent)
    assert {run.seed for run in runs if run.job.config.samples.prompts} == {5}
    seeds = {count: {run.seed for run in study_runs(study, plan.parent, seeds=count)} for count in (1, 4)}
    assert seeds == {1: {5, 0}, 4: {5, 6, 7, 8, 0}}
    with pytest.raises(ValueError, match="--seeds=5: expected 1 to 4, the seeds of the plan"):
        study_runs(study, plan.parent, seeds=5)


def test_a_part_of_the_planned_seeds_chooses_best_values_and_has_no_verdict(plan: Path, tmp_path: Path) -> None:
    plan.write_text("seeds: [0, 1, 2]\nsecondary: []\ncomparisons: {one: {over: {optim.lr: [1e-3, 2e-3]}}}")
    study = read_study(plan)

    def loss(config: ExperimentConfig) -> float:
        return 1 + 0.1 * (config.optim.lr != 2e-3) + (config.name == "t2i_scratch")

    def tables(seeds: int | None) -> str:
        runs = study_runs(study, plan.parent, [f"run.dir={tmp_path}"], seeds=seeds)
        return grid_text(results_of(study, compare_arms(study, runs), seeds=seeds).grids[0])

    finish(study_runs(study, plan.parent, [f"run.dir={tmp_path}"]), loss)
    table = tables(2)
    assert "t2i_scratch: best optim.lr 2e-3, at the EDGE of the grid" in table
    assert "undecided, 1 of 3 seeds missing" in table
    assert "corrected for 0 p-values" in table
    assert "is lower" not in table
    assert "one_optim.lr=2e-3: MISSING: seed 2 of t2i_scratch" in table
    assert "t2i_pretrained is lower" in tables(None)
    for report in [*tmp_path.rglob("report.json")][:1]:
        report.unlink()
    assert "no best value: MISSING at optim.lr=" in tables(None)


def test_without_a_pair_the_command_that_trains_the_plan_is_named(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_lm.reporting.study_page.write_page", lambda *_: 0)
    where = f"run.dir={tmp_path / 'my runs'}"
    finish(configs(plan, "seeds: [0]\ncomparisons: {one: {}}", where)[:1], lambda _: 1.0)
    assert main([str(plan), "--no-train", "--out", str(tmp_path / "out"), where]) == 2
    assert f"to make them: python -m t2i_lm.study {plan} '{where}'\n" in capsys.readouterr().err


def test_a_value_in_two_spellings_is_one_run_and_finds_runs_of_either(plan: Path, tmp_path: Path) -> None:
    where = f"run.dir={tmp_path}"
    text = "seeds: [0]\nrounding: 3\ncomparisons: {one: {over: {optim.lr: [6e-3, 1e-3]}}, two: {where: {optim.lr: %s}}}"
    runs = configs(plan, text % "0.006", where)
    assert [(run.uses, Path(run.job.config.run.dir).name) for run in runs if run.job.config.optim.lr == 6e-3] == [
        *[(("one_optim.lr=6e-3", "two"), "optim.lr=0.006")] * 2,
        *[(("one_optim.lr=6e-3",), "optim.lr=0.006_trainer.threads=3")] * 2,
    ]
    finish(runs, lambda _: 1.0)
    other = configs(plan, (text % "6e-3").replace("over: {optim.lr: [6e-3", "over: {optim.lr: [0.006"), where)
    assert "optim.lr=6e-3_trainer.threads=3" in {Path(run.job.config.run.dir).name for run in other}
    assert {str(state) for state in progress_of(other)} == {"finished"}
    found = RunSearch(tmp_path).comparisons(read_study(plan), strict=True)
    assert [one.name for one in found if one.arms is None] == []
    steps = "{where: {trainer.max_steps: %s}}"
    shown = configs(plan, f"seeds: [0]\ncomparisons: {{one: {steps % '3e2'}, two: {steps % 300}}}")
    assert len(shown) == 2
    assert all(role.shown for run in shown for role in run.roles.values() if role.group == "one")


def test_the_figures_that_no_result_is_named_after_are_those_of_the_catalogue() -> None:
    assert {Path(name).stem for name in DRAWN} == {*map(stem, FIGURES)}


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
    assert "2 of 2 runs to train, 4 steps; about 0:00:0" in output
    assert "by training steps timed on this machine" in output
    assert "undecided, one pair" in output
    assert len(run_folders(tmp_path / "study")) == 2

    words = [word for word in command[1:] if "=" in word]
    runs = study_runs(read_study(plan), plan.parent, words)
    states = progress_of(runs)
    assert [str(state) for state in states] == ["finished", "finished", "missing", "missing"]
    assert "t2i_scratch     finished  missing" in progress_table(runs, states)
    assert "2 of 4 runs to train, 4 steps; about 0:00:" in estimate(runs, states, 1)

    assert main([*command, "--no-train", "--results", str(tmp_path / "study")]) == 0
    assert len(run_folders(tmp_path / "study")) == 2
    output = capsys.readouterr().out
    assert "to train" not in output
    assert "MISSING: seed 4 of t2i_scratch" in output

    assert main(command) == 0
    assert len(run_folders(tmp_path / "study")) == 4
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pretraining.txt", "pretraining.json", "figure3.png", "figure4.png", "report.html"} <= out
    content = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert content["seeds"] == [3, 4]
    assert len(content["runs"]) == 4


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(plan: Path, tiny: list[str], tmp_path: Path) -> None:
    """kill -9 in the second run: the first is not trained again, the second goes on in its own folder."""
    plan.write_text("seeds: [3]\nsecondary: []\ncomparisons: {pretraining: {}}\n")
    steps = ["trainer.max_steps=20", "trainer.val_check_interval=20", "trainer.checkpoint_interval=1", "log.interval=1"]
    command = [str(plan), *tiny, *steps, f"run.dir={tmp_path}", "--out", str(tmp_path / "out"), *QUICK]
    process = Forked("t2i_lm.study", *command)
    wait_until(lambda: len(list(tmp_path.glob("study/t2i_scratch/*/checkpoints/*.ckpt"))) > 0, process)
    process.signal_group(signal.SIGKILL)
    process.communicate()
    first, second = (run_folders(tmp_path / "study", name) for name in ("t2i_pretrained", "t2i_scratch"))
    assert ((first[0] / REPORT).exists(), (second[0] / REPORT).exists()) == (True, False)
    before = (first[0] / "metrics.jsonl").read_bytes()

    assert main(command) == 0
    assert [run_folders(tmp_path / "study", name) for name in ("t2i_pretrained", "t2i_scratch")] == [first, second]
    assert (first[0] / "metrics.jsonl").read_bytes() == before
    assert [line["step"] for line in read_run(second[0]).records("train")] == list(range(1, 21))
    assert json.loads((tmp_path / "out" / "pretraining.json").read_text())["seeds"] == [3]


def wait_until(done: Callable[[], bool], process: Forked) -> None:
    deadline = time.monotonic() + 240
    while not done():
        assert process.poll() is None, "the study was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
