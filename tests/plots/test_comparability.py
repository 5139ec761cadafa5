"""Every figure and table names a key in which its runs differ against the experiment, and --strict refuses it."""

from pathlib import Path

import pytest

from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.plots.catalogue import FIGURES, Request, _table1
from tests.plots.synthetic_runs import EXPERIMENTS, write_relearning, write_run

# Figure: an arm that it compares with others.
ARMS = {
    **dict.fromkeys(("3", "4", "forgetting", "relearning"), "t2i_scratch"),
    "5": "uncond_tune_ffn",
    "6": "align_shuffled",
    "inits": "t2i_shuffled",
    "remedies": "remedy_l2_sp",
}
# Figures 1 and 2 compare no runs, that of the gap takes those of one setting only (tests/comparison/test_grid.py).
OTHERS = {"1", "2", "gap"}
FOREIGN = {"optim.weight_decay": 0.7}


def runs_with(foreign: str | None, root: Path) -> Path:
    """Runs of every figure, those of one arm with a foreign key."""
    for name in EXPERIMENTS:
        config = (FOREIGN if name == foreign else {}) | ({"optim.l2_sp": 1.0} if name == "remedy_l2_sp" else {})
        folder = write_run(root, name, config=config, forgotten=2.0)
        if name in ("t2i_pretrained", "t2i_scratch"):
            write_relearning(folder, 9.0)
    return root


def test_every_figure_that_compares_runs_is_here() -> None:
    assert ARMS.keys() == FIGURES.keys() - OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_a_foreign_key_is_named_and_refused(name: str, tmp_path: Path) -> None:
    alike = FIGURES[name](Request(runs_with(None, tmp_path / "alike"), strict=True))
    assert "NOT CONTROLLED" not in alike.caption
    other = runs_with(ARMS[name], tmp_path / "other")
    caption = FIGURES[name](Request(other)).caption
    assert "NOT CONTROLLED" in caption
    assert "optim.weight_decay: 0.1 and 0.7" in caption
    with pytest.raises(IncomparableError, match=r"optim\.weight_decay"):
        FIGURES[name](Request(other, strict=True))


def test_a_foreign_key_of_table_1_is_named_and_refused(tmp_path: Path) -> None:
    root = runs_with("t2i_scratch", tmp_path)
    assert "optim.weight_decay" in _table1(Request(root)).caption
    with pytest.raises(IncomparableError, match=r"optim\.weight_decay"):
        _table1(Request(root, strict=True))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    for name in ("t2i_pretrained", "t2i_scratch"):
        write_run(tmp_path, name, steps=200, finished=name == "t2i_scratch")
    assert "UNFINISHED" in FIGURES["3"](Request(tmp_path)).caption
    with pytest.raises(IncomparableError, match=r"unfinished: .*t2i_pretrained"):
        FIGURES["3"](Request(tmp_path, strict=True))
