"""Comparisons over a grid: tables, best values, arms at their best, contrasts, the gap by tokens."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from t2i_lm import compare as command
from t2i_lm import figures
from t2i_lm.comparison.arms import Arms, pair_arms
from t2i_lm.comparison.best import best_value, common_value
from t2i_lm.comparison.comparability import IncomparableError, MissingRunsError
from t2i_lm.comparison.comparison import make_comparison
from t2i_lm.comparison.gap import find_gap_curve
from t2i_lm.comparison.grid import OPTIMISTIC, at_best, labeled_points, names_at_best, tune
from t2i_lm.comparison.grid_tables import grid_json, grid_table, grid_text
from t2i_lm.comparison.plan import Arm, Plan
from t2i_lm.comparison.study_plan import Study, curve_plans
from t2i_lm.comparison.tables import as_json, text
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.plots.gap import gap_caption, grid_caption
from t2i_lm.reporting.findings import verdict_heading
from t2i_lm.runtime.tables import compact
from t2i_lm.storage.run_folder import Run
from t2i_lm.training.study_results import Results, figures_of, results_of, write_results
from tests.comparison.test_compare import set_environment
from tests.plots.synthetic_runs import write_run

RATES = [7.5e-4, 1.5e-3, 3e-3, 6e-3]
BEST = {"t2i_pretrained": 1.5e-3, "t2i_scratch": 6e-3}
KNOWN = {"data_hash": "0" * 16, "stream_hash": "b" * 64, "numerics": 1}


def loss(name: str, values: dict[str, Any]) -> float:
    """Lowest at 1.5e-3 pre-trained and at 6e-3 or above from random weights; a gap that decays with steps."""
    gap = 0.02 + 0.1 * (values.get("trainer.max_steps", 1600) / 1600) ** -0.6
    distance = math.log(values.get("optim.lr", 3e-3) / BEST[name]) ** 2
    return 1.5 + 0.05 * distance - gap * (name == "t2i_pretrained")


def run_of(arm: Arm, seed: int, values: dict[str, Any]) -> Run:
    """A finished run in memory."""
    steps = values.get("trainer.max_steps", 1600)
    name = arm.experiment
    config = asdict(ExperimentConfig(name=name, seed=seed, init="random" if "scratch" in name else "pretrained"))
    for key, value in {"trainer.max_steps": steps, **values}.items():
        section, _, leaf = key.partition(".")
        config[section][leaf] = value
    final = loss(name, values) + random.Random(f"{name} {seed} {values}").gauss(0, 0.002)
    metrics = []
    for step in (0, steps // 2, steps):
        entry = {"nll": final + 3 * (1 - step / steps)}
        val = {"image": entry, "text": entry}
        tokens = {"tokens_nominal": step * 1792, "tokens_real": step * 1500}
        metrics.append({"step": step, **tokens, "val/iid": val, "val/compositional": val})
    return Run(Path("runs", name, f"{seed} {values}"), config, KNOWN, metrics, {"steps": steps})


Skip = Callable[[str, int, dict[str, Any]], bool]


def made(
    comparison: dict[str, Any],
    skip: Skip = lambda *_: False,
    environment: Callable[[dict[str, Any]], Any] = lambda _: {},
    seeds: int | None = None,
) -> Results:
    """The results of a comparison over a grid, of three seeds, without some runs.

    Args:
        comparison: its keys in a study.
        skip: whether to leave out the run of an experiment, seed and values.
        environment: entries of env.json by a run's values.
        seeds: number of the seeds by which best values are chosen.
    """
    study = Study(seeds=[0, 1, 2], secondary=["tokens_saved.image"], comparisons={"one": comparison})

    def find(plan: Plan) -> Arms:
        found: dict[str, list[Run]] = {}
        for name, arm in plan.parsed.items():
            values = plan.required(name)
            runs = [run_of(arm, seed, values) for seed in plan.seeds if not skip(arm.experiment, seed, values)]
            found[name] = [
                Run(run.folder, run.config, {**KNOWN, **environment(values)}, run.metrics, run.report) for run in runs
            ]
        return pair_arms(plan, found, (), Path("runs"))

    comparisons = [make_comparison(name, plan, partial(find, plan)) for name, plan in study.plans().items()]
    return results_of(study, comparisons, seeds=seeds)


def test_the_best_rate_of_each_arm_is_said_to_be_interior_or_at_the_edge() -> None:
    results = made({"over": {"optim.lr": RATES}})
    (grid,) = results.grids
    (tuned,) = tune(grid)
    assert [(one.value, one.edge, one.interior) for one in tuned.best] == [
        ("0.0015", "", True),
        ("0.006", "largest", False),
    ]
    words = grid_text(grid)
    assert "t2i_pretrained: best optim.lr 0.0015, interior to the grid; " in words
    assert "t2i_scratch: best optim.lr 0.006, at the EDGE of the grid, its largest value; " in words
    assert "95 % interval" in words
    assert "best common optim.lr: 0.003" in words
    assert len(grid_table(grid).rows) == 4
    content = json.loads(grid_json(grid))
    assert [point["values"]["optim.lr"] for point in content["points"]] == RATES
    assert content["best"][0]["common"] == "0.003"


def test_the_arms_are_compared_each_at_its_best() -> None:
    results = made({"over": {"optim.lr": RATES}})
    one = results.comparisons[-1]
    assert one.name == "one_each_at_its_best"
    assert one.plan.arms["t2i_scratch"] == {"experiment": "t2i_scratch", "optim.lr": 6e-3}
    assert one.arms is not None
    assert [note for note in one.arms.notes if note.startswith("EDGE OF THE GRID: t2i_scratch's")]
    assert one.results[0].statistics.mean == pytest.approx(-0.12, abs=0.01)
    assert results.answer_first[0] is one
    assert [name for name, *_ in figures_of(results)] == ["one", "one_losses"]


def test_where_the_arms_have_equal_best_values_that_point_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BEST, "t2i_scratch", BEST["t2i_pretrained"])
    results = made({"over": {"optim.lr": RATES}})
    assert results.answer_first[0].name == "one_optim.lr=0.0015"
    assert len(results.answer_first) == len(results.comparisons) == len(RATES)
    assert OPTIMISTIC in grid_table(results.grids[0]).notes
    results = made({"over": {"data.batch_size": [8, 16], "optim.lr": RATES}})
    assert results.answer_first[0].name == "one_data.batch_size=8_optim.lr=0.0015"
    assert names_at_best(results.grids[0])[1] == "one_data.batch_size=16_optim.lr=0.0015"


def test_a_comparison_at_best_values_says_that_it_is_optimistic_and_how_strict_it_is() -> None:
    order = {1.5e-3: "c" * 64, 6e-3: "d" * 64}  # both arms alike at each rate, but not between the rates
    over = {"over": {"optim.lr": RATES}}
    refused = made(over, environment=lambda values: {"stream_hash": order.get(values["optim.lr"], "b" * 64)})
    one = at_best(refused.grids[0])[0]
    assert "the arms saw the data in another order" in str(one.problem)
    (one,) = at_best(replace(refused.grids[0], strict=False))
    assert one.arms is not None
    assert OPTIMISTIC in text(one.plan, one.arms, one.results)
    assert OPTIMISTIC in json.loads(as_json(one.plan, one.arms, one.results))["notes"]
    content = json.loads(grid_json(made(over).grids[0]))
    assert [OPTIMISTIC in one["notes"] for one in content["at_best"]] == [True]
    assert OPTIMISTIC in content["notes"]


def test_p_values_are_corrected_for_the_points_with_every_seed() -> None:
    results = made({"over": {"optim.lr": RATES}}, lambda *run: run == ("t2i_scratch", 2, {"optim.lr": 6e-3}))
    table = grid_table(results.grids[0])
    assert [bool(row[-2]) for row in table.rows] == [True, True, True, False]
    assert table.notes[0].startswith("p (Holm): corrected for 3 p-values")


def test_each_of_several_arms_is_compared_at_its_best_with_the_last() -> None:
    wide = {"experiment": "t2i_pretrained", "optim.weight_decay": 0.2}
    arms = {"wide": wide, "t2i_pretrained": {}, "t2i_scratch": {}}
    results = made({"arms": arms, "over": {"optim.lr": RATES}})
    names = [one.name for one in results.comparisons if "best" in one.name]
    assert names == ["one_each_at_its_best_wide", "one_each_at_its_best_t2i_pretrained"]
    assert all(one.arms is not None for one in results.comparisons)


def test_no_best_value_is_named_while_a_planned_seed_is_missing() -> None:
    results = made({"over": {"optim.lr": RATES}}, lambda *run: run == ("t2i_scratch", 2, {"optim.lr": 1.5e-3}))
    assert "no best value: MISSING at optim.lr=0.0015: seeds 2" in grid_text(results.grids[0])
    assert [one.name for one in results.comparisons if "best" in one.name] == []
    assert "undecided, 1 of 3 seeds missing" in grid_text(results.grids[0])


@pytest.mark.parametrize(
    ("entry", "named"),
    [({"data_hash": "f" * 16}, "data hash"), ({"numerics": 9}, "numerics"), ({"precision": "64-true"}, "precision")],
    ids=["data", "numerics", "precision"],
)
def test_points_of_other_data_or_numerics_are_refused(entry: dict[str, Any], named: str) -> None:
    results = made(
        {"over": {"optim.lr": RATES[:2]}},
        environment=lambda values: {"precision": "32-true"} | (entry if RATES[0] in values.values() else {}),
    )
    assert all(one.arms is not None for one in results.comparisons[:2])
    assert (results.grids, len(results.comparisons)) == ((), 2), "neither table, figure nor best values"
    assert results.refused == results.problems
    assert f"one: the runs of t2i_pretrained differ in more than optim.lr: {named}" in results.refused[0]
    steps = {"over": {"trainer.max_steps": [200, 400, 800]}}
    curves = made(
        steps, environment=lambda values: {"precision": "32-true"} | (entry if 200 in values.values() else {})
    )
    assert not curves.curves
    assert named in curves.problems[0]


def test_contrasts_between_points_are_paired_by_seed() -> None:
    results = made({"over": {"data.batch_size": [8, 16]}, "where": {"trainer.max_steps": 400}})
    line, percent, saved = grid_table(results.grids[0]).lines
    assert line.startswith("difference at 16 minus that at 8: ")
    assert " percentage points of t2i_scratch, 95 % t-interval " in percent
    assert saved.startswith("tokens_saved.image at 16 minus that at 8: ")
    tokens = [one.results[-1].differences for one in results.grids[0].comparisons]
    by_seed = [tokens[1][seed] - tokens[0][seed] for seed in range(3)]
    assert f": {compact(fmean(by_seed)) if fmean(by_seed) < 0 else '+' + compact(fmean(by_seed))}, " in saved
    assert all("n = 3" in one and one.endswith(" (Holm)") for one in (line, percent, saved))


def test_several_arms_are_rows_against_the_last() -> None:
    arms = {"slow": {"experiment": "t2i_pretrained", "optim.lr": 1e-3}, "t2i_pretrained": {}, "t2i_scratch": {}}
    results = made({"arms": arms})
    table = grid_table(results.grids[0])
    assert [row[0] for row in table.rows] == ["slow", "t2i_pretrained"]
    assert table.title.endswith("each arm minus t2i_scratch, paired by seed")


def test_the_gap_by_tokens_has_its_fits_figure_and_numbers(tmp_path: Path) -> None:
    steps = [200, 400, 800, 1600, 3200, 6400]
    results = made({"over": {"trainer.max_steps": steps}})
    (curve,) = results.curves
    assert [(one.steps, one.tokens) for one in curve.lengths] == [(number, number * 1792) for number in steps]
    assert curve.decay.fits["zero"].parameters["b"].value == pytest.approx(0.45, abs=0.1)
    assert results.answer_first[0].name == "one_trainer.max_steps=6400"
    assert write_results(results, tmp_path) == 0
    names = {f"one{part}" for part in (".txt", ".json", ".png", "_gap.txt", "_gap.png", "_trainer.max_steps=200.txt")}
    assert names <= {path.name for path in tmp_path.iterdir()}
    written = json.loads((tmp_path / "one_gap.json").read_text())
    assert [one["tokens_saved"] > 0 for one in written["lengths"]] == [True] * 6
    assert "fit to a constant, a t^-b + c" in (tmp_path / "one_gap.txt").read_text()


def test_longer_lengths_of_fewer_seeds_are_a_curve_of_their_own() -> None:
    lengths = {"over": {"trainer.max_steps": [200, 400, 800, 1600]}}
    comparisons = {"all": {**lengths, "seeds": [0, 1, 2]}, "long": {**lengths, "seeds": [0]}}
    study = Study(seeds=[0, 1, 2], secondary=[], comparisons=comparisons)

    def found(plan: Plan) -> Arms:
        return pair_arms(
            plan,
            {arm: [run_of(plan.parsed[arm], seed, plan.where) for seed in plan.seeds] for arm in plan.parsed},
            (),
            Path(),
        )

    made = [make_comparison(name, plan, partial(found, plan)) for name, plan in study.plans().items()]
    curves = results_of(study, made).curves
    assert [(curve.name, curve.lengths[0].statistics.n) for curve in curves] == [("all", 3), ("long", 1)]


def test_lengths_of_several_comparisons_are_one_curve() -> None:
    over = {"seeds": [0], "over": {"trainer.max_steps": [1600, 3200]}}
    study = Study(
        seeds=[0], secondary=[], comparisons={"short": {"over": {"trainer.max_steps": [400, 800]}}, "long": over}
    )

    def found(plan: Plan) -> Arms:
        return pair_arms(plan, {arm: [run_of(plan.parsed[arm], 0, plan.where)] for arm in plan.parsed}, (), Path())

    comparisons = [make_comparison(name, plan, partial(found, plan)) for name, plan in study.plans().items()]
    (curve,) = results_of(study, comparisons).curves
    assert (curve.name, [one.steps for one in curve.lengths]) == ("short", [400, 800, 1600, 3200])
    assert [one.name for one in curve_plans(study.families())] == ["short"]
    over["over"]["trainer.max_steps"][0] = "8e2"  # a length of both
    assert curve_plans(study.families())[0].members == tuple(
        f"{name}.max_steps={number}"
        for name, number in (("short_trainer", 400), ("short_trainer", 800), ("long_trainer", 3200))
    )
    over["margin"] = "5%"
    assert curve_plans(study.families()) == []


def test_the_gap_is_redrawn_from_run_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [100, 200, 300, 400, 600]
    for number in steps:
        for name in BEST:
            warm_up = number // 20 if number < 600 else 5  # another share of warm-up is another setting
            changes = {"trainer.val_check_interval": number // 2, "log.interval": 25, "optim.warmup_steps": warm_up}
            folder = write_run(
                tmp_path / "study" / f"trainer.max_steps={number}",
                name,
                config={"trainer.max_steps": number, **changes},
                splits=("iid", "compositional"),
            )
            if number == 100:  # one length on other data is another setting
                set_environment(folder, data_hash="f" * 16)
    curve = find_gap_curve(tmp_path)
    assert [one.steps for one in curve.lengths] == steps[1:-1]
    assert "left out, of other settings: 4 runs" in curve.notes
    assert figures.main(["--figure", "gap", "--runs", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    assert ". Longest: scale demo, " in gap_caption(curve)
    redrawn = json.loads((tmp_path / "figures" / "figure_gap.json").read_text())
    assert [one["mean"] for one in redrawn["lengths"]] == [one.statistics.mean for one in curve.lengths]
    assert "no fit to zero: 3 lengths, 5 required" in capsys.readouterr().out
    assert figures.main(["--figure", "gap", "--runs", str(tmp_path / "figures")]) == 2
    assert "experiments/plans/data_budget.yaml" in capsys.readouterr().err


def test_a_length_without_every_seed_is_left_out_and_named() -> None:
    results = made(
        {"over": {"trainer.max_steps": [200, 400, 800, 1600]}},
        lambda *run: run == ("t2i_scratch", 1, {"trainer.max_steps": 400}),
    )
    (curve,) = results.curves
    assert [one.steps for one in curve.lengths] == [200, 800, 1600]
    assert "left out, one_trainer.max_steps=400: MISSING seeds 1" in curve.notes
    assert curve.decay.refusals[0] == "no fit to zero: 3 lengths, 5 required (parameters + 2)"


def test_compare_over_a_key_finds_the_values_and_the_best(tmp_path: Path, capsys: Any) -> None:
    for number, rate in enumerate((0.001, 0.002, 0.004)):
        for name in BEST:
            for seed in range(2):
                config = {"optim.lr": rate, "seed": seed}
                write_run(
                    tmp_path, name, f"2026011{number}-09300{seed}", config=config, splits=("iid", "compositional")
                )
    assert command.main(["--over", "optim.lr", "--runs", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "t2i_pretrained: best optim.lr 0.00" in output
    assert "p (Holm): corrected for 0 p-values" in output, "synthetic runs differ by no noise, which is no test"
    assert command.main(["--over", "optim.lr", "--runs", str(tmp_path), "optim.lr=2e-3"]) == 2
    assert "--over optim.lr: 1 values" in capsys.readouterr().err
    assert command.main(["--over", "optim.rl", "--runs", str(tmp_path)]) == 2
    assert "did you mean 'optim.lr'" in capsys.readouterr().err
    for file in tmp_path.rglob("20260110-*/env.json"):  # one rate's runs are of other data
        set_environment(file.parent, data_hash="f" * 16)
    for form in ("text", "json"):
        assert command.main(["--over", "optim.lr", "--runs", str(tmp_path), "--format", form]) == 2
        assert "data hash: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "edge", "interior"),
    [
        ({"1": 3.0, "2": 1.0, "3": 2.0}, "", True),
        ({"1": 1.0, "2": 2.0, "3": 3.0}, "smallest", False),
        ({"10": 1.0, "9": 2.0}, "largest", False),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, "", False),
        ({"1": 1.0}, "", False),
    ],
)
def test_an_edge_is_the_smallest_or_largest_number(values: dict[str, float], edge: str, interior: bool) -> None:
    best = best_value("arm", "key", {value: {0: nll} for value, nll in values.items()})
    assert best is not None
    assert (best.edge, best.interior) == (edge, interior)
    assert bool(best.warning) == bool(edge)


def test_the_distance_of_the_next_value_is_paired_by_seed() -> None:
    losses = {"1": {0: 1.0, 1: 2.0, 2: 3.0}, "2": {0: 1.1, 1: 2.1, 2: 3.3}}
    best = best_value("arm", "key", losses)
    assert best is not None
    assert (best.value, best.next, best.n) == ("1", "2", 3)
    assert best.behind is not None
    assert best.behind.mean == pytest.approx(0.5 / 3)
    assert best.sentence.endswith("n = 3, not told apart")
    assert common_value({"one": losses, "two": {"2": {0: 1.0}, "3": {0: 0.5}}}) == "2"
    assert common_value({"one": losses, "two": {"4": {0: 1.0}}}) is None


def test_best_values_count_the_seeds_that_all_values_have() -> None:
    losses = {"1": {0: 1.0, 1: 9.0}, "2": {0: 2.0}}  # seed 1 is harder: its mean is no reason against 1
    best = best_value("arm", "key", losses)
    assert best is not None
    assert (best.value, best.n, best.left_out) == ("1", 1, 1)
    assert "(n = 1 seeds of all values, 1 others left out)" in best.sentence
    assert common_value({"one": losses, "two": losses}) == "1"
    apart = {"1": {0: 1.0}, "2": {1: 2.0}}
    assert best_value("arm", "key", apart) is None
    assert common_value({"one": losses, "two": apart}) is None


def test_the_caption_of_a_grid_has_what_all_points_share() -> None:
    (grid,) = made({"over": {"data.batch_size": [8, 16]}, "where": {"trainer.max_steps": 400}}).grids
    assert "Scale demo, trainer.max_steps=400, learning rate 0.0003, data hash " in grid_caption(grid)
    (tuned,) = made({"over": {"optim.lr": RATES[:2]}}).grids
    assert "learning rate 0" not in grid_caption(tuned)


def test_tokens_saved_are_no_gap_and_their_verdict_names_who_saves() -> None:
    primary = {"primary": "tokens_saved.image", "margin": "1000", "secondary": []}
    results = made({"over": {"trainer.max_steps": [200, 400, 800]}, **primary})
    assert not results.curves
    assert "primary=tokens_saved.image: expected an endpoint of single runs" in results.problems[0]
    heading = verdict_heading(results.comparisons[-1])
    assert heading == "A difference: fewer tokens are needed from pre-trained weights for an equal loss."


def test_without_a_best_value_the_answer_is_the_reason() -> None:
    results = made(
        {"over": {"optim.lr": RATES}}, skip=lambda name, seed, values: (seed, values["optim.lr"]) == (2, 6e-3)
    )
    answer = results.answer_first[0]
    assert answer.arms is None
    assert "no best value: MISSING at optim.lr=0.006: seeds 2" in str(answer.problem)


def test_a_comparison_that_can_no_longer_be_made_leaves_no_former_table(tmp_path: Path) -> None:
    everything = made({"over": {"optim.lr": RATES}})
    assert write_results(everything, tmp_path) == 0
    assert {file.name for file in tmp_path.iterdir()} == {*everything.files}
    (tmp_path / "one_mine.txt").touch()
    fewer = made({"over": {"optim.lr": RATES}}, lambda name, seed, _: (name, seed) == ("t2i_scratch", 2))
    assert write_results(fewer, tmp_path) == 0
    gone = {*everything.files} - {file.name for file in tmp_path.iterdir()}
    assert gone == {"one_each_at_its_best.txt", "one_each_at_its_best.json"}
    lost = replace(everything.comparisons[0], arms=None, problem=ValueError("runs are gone"))
    assert write_results(Results((lost,), files=everything.files), tmp_path) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["one_mine.txt"]
    curve = made({"over": {"trainer.max_steps": [200, 400, 800]}})
    assert {"one_gap.txt", "one_gap.json", "one_gap.png", "one_gap.pdf"} < {*curve.files}


@pytest.mark.parametrize("over", [{"optim.lr": RATES}, {"data.batch_size": [8, 16], "optim.lr": RATES[:2]}])
def test_the_figure_of_losses_marks_no_best_value_while_a_planned_seed_is_missing(over: dict[str, Any]) -> None:
    def marks(results: Results) -> tuple[bool, ...]:
        figure, caption = next((figure, caption) for name, _, figure, caption in figures_of(results) if "loss" in name)
        rings = [str(line.get_gid()) for axes in figure.axes for line in axes.lines]
        stars = [text.get_text() for axes in figure.axes for text in axes.texts]
        drawn = any(gid.endswith("/best") for gid in rings) or any("\N{BLACK STAR}" in text for text in stars)
        return drawn, "best" in caption, "EDGE" in caption

    assert marks(made({"over": over})) == (True, True, True)
    fewer = made({"over": over}, lambda name, seed, _: (name, seed) == ("t2i_scratch", 2))
    assert marks(fewer) == (False, False, False)
    assert marks(made({"over": over}, lambda _, seed, __: seed == 2, seeds=2)) == (True, True, True)


def test_the_labels_of_a_grid_are_as_keys_take_their_values() -> None:
    (grid,) = made({"over": {"data.text_ratio": [None, 0.5]}}).grids
    assert [labels for labels, _, _ in labeled_points(grid)] == [("null",), ("0.5",)]


def test_points_that_are_refused_are_not_called_missing() -> None:
    (grid,) = made({"over": {"optim.lr": RATES}}).grids
    for problem, words, state in (
        (IncomparableError("the arms saw the data in another order"), "REFUSED at optim.lr=0.003: the arms", "REFUSED"),
        (MissingRunsError("no run"), "MISSING at optim.lr=0.003: seeds 0, 1, 2", "MISSING"),
    ):
        broken = replace(grid.comparisons[2], arms=None, results=(), problem=problem)
        other = replace(grid, comparisons=(*grid.comparisons[:2], broken, *grid.comparisons[3:]))
        assert words in " ".join(line for one in tune(other) for line in one.lines)
        assert [row[-1] for row in grid_table(other).rows].count(state) == 1
        assert ("NOT RUN: 0.003" in grid_caption(other)) == (state == "MISSING")
        assert ("REFUSED: 0.003 (the arms saw" in grid_caption(other)) == (state == "REFUSED")


def test_a_grid_is_named_after_the_sets_of_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, rate in enumerate((1e-3, 2e-3)):
        for name in BEST:
            changes = {"optim.lr": rate}
            write_run(tmp_path, name, f"2026011{number}-093000", config=changes, splits=("first", "second"))
    assert command.main(["--runs", str(tmp_path), "--over", "optim.lr"]) == 0
    assert "over optim.lr: val.image.nll by optim.lr" in capsys.readouterr().out


def write_lengths(root: Path, rate: float, seeds: dict[str, list[int]]) -> None:
    for number in (100, 200, 300):
        for name, several in seeds.items():
            for seed in several:
                changes = {"trainer.max_steps": number, "optim.lr": rate, "optim.warmup_steps": number // 20}
                changes |= {"trainer.val_check_interval": number // 2, "log.interval": 25, "seed": seed}
                stamp = f"202601{10 + seed:02d}-09{number // 100}000"
                write_run(root / f"{rate}/trainer.max_steps={number}", name, stamp, config=changes)


def test_the_gap_is_of_the_setting_with_the_most_seeds_and_names_its_rate(tmp_path: Path) -> None:
    write_lengths(tmp_path, 3e-3, {name: [0] for name in BEST})
    write_lengths(tmp_path, 1.5e-3, {name: [0, 1, 2] for name in BEST})
    curve = find_gap_curve(tmp_path)
    assert {one.statistics.n for one in curve.lengths} == {3}
    assert "learning rate 0.0015" in gap_caption(curve)


def test_lengths_without_a_common_seed_are_no_gap(tmp_path: Path) -> None:
    write_lengths(tmp_path, 3e-3, {"t2i_pretrained": [0], "t2i_scratch": [1]})
    with pytest.raises(MissingRunsError, match="gap: 0 lengths have results, 3 required; left out, 100 steps: no seed"):
        find_gap_curve(tmp_path)


def test_the_caption_of_the_gap_tells_precisions_by_seed() -> None:
    (curve,) = made({"over": {"trainer.max_steps": [200, 400, 800, 1600]}}).curves
    note = "200 steps: precision by seed: bf16-mixed for seed 0, 32-true for seed 1"
    assert f"{note}." in gap_caption(replace(curve, notes=(note,)))
    with pytest.raises(MissingRunsError, match="no length has every seed"):
        gap_caption(replace(curve, lengths=()))
