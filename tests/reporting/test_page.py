"""The page: its numbers are the runs', everything is escaped, nothing is fetched, what is left out is named."""

import base64
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from t2i_lm import compare, figures, report
from t2i_lm.generation.grid import save_grid
from t2i_lm.plots.catalogue import FIGURES, RenderedFigure, Request, figure2
from t2i_lm.reporting.claims import CLAIMS
from t2i_lm.reporting.provenance import config_hash
from t2i_lm.reporting.setup import setup_rows
from t2i_lm.storage.owner import own
from t2i_lm.storage.run_folder import OWNER, Run, read_run
from tests.plots.synthetic_runs import EXPERIMENTS, read_lines, write_probe, write_relearning, write_run
from tests.reporting.parsed import Element, leave_out_figures, parse

PLAN = """
seeds: [0, 1, 2]
secondary: [val.text.nll, tokens_saved.image]
comparisons:
  pretraining: {arms: [t2i_pretrained, t2i_scratch]}
  position_free: {arms: [t2i_pretrained, t2i_scratch], where: {backbone.path: "asset:lm_head_rotary"}}
  unconditional: {arms: [uncond_pretrained, uncond_scratch], secondary: []}
  slower: {arms: [t2i_pretrained, t2i_scratch], where: {optim.lr: 1e-4}, secondary: []}
"""
ARMS = ("t2i_pretrained", "t2i_scratch")
EVIL = '"><script>alert("x")</script><img src=x onerror=alert(1)>'
Command = Callable[..., tuple[int, Element, str]]


def write_pair(root: Path, seed: int = 0, day: int = 1, **options: object) -> list[Path]:
    config = {"seed": seed, **dict(options.pop("config", {}))}  # type: ignore[call-overload]
    stamp = f"202603{day:02}-100000"
    return [write_run(root, name, stamp, config=config, **options) for name in ARMS]


def vary(folder: Path, change: float) -> None:
    """Adds to the held-out image loss of a run, so that seeds differ."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "val" in line:
            line["val"]["image"]["nll"] += change
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(folder: Path, captions: list[str]) -> None:
    (folder / "samples").mkdir()
    for number, name in enumerate(("originals", "reconstructions", "grid", "grid_familiar")):
        images = [np.full((64, 64, 3), 40 * number + 5 * place, np.uint8) for place in range(len(captions))]
        save_grid(images, captions, folder / "samples" / f"{name}.png")


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command on a folder of runs: exit code, page, stderr. Images of figures are left to `full`."""
    leave_out_figures(monkeypatch)
    plan = tmp_path / "study.yaml"
    plan.write_text(PLAN)

    def run(root: Path, *options: str) -> tuple[int, Element, str]:
        out = tmp_path / "out" / "report.html"
        out.unlink(missing_ok=True)
        code = report.main(["--runs", str(root), "--plan", str(plan), "--out", str(out), *options])
        text = out.read_text() if out.exists() else ""
        return code, parse(text), capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with runs for every section, and its page."""
    root = tmp_path_factory.mktemp("full") / "runs"
    for name in EXPERIMENTS:
        forgotten = {"t2i_pretrained": 7.5, "remedy_replay": 0.4, "remedy_l2_sp": 2.0}.get(name)
        config = {"data.replay_ratio": 0.5} if name == "remedy_replay" else {}
        folder = write_run(root, name, "20260301-100000", config=config, forgotten=forgotten)
        if name in ARMS:
            write_relearning(folder, 9.0)
            write_samples(folder, ["a red disc", "two blue stars"])
    for seed in (1, 2):
        vary(write_pair(root, seed, day=2 + seed)[1], 0.01 * seed)
        setting = root / "study" / "backbone.path=asset_lm_head_rotary"
        write_pair(setting, seed, day=2 + seed, config={"backbone.path": HEAD})
    for rate in (0.001, 0.004):
        write_pair(root / "sweep", day=int(10 + 1000 * rate), config={"optim.lr": rate})
    for rate in (0.001, 0.004):
        write_pair(root / "sweep", day=int(20 + 1000 * rate), config={"optim.lr": rate, "data.batch_size": 16})
    write_pair(root / "sweep", day=28, config={"optim.lr": 0.001, "optim.weight_decay": 0.2})
    write_probe({arm: root / name / "20260301-100000-demo" for arm, name in zip(("a", "b"), ARMS, strict=True)}, "rows")
    plan, out = root.parent / "study.yaml", root.parent / "report.html"
    plan.write_text(PLAN)
    assert report.main(["--runs", str(root), "--plan", str(plan), "--out", str(out), "--strict"]) == 0
    return root, out.read_text()


HEAD = "asset:lm_head_rotary"


def last_losses(root: Path, name: str, modality: str) -> list[float]:
    return [
        read_lines(folder, "val")[-1]["val"][modality]["nll"]
        for folder in sorted((root / name).iterdir(), key=lambda folder: folder.name)
    ]


def cells(page: Element, endpoint: str, comparison: str = "pretraining") -> list[str]:
    table = page.all("table", data_comparison=comparison)[0]
    return [cell.text for cell in table.one("tr", data_endpoint=endpoint).all("td")]


@pytest.mark.slow
def test_the_answer_has_the_numbers_of_the_runs_and_the_verdict_of_compare(
    full: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, text = full
    page = parse(text)
    mine, other = (last_losses(root, name, "image") for name in ARMS)
    assert len(mine) == 3
    row = cells(page, "val.image.nll")
    assert row[1:4] == [f"{np.mean(mine):.4f}", f"{np.mean(other):.4f}", f"{np.mean(mine) - np.mean(other):+.4f}"]
    assert row[6] == "3"
    answer = page.one("section", id="answer")
    verdict = answer.all("p")[0].attributes["data-verdict"]
    for number in (*row[1:4], *row[5].split(" to ")):
        assert number in answer.all("p")[0].text

    plan = tmp_path / "plan.yaml"
    plan.write_text("seeds: [0, 1, 2]\nprimary: val.image.nll\nsecondary: [val.text.nll, tokens_saved.image]\n")
    where = ["optim.lr=0.002", "backbone.path=asset:lm_rotary"]
    assert compare.main(["--plan", str(plan), "--runs", str(root), *where]) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("val.image.nll"))
    assert printed.endswith(verdict)
    assert row[1] in printed
    assert row[5] in printed


@pytest.mark.slow
def test_every_section_has_its_figure_values_runs_and_hashes(full: tuple[Path, str]) -> None:
    root, text = full
    page = parse(text)
    sections = {one.attributes["id"]: one for one in page.all("section")}
    assert [key for key in sections if key in CLAIMS] == [key for key in CLAIMS if key in sections]
    for name in ("2", "3", "4", "5", "6", "inits", "forgetting", "relearning", "remedies"):
        section = sections[f"figure{name}" if name.isdigit() else name]
        assert section.one("figure").one("img").attributes["alt"]
        assert f"python -m t2i_lm.figures --figure {name}" in section.text
        assert name == "2" or "0123456789abcdef" in section.one("details", **{"class": "hashes"}).text
    assert "train experiments/t2i_pretrained.yaml --scale demo" in sections["figure3"].text
    assert "change +7.5000 ± 0.0750" in sections["forgetting"].text
    assert "before and after 10 steps on text: pre-trained 9.0000 and 6.0000" in sections["relearning"].text
    assert "Sweep of optim.weight_decay" in sections["sweeps"].one("figure").text
    assert "Sweep of data.batch_size and optim.lr" in sections["grids"].one("figure").text
    assert "at 4 equal values" in sections["grids"].text
    assert "rows found (n = 7)." in sections["probes"].text
    assert f"python -m t2i_lm.probe {root}/t2i_pretrained/" in sections["probes"].text
    for key in ("grids", "probes"):
        assert "0123456789abcdef" in sections[key].one("details", **{"class": "hashes"}).text
    assert "asset:lm_head_rotary: Held-out image loss" in sections["positions"].text
    assert "Comparison: slower" in text
    losses = last_losses(root, "uncond_tune_ffn", "image")
    assert f"{losses[0]:.4f}" in sections["figure5"].text


@pytest.mark.slow
def test_samples_stand_beside_originals_and_reconstructions_with_their_captions(full: tuple[Path, str]) -> None:
    section = parse(full[1]).one("section", id="samples")
    first = section.all("figure")[0]
    assert [one.text for one in first.all("span")] == ["original", "reconstruction", "pre-trained", "random weights"]
    assert first.one("figcaption").text == "a red disc"
    assert len(section.all("figure")) == 4


@pytest.mark.slow
def test_nothing_is_fetched_and_nothing_runs(full: tuple[Path, str]) -> None:
    page = parse(full[1])
    assert not page.all("script")
    links = [one.attributes[name] for one in page.all() for name in ("src", "href", "data") if name in one.attributes]
    assert {link for link in links if not link.startswith(("data:", "#"))} == {"https://arxiv.org/abs/2311.16201"}
    assert {one.tag for one in page.all() if one.attributes.get("href", "").startswith("https:")} == {"a"}
    style = page.one("style").text
    assert "url(" not in style
    assert "@import" not in style
    for link in links:
        if link.startswith("data:image/svg+xml;base64,"):
            svg = base64.b64decode(link.partition(",")[2]).decode()
            assert not re.search(r"""(?:href|src)\s*=\s*["'](?!#|data:)|<script|<!DOCTYPE""", svg)
    assert len(full[1]) < 10_000_000
    assert not [name for one in page.all() for name in one.attributes if name.startswith("on")]


def test_one_pair_is_undecided_and_says_so(tmp_path: Path, page: Command) -> None:
    write_pair(tmp_path / "runs")
    code, tree, _ = page(tmp_path / "runs")
    assert code == 0
    answer = tree.one("section", id="answer")
    assert answer.all("h2")[0].text == "Undecided: n too small."
    assert "no interval with n = 1" in answer.text
    assert "undecided, one pair" in answer.text
    assert "n = 1 is too small for a verdict on val.image.nll" in answer.text
    assert "MISSING: seeds 1, 2 of t2i_scratch" in answer.text


def test_runs_of_a_sweep_alone_have_an_answer_and_figures(tmp_path: Path, page: Command) -> None:
    write_pair(tmp_path / "runs" / "sweep")
    code, tree, _ = page(tmp_path / "runs")
    assert code == 0
    assert cells(tree, "val.image.nll")[6] == "1"
    assert tree.one("section", id="figure4").all("figure")


def test_a_section_without_runs_names_the_command_that_makes_them(tmp_path: Path, page: Command) -> None:
    (tmp_path / "runs").mkdir()
    code, tree, _ = page(tmp_path / "runs", "--strict")
    assert code == 0
    text = tree.one("section", id="answer").text
    assert "No answer yet." in text
    assert "To make the runs: python -m t2i_lm.sweep seed=0,1,2" in text
    for key, words in {
        "figure3": "make exp-pretrained exp-scratch",
        "figure5": "python -m t2i_lm.ablate --all",
        "positions": "python -m t2i_lm.sweep seed=0,1,2 backbone.path=asset:lm_head_rotary",
        "sweeps": "python -m t2i_lm.sweep optim.lr=",
    }.items():
        absent = tree.one("section", id=key).all("p", **{"class": "absent"})
        assert len(absent) == 1
        assert words in absent[0].text


def test_everything_from_files_is_escaped(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    config = {"backbone.config": EVIL, "backbone.path": None, "data.source": "image_folder", "data.path": f"/x/{EVIL}"}
    for name in ARMS:
        folder = write_run(root, name, config=config, data_hash=EVIL, forgotten=1.0)
        write_samples(folder, [EVIL, "<b>bold</b>"])
        lines = (folder / "metrics.jsonl").read_text().replace("Simply put", json.dumps(EVIL)[1:-1])
        (folder / "metrics.jsonl").write_text(lines)
    damaged = root / "t2i_scratch" / "20260301-093000-<script>alert(2)"
    damaged.mkdir()
    (damaged / "config.yaml").write_text("a: [")
    code, tree, _ = page(root)
    assert code == 0
    assert not tree.all("script")
    assert not [one for one in tree.all("img") if not one.attributes["src"].startswith("data:")]
    assert not [one for one in tree.all() if "onerror" in one.attributes]
    assert EVIL in tree.one("section", id="samples").text
    assert EVIL in tree.one("section", id="table1").text
    assert EVIL in tree.one("section", id="setup").text or "onerror" in tree.one("section", id="setup").text
    assert "<b>bold</b>" in tree.one("section", id="samples").text
    assert "<script>alert(2)" in tree.text


def test_another_data_version_is_named_and_refused_by_strict(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for seed in (0, 1):
        write_pair(root, seed, day=1 + seed)
    write_pair(root, 2, day=9, data_hash="f" * 16)
    code, tree, _ = page(root)
    assert code == 0
    assert "left out, another setting (2 runs): data hash ffffffffffffffff instead of 0123456789abcdef" in tree.text
    assert cells(tree, "val.image.nll")[6] == "2"
    code, tree, error = page(root, "--strict")
    assert code == 2
    assert not tree.text
    assert error.startswith("error: pretraining: the runs are of more than one setting: data hash: ")
    assert error.count("\n") == 1


def test_an_arm_of_a_figure_on_other_data_is_named_and_refused_by_strict(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for name in ("uncond_scratch", "uncond_pretrained"):
        write_run(root, name, "20260301-100000")
    write_run(root, "uncond_tune_ffn", "20260301-100000", data_hash="f" * 16)
    code, tree, _ = page(root)
    assert code == 0
    assert "uncond_tune_ffn/20260301-100000-demo: data hash ffffffffffffffff instead of 0123456789abcdef" in tree.text
    code, _, error = page(root, "--strict")
    assert code == 2
    assert "figure 5: left out, another data version" in error


def test_arms_that_differ_in_more_are_named_and_refused_by_strict(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    write_run(root, "uncond_scratch", "20260301-100000")
    write_run(root, "uncond_pretrained", "20260301-100000", config={"optim.weight_decay": 0.5})
    code, tree, _ = page(root)
    assert code == 0
    notes = tree.one("section", id="figure5").text
    assert "NOT CONTROLLED: optim.weight_decay: scratch 0.1, pretrained 0.5" in notes
    code, _, error = page(root, "--strict")
    assert code == 2
    assert "optim.weight_decay" in error


def test_unfinished_runs_and_those_being_written_are_named_and_not_mixed(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    write_pair(root)
    write_pair(root, day=5, steps=100, finished=False)
    written = write_pair(root, day=6)[0]
    with own(written / OWNER):
        code, tree, _ = page(root, "--strict")
    assert code == 0
    section = tree.one("section", id="figure3")
    assert "left out, unfinished at step 100 of 300" in section.text
    assert f"left out, still being written: {written} by process" in section.text
    assert "UNFINISHED" not in section.text
    assert str(written) not in section.one("details", **{"class": "hashes"}).text
    assert (
        cells(tree, "val.image.nll")[1]
        == f"{read_lines(root / ARMS[0] / '20260301-100000-demo', 'val')[-1]['val']['image']['nll']:.4f}"
    )


def test_a_comparison_over_a_grid_is_one_section_with_its_best_values(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for number, rate in enumerate((0.001, 0.002, 0.004)):
        for seed in range(2):
            folder = root / "study" / (f"optim.lr={rate}" if rate != 0.002 else "")
            vary(write_pair(folder, seed, day=2 * number + seed + 1, config={"optim.lr": rate})[1], 0.01 * seed)
    write_pair(root / "study" / "data.length=64", config={"data.length": 64})  # the setting of another plan
    (tmp_path / "study.yaml").write_text(
        "seeds: [0, 1]\nprimary: val.image.nll\nsecondary: []\n"
        "comparisons: {rates: {over: {optim.lr: [0.001, 0.002, 0.004]}}}\n"
    )
    code, found, _ = page(root, "--strict")
    assert code == 0
    section = found.one("section", id="grid-rates")
    assert "best optim.lr 0.00" in section.text
    assert section.text.count("no interval") + section.text.count("95 % interval") >= 2
    (table,) = [table for table in section.all("table") if table.attributes["class"] == "plain"]
    assert len(table.all("tr")) == 4
    assert not found.all("table", data_comparison="rates_optim.lr=0.004")


def test_without_a_best_value_there_is_no_answer(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for day, rate in enumerate((0.001, 0.002, 0.004), start=1):
        write_pair(root / "study" / f"optim.lr={rate}", day=day, config={"optim.lr": rate})
    shutil.rmtree(root / "study" / "optim.lr=0.004" / ARMS[1])
    (tmp_path / "study.yaml").write_text(
        "seeds: [0]\nprimary: val.image.nll\nsecondary: []\n"
        "comparisons: {rates: {over: {optim.lr: [0.001, 0.002, 0.004]}}}\n"
    )
    code, found, _ = page(root)
    assert code == 0
    answer = found.one("section", id="answer").text
    assert "No answer yet." in answer
    assert "no best value: MISSING at optim.lr=0.004: seeds 0" in answer
    assert f"python -m t2i_lm.study {tmp_path}/study.yaml" in answer


def test_seeds_of_other_precisions_are_one_setting(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for seed in range(3):
        for folder in write_pair(root, seed, day=1 + seed):
            environment = json.loads((folder / "env.json").read_text())
            environment["precision"] = "bf16-mixed" if seed == 0 else "32-true"
            (folder / "env.json").write_text(json.dumps(environment))
    for options in ([], ["--strict"]):
        _, found, _ = page(root, *options)
        answer = found.one("section", id="answer").text
        assert "bf16-mixed for seed 0, 32-true for seeds 1, 2" in answer
        assert "MISSING: seed" not in answer
    first, _ = write_pair(root, 1, day=20)  # repeated, in the other precision, without the partner's being repeated
    shutil.rmtree(_)
    (first / "env.json").write_text(json.dumps({**environment, "precision": "bf16-mixed"}))
    _, found, _ = page(root)
    answer = found.one("section", id="answer").text
    assert "MISSING: seed" not in answer
    assert "left out, another setting (1 runs): precision" in answer
    shutil.rmtree(first)
    environment["precision"] = "bf16-mixed"
    (folder / "env.json").write_text(json.dumps(environment))  # of one arm of the last seed
    _, found, _ = page(root)
    answer = found.one("section", id="answer").text
    assert "MISSING: seed 2 of t2i_scratch" in answer
    assert "left out, another setting (1 runs): precision" in answer


@pytest.mark.parametrize(
    "plan",
    [
        "comparisons: {rates: {over: {optim.lr: [0.001, 0.002, 0.004]}}}",
        "comparisons: {own: {arms: {t2i_pretrained: {optim.lr: 0.002}, t2i_scratch: {optim.lr: 0.001}}}}",
    ],
    ids=["best of a grid", "of the plan"],
)
def test_arms_with_learning_rates_of_their_own_are_drawn(plan: str, tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for day, rate in enumerate((0.001, 0.002, 0.004), start=1):
        pair = write_pair(root / "study" / f"optim.lr={rate}", day=day, config={"optim.lr": rate})
        for folder, best in zip(pair, (0.002, 0.001), strict=True):
            vary(folder, abs(rate - best))
    (tmp_path / "study.yaml").write_text(f"seeds: [0]\nprimary: val.image.nll\nsecondary: []\n{plan}\n")
    code, found, error = page(root, "--strict")
    assert code == 0, error
    figure = found.one("section", id="figure3").text
    assert "learning rates 0.001, 0.002" in figure
    assert "By design, the arms (pre-trained and random) also differ in optim.lr: 0.002 and 0.001." in figure
    assert "NOT CONTROLLED" not in figure


def test_several_code_revisions_are_named(tmp_path: Path, page: Command) -> None:
    first, _ = write_pair(tmp_path / "runs")
    environment = json.loads((first / "env.json").read_text())
    (first / "env.json").write_text(json.dumps({**environment, "git": "c" * 40}))
    code, tree, _ = page(tmp_path / "runs", "--strict")
    assert code == 0
    assert "code revisions: aaaaaaa, ccccccc" in tree.one("section", id="answer").text
    assert "code revisions: aaaaaaa, ccccccc" in tree.one("section", id="figure3").text


def test_a_new_figure_of_the_catalogue_appears_by_itself(
    tmp_path: Path, page: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.setitem(FIGURES, "new", figure2)
    _, tree, _ = page(tmp_path / "runs")
    assert tree.one("section", id="figure_new").one("figure").one("img")


@pytest.mark.slow
def test_set_up_stands_beside_the_papers(full: tuple[Path, str]) -> None:
    rows = {
        row.all("th")[0].text: [cell.text for cell in row.all("td")]
        for row in parse(full[1]).one("section", id="setup").all("tr")[1:]
    }
    assert rows["positions"][:2] == ["rotary", "head_rotary: none beyond the causal mask"]
    assert rows["steps"][:2] == ["300", "about 100,000"]
    assert rows["learning rate"][0] == "peak 0.002, cosine, 20 warm-up steps"
    assert rows["text : image"][0] == "1 : 3.4 in validation"
    assert rows["data"][1] == "HQITP, 134M image-caption pairs, private"


def test_what_is_lost_is_of_the_compared_runs(tmp_path: Path, page: Command) -> None:
    for seed in range(3):
        for folder in write_pair(tmp_path, seed, 1 + seed, forgotten=7.5):
            vary(folder, 0.01 * seed * ("scratch" in str(folder)))
    newer = write_pair(tmp_path, day=9, data_hash="f" * 16, config={"trainer.max_steps": 100}, forgotten=0.1)
    _, found, _ = page(tmp_path)
    answer = found.one("section", id="answer").text
    assert "+7.5000" in answer
    assert "+0.1000" not in answer
    assert newer[0].name not in answer


def test_the_set_up_gives_both_arms_values_where_they_differ(tmp_path: Path) -> None:
    folders = (
        write_run(tmp_path, name, config={"optim.lr": rate}) for name, rate in zip(ARMS, (1e-3, 4e-3), strict=True)
    )
    rows = {row[0]: row[1] for row in setup_rows(dict(zip(("one", "two"), map(read_run, folders), strict=True)))}
    assert rows["learning rate"].startswith("one: peak 0.001, cosine")
    assert "; two: peak 0.004, cosine" in rows["learning rate"]
    assert "one: " not in rows["sequence"]


def test_ids_of_an_image_are_counted_with_and_without_captions(tmp_path: Path) -> None:
    for task, boundary in (("text_to_image", 5), ("unconditional", 3)):
        folder = write_run(tmp_path / task, "uncond_scratch", config={"task": task})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if "val" in line:
                line["val"]["image"]["count"], line["val"]["boundary"]["count"] = 64_000, 1000 * boundary
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = {row[0]: row[1] for row in setup_rows({"one": read_run(folder)})}
        assert rows["image tokenizer"].endswith(" to 64 ids")


def test_equal_pairs_are_said_to_be_equal(tmp_path: Path, page: Command) -> None:
    for seed in range(3):
        write_pair(tmp_path, seed, 1 + seed)
    _, found, _ = page(tmp_path)
    answer = found.one("section", id="answer").text
    assert "Undecided: every pair is equal; the runs may be copies." in answer
    assert "too small" not in answer


def test_the_hash_of_a_config_is_that_of_what_is_computed(tmp_path: Path) -> None:
    paths = {"data.path": "/somewhere", "image_tokenizer.path": "/tokenizer", "backbone.path": "/backbone"}
    elsewhere, other = paths | {"data.path": "/elsewhere"}, paths | {"optim.lr": 0.5}
    runs = [
        read_run(write_run(tmp_path / str(number), ARMS[0], config=config))
        for number, config in enumerate((paths, elsewhere, other))
    ]
    one, moved, changed = map(config_hash, runs)
    assert one == moved != changed


def test_arms_that_were_sampled_differently_are_named(tmp_path: Path, page: Command) -> None:
    pair = [
        write_run(tmp_path, name, config={"samples.temperature": t}) for name, t in zip(ARMS, (1.0, 0.2), strict=True)
    ]
    for folder in pair:
        write_samples(folder, ["a red disc"])
    _, found, _ = page(tmp_path)
    assert (
        "NOT CONTROLLED: samples.temperature: pre-trained 1.0, random weights 0.2"
        in found.one("section", id="samples").text
    )


@pytest.mark.parametrize("folder", ["study", "study/optim.lr={}"])
def test_the_command_of_a_figure_draws_it_from_the_runs_of_the_page(
    folder: str, tmp_path: Path, page: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    for number, rate in enumerate((0.002, 0.001)[: 1 + ("{}" in folder)], start=1):
        pair = write_pair(root / folder.format(rate), day=number, config={"optim.lr": rate}, forgotten=1.0)
        for one, best in zip(pair, (0.002, 0.001), strict=True):
            vary(one, abs(rate - best))
    plan = "rates: {over: {optim.lr: [0.001, 0.002]}}" if "{}" in folder else "pretraining: {}"
    (tmp_path / "study.yaml").write_text(
        f"seeds: [0]\nprimary: val.image.nll\nsecondary: []\ncomparisons: {{{plan}}}\n"
    )
    code, found, _ = page(root)
    assert code == 0
    drawn: list[dict[str, Run]] = []
    monkeypatch.setattr(Request, "check", lambda self, arms, varied=(): drawn.append(arms))
    monkeypatch.setattr(RenderedFigure, "save", lambda self, stem: [stem])
    for key, option in (("figure3", "--figure 3"), ("forgetting", "--figure forgetting"), ("table1", "--table")):
        section = found.one("section", id=key)
        command = section.one("p", **{"class": "again"}).one("code").text
        assert f"t2i_lm.figures {option}" in command
        assert figures.main([*shlex.split(command)[3:], "--out", str(tmp_path / "out")]) == 0
        for run in drawn[-1].values():
            assert str(run.folder) in section.text


def test_the_pair_of_a_plan_is_no_arm_of_other_figures(tmp_path: Path, page: Command) -> None:
    root = tmp_path / "runs"
    for day, rate in enumerate((0.001, 0.002, 0.004), start=1):
        pair = write_pair(root / "study" / f"optim.lr={rate}", day=day, config={"optim.lr": rate})
        for folder, best in zip(pair, (0.002, 0.001), strict=True):
            vary(folder, abs(rate - best))
    for name in ("t2i_gaussian", "t2i_shuffled"):
        write_run(root / "study" / "backbone.path=x", name, config={"optim.lr": 0.004, "backbone.path": "x"})
    (tmp_path / "study.yaml").write_text(
        "seeds: [0]\nprimary: val.image.nll\nsecondary: []\n"
        "comparisons: {rates: {over: {optim.lr: [0.001, 0.002, 0.004]}}}\n"
    )
    code, found, error = page(root, "--strict")
    assert code == 0, error
    assert found.one("section", id="figure3").all("figure")
    assert not found.one("section", id="inits").all("figure")
