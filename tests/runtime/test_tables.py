"""Fixed-width and Markdown tables."""

import pytest

from t2i_lm.runtime.tables import latex_table, markdown_table, text_table


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


def test_markdown_cells_hold_no_image_and_no_link() -> None:
    for token in ("![x](http://a.org/x.png)", "[x](http://a.org)", "![x][a]", "\\![x](a)", "[![x](a)](b)"):
        line = markdown_table(["token"], [[token]]).splitlines()[-1]
        html = pytest.importorskip("markdown").markdown(line)
        assert "<img" not in html
        assert "<a" not in html
        assert token in html.replace("&#33;", "!")


def test_a_row_of_latex_that_begins_like_an_option_is_text() -> None:
    lines = latex_table(("[a]", "b"), [("[INST]", "*"), ("*", "[x]"), ("a", "[y]")], "ll").splitlines()
    assert lines[2] == r"{[}a] & b \\"
    assert lines[4:7] == [r"{[}INST] & * \\", r"{*} & [x] \\", r"a & [y] \\"]


def test_characters_that_pdflatex_does_not_set_are_shown_by_their_codes() -> None:
    lines = latex_table(("a",), [("naïve — “x” ß",), ("\ufffdx\u0350",), ("図",)], "l").splitlines()
    assert lines[4:7] == [r"naïve — “x” ß \\", r"{[}U+FFFD]x[U+0350] \\", r"{[}U+56F3] \\"]
