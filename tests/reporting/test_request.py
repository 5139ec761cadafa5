import pytest

from t2i_lm.reporting.request import missing_runs, short_notes


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("no run of align in runs; to make them: make x, or a=b", ("no run of align in runs", "make x, or a=b")),
        ("relearning of a: b was not measured: python -m x", ("relearning of a: b was not measured", "python -m x")),
        ("no seed\nleft out\nto make them: python -m y", ("no seed", "python -m y")),
        ("no pair\nto make a pair:\n  make z", ("no pair", "the section's")),
        ("", ("no finished runs for this section", "the section's")),
    ],
)
def test_a_missing_section_has_a_reason_and_a_command(problem: str, expected: tuple[str, str]) -> None:
    assert missing_runs(problem, "the section's") == expected


def test_missing_seeds_of_an_arm_are_one_note() -> None:
    notes = ["a", "MISSING: seed 1 of x", "MISSING: seed 1 of y", "MISSING: seed 2 of x"]
    assert short_notes(notes) == ["a", "MISSING: seeds 1, 2 of x", "MISSING: seed 1 of y"]
