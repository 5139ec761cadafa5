"""Fixed-width and Markdown tables."""

from t2i_lm.runtime.tables import markdown_table, text_table


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_right_aligned() -> None:
    rows = [("a long name", "1.5", "note"), ("b", "-12.25", "")]
    assert text_table(("arm", "nll", "source"), rows, left=(0, 2)).splitlines() == [
        "arm             nll  source",
        "a long name     1.5  note",
        "b            -12.25",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert text_table(("arm", "nll"), []) == "arm  nll"


def test_markdown_cells_are_escaped() -> None:
    assert markdown_table(["token"], [["a|b\n<image 3>"]]).splitlines()[-1] == "| a\\|b<br>&lt;image 3> |"
