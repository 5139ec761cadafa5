"""Sweeps on the page: of one key, and of two where runs fill a grid."""

import json
import shlex
from itertools import product
from pathlib import Path

import pytest

from t2i_lm.config.load import flatten
from t2i_lm.reporting.provenance import train_command
from t2i_lm.reporting.search import RunSearch
from t2i_lm.reporting.sweeps import find_sweeps
from t2i_lm.storage.run_folder import read_run
from t2i_lm.sweep import parser
from t2i_lm.train import main as train
from t2i_lm.training.sweep import sweep_jobs
from tests.plots.synthetic_runs import write_run

ARMS = ("t2i_pretrained", "t2i_scratch")
EXPERIMENTS = Path("experiments")


def write_sweep(root: Path, points: list[dict[str, object]], arms: tuple[str, ...] = ARMS) -> None:
    for number, (point, arm) in enumerate(product(points, arms)):
        write_run(root / "sweep", arm, f"20260301-{100000 + number}", config=point)


def grid(rates: tuple[float, ...] = (0.001, 0.002), sizes: tuple[int, ...] = (16, 32)) -> list[dict[str, object]]:
    return [{"optim.lr": rate, "data.batch_size": size} for rate, size in product(rates, sizes)]


def test_runs_that_fill_a_grid_are_one_sweep_of_two_keys(tmp_path: Path) -> None:
    write_sweep(tmp_path, grid())
    (sweep,), notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert not notes
    assert sweep.keys == ("data.batch_size", "optim.lr")
    block = sweep.figure()
    assert len(block.arms) == 8
    assert "over 1 seed, all other keys of an arm equal" in block.caption
    assert "pretrained, image nll: data.batch_size, by optim.lr" in block.table
    best, gaps = sweep.sentences()
    assert best.startswith(
        "Sweep of data.batch_size and optim.lr, lowest held-out image loss (nats/token): pre-trained "
    )
    assert " at 4 equal values, " in gaps
    assert gaps.startswith("Random weights minus pre-trained, at equal seeds: +")
    assert gaps.endswith("1 seed per value, no interval.")
    command = sweep.command(EXPERIMENTS)
    arms = "--arm t2i_pretrained --arm t2i_scratch"
    assert f"--scale demo {arms} --equal=steps data.batch_size=16,32 optim.lr=0.001,0.002 seed=0" in command


def test_two_sweeps_through_one_point_are_no_grid(tmp_path: Path) -> None:
    write_sweep(tmp_path, grid((0.001, 0.002, 0.004), (32,)) + grid((0.002,), (16, 64)))
    found, notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert [sweep.keys for sweep in found] == [("data.batch_size",), ("optim.lr",)]
    assert [len(sweep.outcomes) for sweep in found] == [6, 6]
    assert not notes


def test_a_longer_line_through_a_grid_is_shown_beside_it_and_other_runs_are_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, [*grid(), {"optim.lr": 0.002, "data.length": 96}])
    found, notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert [sweep.keys for sweep in found] == [("data.length",), ("data.batch_size", "optim.lr")]
    assert not notes
    write_run(tmp_path / "sweep", ARMS[0], "20260302-100000", config={"optim.lr": 0.007, "data.length": 80})
    _, notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert notes == [f"in no sweep, or repeated since: {tmp_path / 'sweep' / ARMS[0] / '20260302-100000-demo'}"]


def test_seeds_that_some_values_lack_are_counted(tmp_path: Path) -> None:
    write_sweep(tmp_path, [*grid(), {"optim.lr": 0.001, "data.batch_size": 16, "seed": 1}])
    (sweep,), _ = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert "over 1 to 2 seeds" in sweep.figure().caption
    assert sweep.sentences()[1].endswith("1 to 2 seeds per value, no interval.")


def test_arms_of_two_tasks_keep_their_names(tmp_path: Path) -> None:
    arms = ("t2i_scratch", "uncond_scratch")
    write_sweep(tmp_path, [{"optim.lr": rate} for rate in (0.001, 0.002)], arms)
    (sweep,), _ = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert {one.arm for one in sweep.outcomes} == {*arms}


def test_best_values_and_gaps_are_those_of_the_table_and_repetitions_are_no_seeds(tmp_path: Path) -> None:
    def run(number: int, arm: str, rate: float, seed: int, loss: float) -> None:
        config = {"optim.lr": rate, "seed": seed}
        folder = write_run(tmp_path / "sweep", arm, f"20260301-{100000 + number}", config=config)
        file = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if "val" in line:
                line["val"]["image"]["nll"] = loss
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    for number, arm in enumerate(ARMS):
        run(10 * number, arm, 0.001, 0, 2.0)
        run(10 * number + 1, arm, 0.002, 0, 2.05)
    run(2, ARMS[0], 0.002, 1, 1.5)  # an easier seed, of one arm at one value
    run(3, ARMS[0], 0.001, 0, 1.9)  # the same run again
    (sweep,), notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    best, gaps = sweep.sentences()
    assert best.endswith("pre-trained 1.9000 at optim.lr=0.001; random weights 2.0000 at optim.lr=0.001.")
    assert "at equal seeds: +0.0000 to +0.1000 at 2 equal values, +0.1000 with each at its best" in gaps
    assert gaps.endswith("1 to 2 seeds per value, no interval.")
    assert "1.9000" in sweep.figure().table
    assert len(sweep.figure().arms) == 5
    assert notes == [f"in no sweep, or repeated since: {tmp_path / 'sweep' / ARMS[0] / '20260301-100000-demo'}"]


def test_runs_of_several_batch_sizes_share_their_samples_or_their_steps(tmp_path: Path) -> None:
    def point(size: int, steps: int) -> dict[str, object]:
        return {"data.batch_size": size, "trainer.max_steps": steps, "optim.warmup_steps": steps // 20}

    equal_samples = [point(16, 80), point(32, 40), point(64, 20)]
    write_sweep(tmp_path, [*equal_samples, point(32, 10)])  # the last one is of a shorter sweep, at a usual size
    (sweep,), notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert {one.value: one.run.config["trainer"]["max_steps"] for one in sweep.outcomes} == {
        "16": 80,
        "32": 40,
        "64": 20,
    }
    assert len(notes) == 2
    write_sweep(tmp_path / "other", [point(16, 40), point(32, 40)])
    (sweep,), _ = find_sweeps(RunSearch(tmp_path / "other").sweep_pool())
    assert len(sweep.outcomes) == 4, "at equal steps"


def test_batch_sizes_and_steps_are_a_grid(tmp_path: Path) -> None:
    write_sweep(
        tmp_path, [{"data.batch_size": size, "trainer.max_steps": steps} for size in (16, 32) for steps in (20, 40)]
    )
    (sweep,), _ = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert sweep.keys == ("data.batch_size", "trainer.max_steps")
    assert len(sweep.outcomes) == 8


def test_a_run_with_losses_that_are_not_finite_is_left_out_by_name(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"optim.lr": rate} for rate in (0.001, 0.002, 0.004)])
    folder = next((tmp_path / "sweep" / ARMS[0]).glob("*100004*"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [line for line in lines if "val" in line][-1]["val"]["image"]["nonfinite"] = 3
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sweep,), notes = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert len(sweep.outcomes) == 5
    assert notes == [f"left out, 3 validation losses that are not finite: {folder}"]


def swept(words: list[str]) -> dict[str, dict[str, object]]:
    """The configs of the runs of `t2i_lm.sweep` with some words, by their values."""
    options = parser().parse_intermixed_args(words)
    _, jobs = sweep_jobs(options.keys, options.arm or ARMS, options.scale, equal_tokens=options.equal == "tokens")
    return {repr(config): config for config in (flatten(job.config) for job in jobs.values())}


@pytest.mark.parametrize(
    "words",
    [
        "data.batch_size=8,16 trainer.max_steps=60",
        "data.batch_size=8,16 trainer.max_steps=20 optim.warmup_steps=2 trainer.val_check_interval=10",
        "data.batch_size=8,32 trainer.max_steps=60 --equal steps optim.lr=0.001,0.002",
        "freeze=ffn,[] trainer.max_steps=60 samples.prompts=3",
        "trainer.skip_loss_above=null,9 trainer.max_steps=60 allow_code=true",
        "optim.l2_sp=0.1,1 trainer.max_steps=60 --arm remedies/l2_sp --arm t2i_pretrained",
    ],
)
def test_the_command_of_a_sweep_trains_its_runs(words: str, tmp_path: Path) -> None:
    runs = swept(words.split())
    for number, config in enumerate(runs.values()):
        write_run(tmp_path / "sweep", str(config["name"]), f"20260301-{100000 + number}", config=config)
    (sweep,), _ = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert swept(shlex.split(sweep.command(EXPERIMENTS))[3:]).keys() == runs.keys()


def test_values_that_no_sweep_takes_have_no_command(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"freeze": freeze} for freeze in (["ffn", "norm"], ["ffn"])])
    (sweep,), _ = find_sweeps(RunSearch(tmp_path).sweep_pool())
    assert sweep.command(EXPERIMENTS) == ""
    assert "freeze" in sweep.sentences()[0]


def test_the_command_of_a_run_without_an_experiment_trains_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"data.val_size": 8, "allow_code": True, "text_tokenizer.path": "asset:lm_rotary/text_tokenizer.model"}
    run = read_run(write_run(tmp_path, "t2i_scratch", config=config))
    words = shlex.split(train_command(run, tmp_path))[3:]
    assert words == [str(run.folder / "config.yaml")]
    assert train([*words, "--dry-run"]) == 0
    assert "max_steps: 300" in capsys.readouterr().out
    assert train([*words, "--dry-run", "--scale", "paper"]) == 2
    assert "has the scale of its run, demo; leave --scale out" in capsys.readouterr().err
    assert "allow_code=true" in train_command(run, EXPERIMENTS)
