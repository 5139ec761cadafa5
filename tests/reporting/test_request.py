from pathlib import Path

import pytest

from t2i_lm.comparison.study_plan import Study
from t2i_lm.reporting.claims import CLAIMS
from t2i_lm.reporting.request import ReportRequest, missing_runs, named_pair, short_notes
from t2i_lm.reporting.search import Pool, RunSearch
from t2i_lm.reporting.sections import Section, _add_probes
from t2i_lm.storage.run_folder import THINNED, read_run
from tests.plots.synthetic_runs import write_run


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("no run of align in runs; to make them: make x, or a=b", ("no run of align in runs", "make x, or a=b")),
        ("relearning of a: b was not measured: python -m x", ("relearning of a: b was not measured", "python -m x")),
        ("no seed\nleft out\nto make them: python -m y", ("no seed", "python -m y")),
        ("no pair\nto make a pair:\n  make z", ("no pair", "the section's")),
        ("a: collected results lack it; do b", ("a: collected results lack it; do b", "")),
        ("", ("no finished runs for this section", "the section's")),
    ],
)
def test_a_missing_section_has_a_reason_and_a_command(problem: str, expected: tuple[str, str]) -> None:
    assert missing_runs(problem, "the section's") == expected


def test_missing_seeds_of_an_arm_are_one_note() -> None:
    notes = ["a", "MISSING: seed 1 of x", "MISSING: seed 1 of y", "MISSING: seed 2 of x"]
    assert short_notes(notes) == ["a", "MISSING: seeds 1, 2 of x", "MISSING: seed 1 of y"]


def test_runs_that_repeat_others_with_other_threads_count_with_them(tmp_path: Path) -> None:
    """As in `compare` of the same folder, where a seed's value is the mean of its repeats."""
    for number, folder in enumerate(("trainer.max_steps=400", "trainer.max_steps=400_trainer.threads=2")):
        for name in ("t2i_pretrained", "t2i_scratch"):
            config = {"trainer.max_steps": 400, "trainer.threads": number + 1}
            write_run(tmp_path / "study" / folder, name, f"2026011{number}-093000", config=config)
    study = Study(seeds=[0], secondary=[], comparisons={"one": {"where": {"trainer.max_steps": 400}}})
    (made,) = RunSearch(tmp_path).comparisons(study, strict=True)
    assert made.arms is not None, made.problem
    assert [len(runs) for arm in (made.arms.first, made.arms.second) for runs in arm.values()] == [2, 2]


def test_the_pair_of_figures_3_and_4_is_that_of_the_experiments_themselves(tmp_path: Path) -> None:
    runs = {name: read_run(write_run(tmp_path, name)) for name in ("t2i_pretrained", "t2i_scratch")}
    assert named_pair(runs) == tuple(runs.values())
    assert named_pair({"step_50": runs["t2i_pretrained"], "t2i_scratch": runs["t2i_scratch"]}) is None
    assert named_pair({"t2i_scratch": runs["t2i_scratch"]}) is None


def test_probes_of_collected_results_are_advised_of_the_runs_themselves(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "t2i_scratch"))
    request = ReportRequest([], Pool((), ()), RunSearch(tmp_path), None, Path("experiments"), strict=False)
    advised = []
    for _ in range(2):
        section = Section("probes", CLAIMS["probes"])
        _add_probes(request, section, {"t2i_scratch": run})
        advised.append(section.missing)
        (run.folder / THINNED).touch()
    assert advised[0] == ("no probe of these runs", f"python -m t2i_lm.probe {run.folder}")
    assert advised[1] is not None
    assert advised[1][0].endswith("lack it; probe the runs themselves and collect them again with --images")
    assert not advised[1][1]
