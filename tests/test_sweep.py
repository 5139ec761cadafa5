"""A sweep: its runs, figure and table."""

import json
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest

from t2i_lm.comparison.comparability import IncomparableError, require_comparable
from t2i_lm.config.load import flatten
from t2i_lm.data.scenes.version import SCENES, SCENES_FORMAT
from t2i_lm.plots.panels import ARM_STYLES, arm_styles
from t2i_lm.plots.sweep import Outcome, at_edges, draw_sweep, sweep_caption, sweep_table, varied_in
from t2i_lm.plots.sweep_grid import caption_of, draw, tables_of
from t2i_lm.storage.run_folder import THINNED, read_run, run_folders
from t2i_lm.sweep import main
from t2i_lm.training.jobs import unfinished
from t2i_lm.training.sweep import ARMS, split_keys, sweep_jobs
from tests.plots.synthetic_runs import write_run

SWEPT = ["optim.lr=1e-3,3e-3", "seed=0,1"]


def test_nothing_is_trained_beside_collected_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study" / "t2i_scratch" / "20260101-000000-demo"
    folder.mkdir(parents=True)
    (folder / THINNED).touch()
    assert main(["optim.lr=1e-3,2e-3", f"run.dir={tmp_path}"]) == 2
    assert f"{tmp_path} holds collected results" in capsys.readouterr().err


def test_keys_with_several_values_are_distinguished_from_lists_and_single_values() -> None:
    keys, several, fixed = split_keys([*SWEPT, "freeze=[ffn,norm]", "trainer.max_steps=5", "optim.betas=[0.9,0.9]"])
    assert keys == ("optim.lr",)
    assert several == {"optim.lr": ["1e-3", "3e-3"], "seed": ["0", "1"]}
    assert fixed == ["freeze=[ffn,norm]", "trainer.max_steps=5", "optim.betas=[0.9,0.9]"]
    assert split_keys(["seed=0,1"])[0] == ("seed",)
    assert split_keys(["data.batch_size=8,16", *SWEPT])[0] == ("data.batch_size", "optim.lr")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1e-3"], "no key has several values"),
        (
            ["optim.lr=1e-3,2e-3", "data.batch_size=8,16", "data.length=96,112"],
            "optim.lr, data.batch_size, data.length have several values: expected one or two",
        ),
        (["data.batch_size=7,16"], "data.batch_size=7: 19,200 samples"),
        (["optim.lrr=1e-3,2e-3"], "did you mean 'optim.lr'"),
        (["optim.lr=1e-3,fast"], "optim.lr"),
        (["trainer.threads=1,2"], "trainer.threads='1,2': expected a key that changes what a run computes or reports"),
        (["optim.lr=1e-3,2e-3", "data.workers=0,1"], "data.workers='0,1': expected a key that changes"),
        (["optim.lr=1e-3,3e-3", "optim.lr=6e-3"], "optim.lr=6e-3: optim.lr=1e-3,3e-3 is given, too"),
        (["seed=0,1,2", "seed=3,4"], "seed=3,4: seed=0,1,2 is given, too"),
        (["seed=0,1", "data.length=96", "data.length=96,112"], "data.length=96,112: data.length=96 is given, too"),
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


def test_a_sweep_elsewhere_names_the_folder_that_lacks_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["seed=0,1", "--dry-run"]) == 2
    assert f"--arm t2i_pretrained: no experiments in {tmp_path}/experiments" in capsys.readouterr().err


def test_keys_that_only_a_report_shows_are_swept() -> None:
    assert split_keys(["samples.temperature=0.5,1"])[0] == ("samples.temperature",)


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
                made.append(Outcome(arm, [value], read_run(folder)))
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
            found.append(Outcome(arm, [str(seed)], read_run(folder)))
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


def test_a_batch_size_is_swept_at_equal_tokens_unless_asked_otherwise() -> None:
    words = ["data.batch_size=8,32", "optim.lr=1e-3,3e-3"]
    _, jobs = sweep_jobs(words, ARMS, "demo")
    configs = [job.config for job in jobs.values()]
    assert {config.trainer.max_steps * config.data.batch_size for config in configs} == {19_200}
    assert {(config.data.batch_size, config.log.interval, config.optim.warmup_steps) for config in configs} == {
        (8, 20, 80),
        (32, 5, 20),
    }
    _, jobs = sweep_jobs(words, ARMS, "demo", equal_tokens=False)
    assert {job.config.trainer.max_steps for job in jobs.values()} == {1200}
    _, jobs = sweep_jobs(["data.batch_size=8,32", "trainer.max_steps=100,200"], ARMS, "demo")
    assert {job.config.trainer.max_steps for job in jobs.values()} == {100, 200}


def test_a_best_value_at_the_edge_of_the_grid_is_told_in_table_and_caption(runs: Path) -> None:
    warned = {"0.001": {0: 1.0}, "0.003": {0: 2.0}, "0.009": {0: 3.0}}
    (line,) = at_edges("optim.lr", {"pretrained": warned})
    assert line.startswith("EDGE OF THE GRID: pretrained's best optim.lr, 0.001, is the smallest;")
    assert not at_edges("optim.lr", {"pretrained": {"0.001": {0: 2.0}, "0.003": {0: 1.0}, "0.009": {0: 3.0}}})
    assert not at_edges("optim.lr", {"pretrained": {"0.001": {0: 2.0}}})
    assert not at_edges("optim.name", {"pretrained": {"adamw": {0: 2.0}, "muon": {0: 1.0}}})
    made = outcomes(runs)  # losses do not depend on the value here: the first one, 0.003, is the best
    assert "EDGE OF THE GRID" not in sweep_table("optim.lr", made) + sweep_caption("optim.lr", made)
    made = [one for one in made if one.value != "0.001"]
    assert "EDGE OF THE GRID: scratch's best optim.lr, 0.003, is the smallest" in sweep_table("optim.lr", made)
    assert "EDGE OF THE GRID: scratch's best optim.lr, 0.003, is the smallest" in sweep_caption("optim.lr", made)


def test_two_keys_give_a_map_per_arm_and_their_difference(runs: Path) -> None:
    made, keys = [], ("optim.lr", "data.batch_size")
    for arm in ("pretrained", "scratch"):
        for number, (rate, size) in enumerate(product(("0.001", "0.01"), ("8", "16"))):
            values = {"optim.lr": float(rate), "data.batch_size": int(size)}
            folder = write_run(runs, f"t2i_{arm}", f"20260405-10000{number}", config=values)
            made.append(Outcome(arm, [rate, size], read_run(folder)))
    caption = caption_of(keys, made)
    assert caption.startswith("Sweep of optim.lr and data.batch_size.")
    figure = draw(keys, made, caption)
    assert [axes.get_title() for axes in figure.axes] == [
        "pre-trained",
        "random initialization",
        "random initialization\n- pre-trained",
    ]
    written = [text.get_text().split("\n")[0] for text in figure.axes[0].texts]
    expected = [f"{outcome.nll('image'):.3f}" for outcome in made if outcome.arm == "pretrained"]
    assert sorted(written) == sorted(expected)
    table = tables_of(keys, made)
    assert table.count("image nll: optim.lr, by data.batch_size") == 2
    assert " *" in table


def test_values_that_the_user_gives_are_not_rescaled_at_equal_tokens() -> None:
    swept = ["data.batch_size=8,32", "optim.warmup_steps=20,80"]
    _, jobs = sweep_jobs([*swept, "log.interval=6"], ARMS, "demo")
    found = {(int(size), int(warmup)): job.config for (_, size, warmup), job in jobs.items()}
    assert {point: config.optim.warmup_steps for point, config in found.items()} == {
        (size, warmup): warmup for size in (8, 32) for warmup in (20, 80)
    }
    assert {config.log.interval for config in found.values()} == {6}
    assert {config.trainer.max_steps * config.data.batch_size for config in found.values()} == {19_200}
    assert {config.trainer.val_check_interval for config in found.values()} == {800, 200}


def test_strict_checks_every_run_of_several_seeds_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optim.lr=1e-3,2e-3", "seed=0,1", f"run.dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    keys, jobs = sweep_jobs(words, ARMS, "demo")
    assert keys == ("optim.lr",)
    for number, job in enumerate(jobs.values()):
        stamp = f"20260301-{100000 + number}"
        folder = write_run(tmp_path / "sweep", job.config.name, stamp, config=flatten(job.config))
        environment = json.loads((folder / "env.json").read_text())
        environment |= {"precision": "32-true" if number == 0 else "bf16-mixed", SCENES: SCENES_FORMAT}
        (folder / "env.json").write_text(json.dumps(environment))
    assert not unfinished(list(jobs.values())), "nothing is trained"
    assert main([*words, "--out", str(tmp_path / "figures")]) == 0
    capsys.readouterr()
    assert main([*words, "--strict", "--out", str(tmp_path / "figures")]) == 2
    assert "precision: pretrained 1e-3 seed 0 32-true, pretrained 1e-3 seed 1 bf16-mixed, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "values", "entries"),
    [
        ("data.train_size", (100, 200), ("data_hash", "stream_hash")),
        ("data.control", ("brackets", "digits"), ("data_hash",)),
        ("image_tokenizer.path", ("asset:image_tokenizer", "code:mine:open"), ("data_hash", "tokenizers", "plugins")),
        ("backbone.path", ("asset:lm_rotary", "asset:lm_head_rotary"), ("backbone", "configs")),
        ("trainer.precision", ("32-true", "bf16-mixed"), ("precision",)),
    ],
)
def test_what_follows_from_a_swept_key_is_by_design(
    key: str, values: tuple[object, ...], entries: tuple[str, ...], tmp_path: Path
) -> None:
    outcomes = []
    for number, value in enumerate(values):
        folder = write_run(tmp_path, "t2i_pretrained", f"2026010{number + 1}-100000", config={key: value})
        environment = json.loads((folder / "env.json").read_text())
        for entry in entries:
            nested = {"tokenizers": "image", "configs": "backbone"}.get(entry)
            environment[entry] = {nested: str(number)} if nested else str(number)
        (folder / "env.json").write_text(json.dumps(environment))
        outcomes.append(Outcome("pretrained", (str(value),), read_run(folder)))
    require_comparable({one.value: one.run for one in outcomes}, varied_in([key]))
    assert "NOT CONTROLLED" not in sweep_caption(key, outcomes)
    with pytest.raises(IncomparableError):
        require_comparable({one.value: one.run for one in outcomes}, varied_in(["optim.lr"]))


def test_arms_without_a_style_are_told_apart() -> None:
    names = ("pretrained", "sampling", "mine", "yours", *(f"arm_{number}" for number in range(20)))
    styles = arm_styles(names)
    looks = {(style.color, style.marker) for style in styles.values()}
    assert len(looks) == len(names)
    assert styles["pretrained"] == ARM_STYLES["pretrained"]
    assert len({styles[name].color for name in names[:4]}) == 4
    assert styles["arm_3"].label == "arm 3"


def test_a_swept_arm_without_a_style_has_a_line_of_its_own_color(tmp_path: Path) -> None:
    outcomes = [
        Outcome(arm, (str(rate),), read_run(write_run(tmp_path / arm, "t2i_scratch", f"2026010{number}-100000")))
        for arm in ("scratch", "mine", "yours")
        for number, rate in enumerate((0.001, 0.002))
    ]
    (axes, _) = draw_sweep("optim.lr", outcomes, "A caption with $a__b$.").axes
    colors = {str(line.get_color()) for line in axes.get_lines() if str(line.get_linestyle()) != "None"}
    assert len(colors) == 3
