"""The page of the shipped study: its runs fill the sections of the paper's claims, with intervals over seeds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t2i_lm.comparison.study_plan import Study, read_study
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.plots.catalogue import Request
from t2i_lm.plots.pairing import RunPair
from t2i_lm.reporting.study_page import write_page
from t2i_lm.training.study import StudyRun, compare_arms, shown_runs, study_runs
from t2i_lm.training.study_results import results_of
from tests.reporting.parsed import Element, leave_out_figures, parse
from tests.study_folders import finish

EXPERIMENTS = Path("experiments")
PLAN = EXPERIMENTS / "study.yaml"


def image_loss(config: ExperimentConfig) -> float:
    """Of random weights the highest, of the parts the one of FFN layers the lowest."""
    return {"t2i_scratch": 1.7, "uncond_scratch": 2.0, "uncond_tune_ffn": 1.5}.get(config.name, 1.6)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[StudyRun], Element]:
    """The plan with three seeds, its runs, of which those that start from aligned rows are missing, and the page."""
    folder = tmp_path_factory.mktemp("study")
    plan = replace(read_study(PLAN), seeds=[0, 1, 2])
    runs = study_runs(plan, EXPERIMENTS, [f"run.dir={folder}/runs"])
    made = [run for run in runs if run.job.config.aligned_rows is None]
    finish([run for run in made if not run.repeats], image_loss)
    finish([run for run in made if run.repeats], lambda config: image_loss(config) + 0.02, first=500, threads=3)
    results = results_of(plan, compare_arms(plan, runs))
    drawn: list[RunPair] = []

    def draw(request: Request, *_: object, **__: object) -> int:
        drawn.append(request.pair)
        return 0

    with pytest.MonkeyPatch.context() as patch:  # figures have tests of their own
        patch.setattr("t2i_lm.reporting.study_page.write_figures", draw)
        leave_out_figures(patch)
        assert write_page(plan, runs, results, PLAN, EXPERIMENTS, folder, strict=True) == 0
    assert [(run.config["init"], run.config["seed"]) for run in drawn[0].arms.values()] == [
        ("pretrained", 0),
        ("random", 0),
    ], "the pair of the page"
    return plan, runs, parse((folder / "report.html").read_text())


def rows(section: Element) -> dict[str, list[str]]:
    """Cells of the section's table over seeds by the first; that of single runs is the second."""
    table, alone = (one for one in section.all("table") if one.attributes["class"] == "plain")
    assert "random weights" in alone.text
    return {cells[0]: cells for cells in ([cell.text for cell in row.all("td")] for row in table.all("tr")[1:])}


@pytest.mark.slow
def test_runs_of_a_comparison_with_its_own_steps_are_shown(study: tuple[Study, list[StudyRun], Element]) -> None:
    _, runs, page = study
    shown, _ = shown_runs(runs)
    assert {(run.config["name"], run.config["trainer"]["max_steps"]) for run in shown if "uncond" in run.name} == {
        (f"uncond_{name}", 600)
        for name in ("scratch", "pretrained", "tune_embed", "tune_norm", "tune_first_half", "tune_ffn")
    }
    assert {run.config["backbone"]["path"] for run in shown} == {"asset:lm_rotary"}, "not of another setting"
    assert "Figure 5" in page.one("section", id="figure5").text


@pytest.mark.slow
@pytest.mark.parametrize(("key", "arms"), [("figure5", 5), ("inits", 2)])
def test_arms_of_a_claim_stand_in_its_section_with_intervals(
    key: str, arms: int, study: tuple[Study, list[StudyRun], Element]
) -> None:
    _, _, page = study
    section = page.one("section", id=key)
    found = rows(section)
    assert len(found) == arms
    assert "To make them" not in section.text
    assert "One run of each" not in section.text
    assert not [one for one in page.all("section") if one.attributes["id"].startswith("grid-")]
    if key == "figure5":
        mean, other = (float(cell) for cell in found["uncond_tune_ffn"][1:3])
        assert mean == pytest.approx(1.5, abs=0.05)
        assert other == pytest.approx(2.0, abs=0.05)
        low, high = map(float, found["uncond_tune_ffn"][4].split(" to "))
        assert low < mean - other < high
        assert found["uncond_tune_ffn"][5] == "3"
        assert len(section.all("figure")) == 2, "Figure 5 and the intervals"
    else:
        assert found["t2i_aligned"][-1] == "MISSING"
        assert found["t2i_shuffled"][5] == "3"


@pytest.mark.slow
def test_the_answer_says_what_rounding_does(study: tuple[Study, list[StudyRun], Element]) -> None:
    text = study[2].one("section", id="answer").text
    words = "rounding, held-out image loss (new images of trained color-shape pairs)"
    assert f"{words}: {0.02 / 2**0.5:.4f}." in text


@pytest.mark.slow
def test_forgetting_is_told_over_seeds(study: tuple[Study, list[StudyRun], Element]) -> None:
    _, runs, page = study
    pair = [run for run in shown_runs(runs)[0] if run.name == "t2i_pretrained"]
    after = [run.records("forgetting")[-1]["forgetting"]["text"]["text_rows"]["nll"] for run in pair]
    assert len(after) == 3
    for key in ("answer", "forgetting"):
        text = page.one("section", id=key).text
        assert f"4.0000 before, {np.mean(after):.4f} [" in text
        assert "(n = 3 seeds)" in text
    table = page.all("table", data_comparison="pretraining")[0]
    row = table.one("tr", data_endpoint="forgetting.text.text_rows.best_temperature.nll")
    assert row.all("td")[0].text.startswith("loss of plain text after training")


@pytest.mark.parametrize(
    ("other", "code"), [("{experiment: t2i_pretrained, optim.lr: 1e-3}", 0), ("{experiment: t2i_scratch}", 2)]
)
def test_only_a_plan_with_both_arms_requires_figures_of_a_pair(
    other: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "seeds: [0]\nsecondary: []\ncomparisons:\n  rates:\n    where: {forgetting.interval: null}\n"
        f"    arms: {{default: {{experiment: t2i_pretrained}}, other: {other}}}"
    )
    study = read_study(plan)
    runs = study_runs(study, EXPERIMENTS, [f"run.dir={tmp_path}"])
    finish(runs[: 1 if code else 2], image_loss)
    results = results_of(study, compare_arms(study, runs))
    leave_out_figures(monkeypatch)
    assert write_page(study, runs, results, plan, EXPERIMENTS, tmp_path, strict=True) == code
    assert ("figures: no run from pre-trained and run from random" in capsys.readouterr().err) == bool(code)
    assert (tmp_path / "report.html").is_file()
