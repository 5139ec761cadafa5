"""Comparison of two arms: pairing, refusals, endpoints, tables; on synthetic run folders."""

import json
import random
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from t2i_lm import compare as command
from t2i_lm.comparison.arms import find_arms, pair_arms
from t2i_lm.comparison.comparability import SEED, IncomparableError, differences
from t2i_lm.comparison.compare import DIFFERENCE, EQUIVALENT, UNDECIDED, compare
from t2i_lm.comparison.comparison import make_comparison
from t2i_lm.comparison.endpoints import Endpoint, tokens_saved
from t2i_lm.comparison.grid import find_grid
from t2i_lm.comparison.plan import SECONDARY, Plan, chosen_plan, read_plan
from t2i_lm.comparison.statistics import holm, paired_statistics
from t2i_lm.comparison.tables import as_json, latex, text
from t2i_lm.reporting.setup import setup_rows
from t2i_lm.storage.run_folder import read_run
from tests.plots.synthetic_runs import read_lines, write_run

ARMS = ("t2i_pretrained", "t2i_scratch")


def seeded_run(root: Path, name: str, seed: int, day: int = 10, gap: float = 0.0, **more: Any) -> Path:
    """A run whose validation losses have noise of its seed, and `gap` added."""
    config = {"seed": seed, **more.pop("config", {})}
    splits = more.pop("splits", ("iid", "compositional"))
    folder = write_run(root, name, f"202601{day + seed:02d}-093000", config=config, splits=splits, **more)
    noise = random.Random(f"{name} {seed}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for entry in (entry for key in line if key.startswith("val") for entry in line[key].values()):
            entry["nll"] = 1.8 + gap + 3 * (line["step"] == 0) + noise.gauss(0, 0.005)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def set_environment(folder: Path, **entries: Any) -> None:
    environment = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps(environment | entries))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in range(5):
        seeded_run(tmp_path, ARMS[0], seed, gap=-0.1)
        seeded_run(tmp_path / "sweep", ARMS[1], seed)
    return tmp_path


def test_arms_are_paired_by_seed_wherever_their_runs_lie(runs: Path) -> None:
    arms = find_arms(Plan(), runs)
    assert arms.seeds == [0, 1, 2, 3, 4]
    assert not arms.notes
    primary, *secondary = compare(Plan(), arms)
    last = {
        name: [
            read_lines(folder, "val/iid")[-1]["val/iid"]["image"]["nll"] for folder in sorted(runs.rglob(f"{name}/*"))
        ]
        for name in ARMS
    }
    assert primary.means == pytest.approx((fmean(last[ARMS[0]]), fmean(last[ARMS[1]])))
    expected = [one - two for one, two in zip(*last.values(), strict=True)]
    assert list(primary.differences.values()) == pytest.approx(expected)
    assert primary.verdict == DIFFERENCE
    assert [one.primary for one in secondary] == [False] * len(SECONDARY)


def test_equal_arms_are_equivalent_and_a_small_study_is_undecided(tmp_path: Path) -> None:
    for seed in range(8):
        for name in ARMS:
            seeded_run(tmp_path, name, seed)
    assert compare(Plan(), find_arms(Plan(), tmp_path))[0].verdict == EQUIVALENT
    few = Plan(seeds=[0, 1], margin="0.1%")
    arms = find_arms(few, tmp_path)
    results = compare(few, arms)
    assert results[0].verdict == UNDECIDED
    assert "n = 2 is too small for a verdict on val/iid.image.nll; pairs for 80 % power: " in text(few, arms, results)
    one = Plan(seeds=[0])
    assert "undecided, one pair" in text(one, find_arms(one, tmp_path), compare(one, find_arms(one, tmp_path)))


@pytest.mark.parametrize("kind", ["p_difference", "p_equivalence"])
def test_p_values_of_secondary_endpoints_are_corrected_and_the_primarys_is_not(kind: str, runs: Path) -> None:
    plan = Plan(secondary=["val.text.nll", "val.all.nll", "val.boundary.nll"], margin="10%")
    results = compare(plan, find_arms(plan, runs))
    found = [getattr(one.statistics, kind) for one in results]
    alone = [getattr(paired_statistics([*one.differences.values()], one.margin, plan.alpha), kind) for one in results]
    assert found[0] == alone[0]
    assert found[1:] == holm(alone[1:])
    assert found[1:] != alone[1:]


def test_endpoints_name_a_validation_split_or_mean_the_primary_one(runs: Path) -> None:
    run = read_run(next(runs.glob("t2i_pretrained/*")))
    iid, compositional = (run.validations(name)[-1]["val"]["image"]["nll"] for name in run.validation_splits)
    assert Endpoint("val.image.nll").value(run) == Endpoint("val/iid.image.nll").value(run) == iid
    assert Endpoint("val/compositional.image.nll").value(run) == compositional != iid


def primary_loss(root: Path) -> float:
    """The image loss of the first validation set at the end of the first arm's run."""
    lines = (next(root.glob(f"{ARMS[0]}/*")) / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if any(key.startswith("val") for key in line)][-1]
    return float((last.get("val") or last["val/first"])["image"]["nll"])


@pytest.mark.parametrize(
    ("splits", "has"),
    [((), "one validation set, val"), (("first", "second"), "the validation sets first and second")],
)
def test_the_default_plan_fits_runs_without_splits_of_scenes(
    splits: tuple[str, ...], has: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ARMS:
        for seed in range(2):
            seeded_run(tmp_path, name, seed, splits=splits)
    assert command.main(["--runs", str(tmp_path), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    start = f"MISSING: validation splits: the 4 runs have {has}; "
    (said,) = [note for note in printed["notes"] if note.startswith(start)]
    assert "not compared: val/iid.image.nll, val/compositional.image.nll, val/iid.text.nll" in said
    second = [f"val/{split}.{modality}.nll" for split in splits[1:] for modality in ("image", "text")]
    own = ["val.image.nll", *second[:1], "val.text.nll", *second[1:], "val.all.nll"]
    assert said.endswith(f"in their place: {', '.join(own)}")
    assert [one["endpoint"] for one in printed["results"]] == [*own, "tokens_saved.image"]
    assert Endpoint("val.image.nll").value(read_run(next(tmp_path.glob(f"{ARMS[0]}/*")))) == primary_loss(tmp_path)
    with pytest.raises(ValueError, match=r"endpoint val/iid.* has no val/iid in metrics\.jsonl; it has train, val"):
        compare(Plan(), find_arms(Plan(), tmp_path))


def test_missing_unfinished_and_unreadable_runs_are_named(runs: Path) -> None:
    seeded_run(runs, ARMS[1], 6, steps=100, finished=False)
    seeded_run(runs, ARMS[0], 6)
    (write_run(runs, ARMS[1], "20260131-090000") / "config.yaml").write_text("{")
    notes = "\n".join(find_arms(Plan(seeds=[0, 1, 6, 7]), runs).notes)
    assert "left out, unfinished at step 100 of 300: " in notes
    assert "left out, unreadable: " in notes
    assert "MISSING: seed 6 of t2i_scratch" in notes
    assert "MISSING: seed 7 of t2i_pretrained" in notes
    assert "MISSING: seed 7 of t2i_scratch" in notes
    assert "seed 0" not in notes


@pytest.mark.parametrize(
    ("change", "named", "choice"),
    [
        ({"config": {"optim.lr": 0.006}}, "optim.lr: 0.002 (10 runs), 0.006 (2 runs)", "optim.lr=0.002"),
        ({"data_hash": "f" * 16}, "data hash: 0123456789abcdef (10 runs)", "data_hash=0123456789abcdef"),
        ({"config": {"trainer.max_steps": 200}}, "trainer.max_steps: 300 (10 runs)", "trainer.max_steps=300"),
    ],
)
def test_runs_of_another_setting_are_refused_until_one_is_chosen(
    change: dict[str, Any], named: str, choice: str, runs: Path
) -> None:
    for name in ARMS:
        seeded_run(runs, name, 9, **change)
    with pytest.raises(IncomparableError, match="more than one setting") as refusal:
        find_arms(Plan(), runs)
    assert named in str(refusal.value)
    assert choice in str(refusal.value)
    key, _, value = choice.partition("=")
    assert find_arms(Plan(where={key: value}), runs).seeds == [0, 1, 2, 3, 4]


def test_a_folder_of_many_settings_is_told_in_short(runs: Path) -> None:
    for number in range(5):
        change = {
            "optim.lr": 0.01 + number,
            "optim.weight_decay": number,
            "data.length": 120 + number,
            "lora.rank": number,
        }
        set_environment(
            seeded_run(runs, ARMS[0], 9 + number, config=change), tokenizers={"image": f"{number}" * 64, "text": "cc"}
        )
    with pytest.raises(IncomparableError) as refusal:
        find_arms(Plan(), runs)
    message = str(refusal.value)
    assert "optim.lr: 0.002 (10 runs), 0.01 (1 runs), 1.01 (1 runs), and 3 more;" in message
    assert "00000000... (1 runs)" in message
    assert message.endswith("compared by `python -m t2i_lm.study PLAN --results FOLDER`")


def test_the_values_to_choose_by_are_as_the_command_takes_them(tmp_path: Path) -> None:
    for number, config in enumerate(({"data.text_ratio": None, "freeze": ["ffn"]}, {"data.text_ratio": 0.5})):
        for name in ("t2i_pretrained", "t2i_scratch"):
            seeded_run(tmp_path, name, 0, 10 + number, config=config)
    with pytest.raises(IncomparableError, match="Choose one, for example") as error:
        find_arms(Plan(), tmp_path)
    words = shlex.split(str(error.value).partition("for example ")[2])
    assert words == ['freeze=["ffn"]', "data.text_ratio=null"]
    assert len(find_arms(chosen_plan(None, None, words), tmp_path).runs) == 2


def test_other_weights_or_tokenizers_are_another_setting(runs: Path) -> None:
    folder = seeded_run(runs, ARMS[0], 9)
    for run in runs.rglob("env.json"):
        weights = "aa" if ARMS[0] in str(run) else None
        set_environment(run.parent, backbone=weights, tokenizers={"image": "bb", "text": "cc"})
    assert find_arms(Plan(), runs).seeds
    set_environment(folder, backbone="dd")
    with pytest.raises(IncomparableError, match="backbone weights: aa"):
        find_arms(Plan(), runs)
    set_environment(folder, backbone="aa", tokenizers={"image": "ee", "text": "cc"})
    with pytest.raises(IncomparableError, match=r"image tokenizer: bb .* tokenizers.image=bb"):
        find_arms(Plan(), runs)


def test_seeds_of_other_precisions_are_paired_and_named(runs: Path) -> None:
    for folder in runs.rglob("*-demo"):
        seed = int(folder.name[6:8]) - 10
        set_environment(folder, precision="bf16-mixed" if seed < 3 else "32-true")
    arms = find_arms(Plan(), runs)
    assert arms.seeds == [0, 1, 2, 3, 4]
    (note,) = arms.notes
    assert note == "precision by seed: bf16-mixed for seeds 0, 1, 2, 32-true for seeds 3, 4"
    rows = {row[0]: row[1] for row in setup_rows({"one": arms.runs[0]}, arms)}
    assert "bf16-mixed for seeds 0, 1, 2, 32-true for seeds 3, 4" in rows["hardware"]
    one, other = arms.first[0][0], arms.second[3][0]
    assert differences([one, other], (SEED,))["precision"] == ("bf16-mixed", "32-true"), "of no pair: named"


def test_arms_of_other_precisions_are_refused(runs: Path) -> None:
    for folder in runs.rglob("*-demo"):
        set_environment(folder, precision="bf16-mixed")
    set_environment(next(runs.glob("t2i_pretrained/20260112*")), precision="32-true")
    with pytest.raises(IncomparableError, match=r"precision: bf16-mixed \(9 runs\), 32-true \(1 runs\)"):
        find_arms(Plan(), runs)


def test_arms_and_points_of_a_grid_may_have_precisions_of_their_own(tmp_path: Path) -> None:
    for number, precision in enumerate(("32-true", "bf16-mixed")):
        for name in ("t2i_pretrained", "t2i_scratch"):
            folder = seeded_run(tmp_path, name, 0, 10 + number, config={"trainer.precision": precision})
            set_environment(folder, precision=precision)
    own = {"t2i_pretrained": {"trainer.precision": "32-true"}, "t2i_scratch": {"trainer.precision": "bf16-mixed"}}
    assert (
        "by design: precision: t2i_pretrained 32-true, t2i_scratch bf16-mixed" in find_arms(Plan(own), tmp_path).notes
    )
    assert len(find_grid(Plan(), ["trainer.precision"], tmp_path).comparisons) == 2


def test_another_order_of_the_data_is_refused_or_named(runs: Path) -> None:
    set_environment(next(runs.glob("t2i_pretrained/20260112*")), stream_hash="c" * 64)
    with pytest.raises(IncomparableError, match="seed 2: the arms saw the data in another order"):
        find_arms(Plan(), runs)
    assert find_arms(Plan(), runs, strict=False).notes == (
        "NOT CONTROLLED: seed 2: the arms saw the data in another order",
    )


def test_a_copy_of_a_run_is_no_second_run(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = next(runs.glob("t2i_pretrained/20260112*"))
    shutil.copytree(folder, folder.with_name(f"{folder.name}.bak"))
    assert len(find_arms(Plan(), runs).runs) == 10
    assert f"note: {folder}.bak is left out: its name is not DATE-TIME-SCALE" in capfd.readouterr().err


def test_code_revisions_are_a_note(runs: Path) -> None:
    set_environment(next(runs.glob("t2i_pretrained/20260112*")), git="c" * 40)
    assert find_arms(Plan(), runs).notes == ("code revisions: aaaaaaa, ccccccc",)


def test_runs_that_differ_in_threads_alone_measure_rounding(runs: Path) -> None:
    assert compare(Plan(), find_arms(Plan(), runs))[0].rounding_sd is None
    first = seeded_run(runs, ARMS[0], 0, day=20, gap=-0.1 + 0.004)
    set_environment(first, threads=2)
    result = compare(Plan(), find_arms(Plan(), runs))[0]
    assert result.statistics.n == 5
    assert result.rounding_sd == pytest.approx(0.004 / 2**0.5)


def test_an_unpaired_run_without_the_endpoint_changes_nothing(runs: Path) -> None:
    before = compare(Plan(), find_arms(Plan(), runs))
    lone = seeded_run(runs, ARMS[0], 9)
    lines = [json.loads(line) for line in (lone / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in [key for key in line if key.startswith("val")]:
            line[name]["image"]["nonfinite"] = 7
    (lone / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert compare(Plan(), find_arms(Plan(), runs)) == before


def test_an_arm_is_no_pattern(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"0 of t2i_\*, 5 of t2i_scratch"):
        find_arms(Plan(arms=["t2i_*", ARMS[1]]), runs)


def test_without_a_pair_the_command_that_makes_one_is_named(tmp_path: Path) -> None:
    seeded_run(tmp_path, ARMS[0], 0)
    with pytest.raises(ValueError, match="no seed has a finished run of both arms") as refusal:
        find_arms(Plan(seeds=[0, 3], where={"optim.lr": 0.002}), tmp_path)
    assert "1 of t2i_pretrained, 0 of t2i_scratch" in str(refusal.value)
    command = f"python -m t2i_lm.sweep seed=0,3 optim.lr=0.002 run.dir={tmp_path} --arm t2i_pretrained"
    assert command in str(refusal.value)
    with pytest.raises(ValueError, match=r"to make them: python -m t2i_lm\.sweep seed=0,3 --arm t2i_pretrained"):
        pair_arms(Plan(seeds=[0, 3]), {name: [] for name in ARMS}, (), Path("runs"))
    with pytest.raises(ValueError, match="--arm remedies/l2_sp --arm t2i_scratch"):
        find_arms(Plan(arms=["remedy_l2_sp", "t2i_scratch"]), tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("val/gone.image.nll", "has no val/gone in metrics.jsonl; it has train, val"),
        ("forgetting.text", "has no forgetting in metrics.jsonl; it has train, val"),
        ("report.steps.x", "nothing in report.steps"),
        ("report.experiment", "'t2i_pretrained' there, expected a finite number"),
    ],
)
def test_an_endpoint_that_a_run_lacks_names_what_it_has(name: str, words: str, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, ARMS[0]))
    with pytest.raises(ValueError, match=rf"endpoint .*{words}"):
        Endpoint(name).value(run)


def test_tokens_saved_are_those_that_the_worse_run_needs_more() -> None:
    worse = [(0, 8.0), (100, 4.0), (200, 3.0), (300, 2.5)]
    better = [(0, 5.0), (100, 3.0), (200, 2.0), (300, 1.5)]
    assert tokens_saved(better, worse) == 300 - 150
    assert tokens_saved(worse, better) == -150
    assert tokens_saved(worse, worse) == 0
    rising = [(0, 5.0), (100, 3.0), (200, 3.4), (300, 2.0)]  # from the running minimum, 3.0, not from 3.4
    assert tokens_saved(rising, worse) == 300 - 250
    started_lower = [(0, 2.0), (300, 1.0)]
    assert tokens_saved(started_lower, worse) == 300
    overfitted = [(0, 5.0), (100, 2.0), (200, 2.5), (300, 2.3)]  # at its final loss after 90 already
    slower = [(0, 5.0), (100, 2.4), (200, 2.0), (300, 1.8)]
    assert tokens_saved(slower, overfitted) == pytest.approx(90 - 125)


def test_the_json_holds_the_numbers_of_the_text(runs: Path) -> None:
    plan = Plan()
    arms = find_arms(plan, runs)
    results = compare(plan, arms)
    content = json.loads(as_json(plan, arms, results))
    assert [one["endpoint"] for one in content["results"]] == [plan.primary, *plan.secondary]
    assert len(content["runs"]) == 10
    first = content["results"][0]
    table = text(plan, arms, results)
    assert f"{first['mean']:.4f}" in table
    assert "{:.4f} to {:.4f}".format(*first["bootstrap_interval"]) in table
    assert "t2i_pretrained is lower" in table


def test_the_latex_table_is_balanced_and_escaped(runs: Path) -> None:
    plan = Plan()
    arms = find_arms(plan, runs)
    lines = [line for line in latex(plan, arms, compare(plan, arms)).splitlines() if not line.startswith("%")]
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 1 + len(SECONDARY)
    assert {line.count(" & ") for line in body} == {7}
    assert all("_" not in line.replace(r"\_", "") for line in body)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("primry: val.image.nll", "unknown key 'primry'; did you mean 'primary'?"),
        ("margin: -1%", "margin='-1%': expected a positive number"),
        ("alpha: high", "alpha"),
        ("arms: [t2i_scratch]", "arms=.*the names of two experiments"),
        ("seeds: [0, 0]", "seeds=.*each seed once"),
        ("secondary: [val/iid.image.nll]", "secondary=.*each endpoint once"),
        ("primary: image", "endpoint 'image': expected a dotted name"),
        ("[1, 2]", "must hold keys and values, found list"),
        ("arms: {", "is not YAML"),
    ],
)
def test_a_faulty_plan_names_file_and_key(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"plan\.yaml.*{words}"):
        read_plan(file)


def test_the_shipped_plan_is_the_default_one_with_its_seeds() -> None:
    assert read_plan(Path("experiments/plans/pretraining.yaml")) == Plan(seeds=[0, 1, 2, 3, 4])


def test_the_command_prints_or_writes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--runs", str(runs), "optim.lr=2e-3"]) == 0
    assert "5 seeds (0, 1, 2, 3, 4), scale demo, optim.lr=2e-3" in capsys.readouterr().out
    out = tmp_path / "tables" / "gap.json"  # a new folder
    assert command.main(["--runs", str(runs), "--format", "json", "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["seeds"] == [0, 1, 2, 3, 4]
    assert command.main(["--runs", str(runs), "optim.rl=0.002"]) == 2
    assert "optim.rl=0.002: expected a config key" in capsys.readouterr().err


def test_varied_keys_differ_between_the_arms_and_not_within_one(tmp_path: Path) -> None:
    for seed in range(3):
        seeded_run(tmp_path, ARMS[0], seed, config={"optim.lr": 1e-3})
        seeded_run(tmp_path, ARMS[1], seed)
    plan = Plan(varied=["optim.lr"])
    assert find_arms(plan, tmp_path).seeds == [0, 1, 2]
    seeded_run(tmp_path, ARMS[0], 0, day=20, gap=0.5, config={"optim.lr": 4e-3})
    with pytest.raises(IncomparableError, match=r"optim\.lr: 0\.001 \(3 runs\), 0\.004 \(1 runs\)\. Choose") as error:
        find_arms(plan, tmp_path)
    assert str(error.value).endswith("Choose one, for example arms: {t2i_pretrained: {optim.lr: 0.001}} in a plan")
    chosen = replace(plan, arms={ARMS[0]: {"optim.lr": 1e-3}, ARMS[1]: {}}, varied=[])
    assert find_arms(chosen, tmp_path).seeds == [0, 1, 2]


def lose_losses(folder: Path, number: int) -> None:
    """Marks losses of the last iid validation of a run as not finite."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val/iid" in line][-1]
    last["val/iid"]["image"]["nonfinite"] = number
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", ["val/iid.image.nll", "val/iid.image.ppl", "tokens_saved.image"])
def test_validation_losses_that_are_not_finite_are_refused(name: str, runs: Path) -> None:
    folder = next(runs.glob("t2i_pretrained/20260112*"))
    lose_losses(folder, 20)
    with pytest.raises(ValueError, match=rf"endpoint {name}: .*{folder.name} has 20 .*losses that are not"):
        compare(Plan(primary=name, secondary=[], margin="1"), find_arms(Plan(), runs))


def test_curves_of_other_lengths_name_the_runs_and_what_to_leave_out(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path, ARMS[0]))
    longer = write_run(tmp_path, ARMS[1])
    lines = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
    doubled = [line | {"tokens_nominal": 2 * line["tokens_nominal"]} for line in lines]
    (longer / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in doubled))
    with pytest.raises(ValueError, match=r"tokens_saved.image: .*t2i_pretrained.* and .*t2i_scratch.*leave it out"):
        Endpoint("tokens_saved.image").difference(one, read_run(longer))


def test_a_secondary_endpoint_that_a_run_lacks_is_named_and_the_others_stand(runs: Path) -> None:
    lacking = "forgetting.text.text_rows.nll"
    plan = Plan(secondary=[lacking, "val.text.nll"])
    made = make_comparison("pretraining", plan, lambda: find_arms(plan, runs))
    without = Plan(secondary=["val.text.nll"])
    assert made.results == tuple(compare(without, find_arms(without, runs)))
    assert made.arms is not None
    (said,) = [note for note in made.arms.notes if note.startswith("MISSING: endpoint")]
    assert re.search(rf"endpoint {lacking}: .*t2i_pretrained.* has no forgetting in metrics\.jsonl; it has", said)
    primary = Plan(primary=lacking, secondary=["val.text.nll"])
    refused = make_comparison("pretraining", primary, lambda: find_arms(primary, runs))
    assert (refused.results, refused.arms) == ((), None)
    assert lacking in str(refused.problem)


def test_a_secondary_endpoint_that_was_measured_otherwise_is_refused_alone(tmp_path: Path) -> None:
    for name in ARMS:
        for seed in range(3):
            folder = seeded_run(tmp_path, name, seed, forgotten=5.0)
            if seed == 0:
                text = (folder / "metrics.jsonl").read_text()
                (folder / "metrics.jsonl").write_text(text.replace('"targets": 512', '"targets": 9999'))
    plan = Plan(secondary=["forgetting.text.text_rows.nll", "val.text.nll"])
    made = make_comparison("pretraining", plan, lambda: find_arms(plan, tmp_path))
    assert [one.endpoint.name for one in made.results] == ["val/iid.image.nll", "val.text.nll"]
    assert made.arms is not None
    (said,) = [note for note in made.arms.notes if note.startswith("REFUSED: endpoint")]
    assert "the runs were not measured alike: targets" in said


def test_a_plan_of_a_file_is_of_the_sets_that_runs_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ARMS:
        for seed in range(2):
            seeded_run(tmp_path, name, seed, splits=("first", "second"))
    (tmp_path / "plan.yaml").write_text("seeds: [0, 1]\n")
    assert command.main(["--runs", str(tmp_path), "--plan", str(tmp_path / "plan.yaml"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["endpoint"] == "val.image.nll"


@pytest.mark.parametrize("name", ["val.imge.nll", "val/iid.image.nl", "val.image", "tokens_saved.pixels", "val"])
def test_a_typo_in_an_endpoint_is_refused_with_the_plan(name: str) -> None:
    for endpoints in ({"primary": name}, {"secondary": [name]}):
        with pytest.raises(ValueError, match=rf"endpoint '{name}': expected .*(one of text, image|such as val\.image)"):
            Plan(**endpoints)


def test_a_folder_of_runs_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--runs", str(tmp_path / "nope")]) == 2
    assert f"--runs {tmp_path}/nope: no such folder" in capsys.readouterr().err
