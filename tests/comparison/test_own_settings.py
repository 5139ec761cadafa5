"""Arms with settings of their own: forms of a plan, what they allow to differ, and what stays refused."""

from pathlib import Path
from typing import Any

import pytest

from t2i_lm.comparison.arms import find_arms
from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.comparison.compare import DIFFERENCE, UNDECIDED, compare
from t2i_lm.comparison.plan import Plan, parse_arms, read_plan
from t2i_lm.comparison.study_plan import Study, read_study
from t2i_lm.comparison.tables import setting, text
from tests.comparison.test_compare import seeded_run, set_environment

RATES, OTHERS, STEPS = (
    f"{{over: {{{values}}}}}"
    for values in ("optim.lr: [1, 2]", "data.batch_size: [8, 16]", "trainer.max_steps: [100, 200, 400]")
)
OWN = {"t2i_pretrained": {"optim.lr": 0.001}, "t2i_scratch": {"optim.lr": 0.004}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Both arms at their own rates, and both at the other's."""
    for seed in range(5):
        for day, (rates, gap) in enumerate((((0.001, 0.004), -0.1), ((0.004, 0.001), 0.2))):
            for name, rate in zip(OWN, rates, strict=True):
                folder = tmp_path / f"rate={rate}"
                seeded_run(
                    folder, name, seed, 10 * day + 1, gap * (name == "t2i_pretrained"), config={"optim.lr": rate}
                )
    return tmp_path


def test_arms_are_names_or_settings_by_name() -> None:
    named = parse_arms(["t2i_pretrained", "t2i_scratch"])
    assert named == parse_arms({"t2i_pretrained": None, "t2i_scratch": "t2i_scratch"})
    high = parse_arms({"high": {"experiment": "t2i_scratch", "optim.lr": 0.006}})["high"]
    assert (high.name, high.experiment, high.own) == ("high", "t2i_scratch", {"optim.lr": 0.006})


def test_each_arm_has_the_runs_of_its_own_setting(runs: Path) -> None:
    plan = Plan(arms=OWN, seeds=[0, 1, 2, 3, 4])
    arms = find_arms(plan, runs)
    assert {run.config["optim"]["lr"] for seeded in arms.first.values() for run in seeded} == {0.001}
    assert {run.config["optim"]["lr"] for seeded in arms.second.values() for run in seeded} == {0.004}
    primary = compare(plan, arms)[0]
    assert primary.verdict == DIFFERENCE
    assert primary.statistics.mean == pytest.approx(-0.1, abs=0.01)
    assert "t2i_pretrained optim.lr=0.001, t2i_scratch optim.lr=0.004" in setting(plan, arms)


def test_two_arms_may_be_one_experiment(runs: Path) -> None:
    forms = {name: {"experiment": "t2i_scratch", "optim.lr": rate} for name, rate in (("low", 0.001), ("high", 0.004))}
    plan = Plan(arms=forms, seeds=[0, 1, 2, 3, 4])
    arms = find_arms(plan, runs)
    assert len(arms.runs) == 10
    assert "low - high, paired by seed" in text(plan, arms, compare(plan, arms))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optim.warmup_steps": 5}, r"optim\.warmup_steps: "),
        ({"trainer.max_steps": 200}, r"trainer\.max_steps: "),
        ({"data.batch_size": 16}, r"data\.batch_size: "),
    ],
)
def test_no_other_key_may_differ_between_arms(change: dict[str, Any], named: str, runs: Path) -> None:
    for seed in range(5):
        seeded_run(runs, "t2i_pretrained", seed, 21, config={"optim.lr": 0.002, **change})
    with pytest.raises(IncomparableError, match=named):
        find_arms(Plan(arms={**OWN, "t2i_pretrained": {"optim.lr": 0.002}}), runs)


def test_runs_of_one_arm_share_its_setting_and_its_initial_weights(runs: Path) -> None:
    with pytest.raises(IncomparableError, match=r"optim\.lr: 0\.001 \(5 runs\), 0\.004 \(5 runs\)"):
        find_arms(Plan(arms={"t2i_pretrained": {"optim.warmup_steps": 20}, "t2i_scratch": {"optim.lr": 0.001}}), runs)
    seeded_run(runs, "t2i_pretrained", 7, config={"optim.lr": 0.001, "init": "random"})
    with pytest.raises(IncomparableError, match=r"init: pretrained \(5 runs\), random"):
        find_arms(Plan(arms=OWN), runs)
    assert (
        len(find_arms(Plan(arms={**OWN, "t2i_pretrained": {"optim.lr": 0.001, "init": "pretrained"}}), runs).runs) == 10
    )


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"data_hash": "f" * 16}, "data hash: 0123456789abcdef"),
        ({"numerics": 2}, r"numerics: 1 \(9 runs\), 2 \(1 runs\)"),
        ({"tokenizers": {"image": "other"}}, "image tokenizer"),
        (
            {"changes": [{"step": 9, "key": "optim.lr", "from": 0.1, "to": 0.001}]},
            r"changes within a run: none \(9 runs\), optim\.lr 0\.1 to 0\.001 after step 9 \(1 runs\)",
        ),
    ],
)
def test_another_version_of_data_or_numerics_is_refused(entries: dict[str, Any], named: str, runs: Path) -> None:
    for folder in runs.glob("*/*/*"):
        set_environment(folder, numerics=1, tokenizers={"image": "one"})
    set_environment(next(runs.glob("rate=0.001/t2i_pretrained/*")), **entries)
    with pytest.raises(IncomparableError, match=named):
        find_arms(Plan(arms=OWN), runs)


def test_data_of_an_arm_is_its_own_by_design_and_named(runs: Path) -> None:
    forms = {name: {**own, "data.train_size": size} for (name, own), size in zip(OWN.items(), (10, 20000), strict=True)}
    for seed in range(5):
        folder = seeded_run(runs, "t2i_pretrained", seed, 21, config={"optim.lr": 0.001, "data.train_size": 10})
        set_environment(folder, data_hash="c" * 16, stream_hash="d" * 64)
    notes = find_arms(Plan(arms=forms), runs).notes
    assert notes == (f"by design: data hash: t2i_pretrained {'c' * 16}, t2i_scratch 0123456789abcdef",)


def test_a_missing_seed_of_the_plan_leaves_no_verdict(runs: Path) -> None:
    plan = Plan(arms=OWN, seeds=[0, 1, 2, 3, 4, 5])
    arms = find_arms(plan, runs)
    results = compare(plan, arms)
    assert {one.verdict for one in results} == {UNDECIDED}
    table = text(plan, arms, results)
    assert "undecided, 1 of 6 seeds missing" in table
    assert "MISSING: seed 5 of t2i_scratch" in table
    assert "t2i_pretrained is lower" not in table


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("arms: {a: {optim.rl: 1}, b: {}}", "arms.a.optim.rl=1: expected a config key.*did you mean 'optim.lr'"),
        ("arms: {a: {seed: 1}, b: {}}", "arms.a.seed=1: expected another key than seed"),
        ("arms: {a: {optim: {lr: 1}}, b: {}}", "arms.a.optim=.*expected a value of a dotted key"),
        ("arms: {a: {experiment: x}, b: {experiment: x}}", "arms.b=.*expected another experiment or setting than of a"),
        ("arms: {a: {optim.lr: 1}, b: {}}\nwhere: {optim.lr: 2}", "arms.a.optim.lr=1: expected no key of where"),
        ("arms: {a: {optim: 3}, b: {}}", r"arms\.a\.optim=3: optim is a section of keys, such as optim\.name"),
        ("arms: ['', t2i_scratch]", "arms=.*expected names of experiments"),
        ("arms: [/x, t2i_scratch]", "arms=.*expected names of experiments"),
        ("arms: {a: ../x, b: {}}", r"arms\.a\.experiment='../x': expected the name of an experiment"),
        ("arms: {a/b: {}, c: {}}", "expected a name without /"),
        ("arms: {a: {experiment: [x]}, b: {}}", "arms.a.experiment=.*the name of an experiment"),
        ("arms: 3", "arms=3: expected names of experiments, or settings by arm"),
        ("arms: {a: 3, b: {}}", "arms.a=3: expected an experiment, or values of config keys"),
    ],
)
def test_a_faulty_arm_is_refused_by_name(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"plan\.yaml.*{words}"):
        read_plan(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("one: {over: {optim.rl: [1, 2]}}", r"comparisons\.one\.over\.optim\.rl.*did you mean 'optim\.lr'"),
        ("one: {over: {optim.lr: 3}}", r"over\.optim\.lr=3: expected a list of values"),
        ("one: {over: {optim.lr: []}}", "expected a list of values, each once"),
        ("one: {over: {optim.lr: [1, 1]}}", "expected a list of values, each once"),
        ("one: {over: {seed: [1, 2]}}", "another key than seed"),
        (
            "one: {over: {trainer.threads: [1, 2]}}",
            r"over\.trainer\.threads=\[1, 2\]: expected a key that changes what",
        ),
        ("one: {over: [1]}", "lists of values by config key"),
        ("one: {over: {optim.lr: [1, 2]}, where: {optim.lr: 1}}", "a key that neither where nor an arm sets"),
        ("one: {over: {optim.lr: [1, 2]}, arms: {a: {optim.lr: 1}, b: {}}}", "a key that neither where nor an arm"),
        ("one: {arms: [t2i_scratch]}", "two arms, or several of which each is compared with the last"),
        ("one: {where: 3}", "where=3: expected values by config key"),
        ("one: {over: {optim: [1, 2]}}", r"comparisons\.one\.over\.optim: optim is a section of keys, such as optim\."),
        ("one: {where: {seed: 5}}", r"comparisons\.one\.where\.seed=5: expected another key than seed"),
        ("{one: {arms: [a, b, c]}, one_a: {}}", "expected each name once"),
        (f"{{one: {STEPS}, one_gap: {{}}}}", r"one='one_gap.txt': expected another name: the comparison one_gap has"),
        (f"{{one: {RATES}, one_each_at_its_best: {{}}}}", "another name: the comparison one has this file"),
        (f"{{one: {RATES}, one_losses: {OTHERS}}}", r"one_losses='one_losses\.png': expected another name"),
        (
            f"{{figure4: {RATES}}}",
            r"figure4='figure4\.png': expected another name: a figure of the study has this file",
        ),
        (f"{{one: {RATES}, one_optim.lr=1: {OTHERS}}}", "another name: the comparison one has this file"),
    ],
)
def test_a_faulty_grid_is_refused_by_name(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"comparisons: {content if content.startswith('{') else '{' + content + '}'}")
    with pytest.raises(ValueError, match=rf"study\.yaml.*{words}"):
        read_study(file)


def test_names_of_results_that_are_not_made_are_free(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    two = "{over: {trainer.max_steps: [100, 200]}}"  # no curve
    file.write_text(
        f"comparisons: {{one: {two}, one_gap: {OTHERS}, figure4: {{}}, one_losses: {{}}, ratio_gap: {OTHERS}}}"
    )
    assert len(read_study(file).comparisons) == 5


def test_a_grid_is_every_combination_and_several_arms_are_compared_with_the_last() -> None:
    over = {"optim.lr": [0.001, "3e-3"], "data.batch_size": [8]}
    study = Study(seeds=[0], comparisons={"one": {"arms": ["a", "b", "c"], "over": over, "where": {"init": "random"}}})
    plans = study.plans()
    assert list(plans) == [
        f"one_{arm}_optim.lr={rate}_data.batch_size=8" for rate in ("0.001", "3e-3") for arm in ("a", "b")
    ]
    first = plans["one_a_optim.lr=0.001_data.batch_size=8"]
    assert first.arms == ["a", "c"]
    assert first.where == {"init": "random", "optim.lr": 0.001, "data.batch_size": 8}
