"""The figure of relearning: both arms and the controls, measured in one way."""

import json
from pathlib import Path

import pytest

from t2i_lm.comparison.relearning import relearning_of
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.plots.pairing import RunPair
from t2i_lm.plots.relearning import relearning_curves
from t2i_lm.storage.run_folder import THINNED, Run, read_run
from t2i_lm.storage.sealed import sealed
from tests.plots.synthetic_runs import RELEARNING_STEPS, write_relearning, write_run


def test_arms_and_controls_are_drawn_and_tabled(tmp_path: Path) -> None:
    for name, start in (("t2i_pretrained", 12.3), ("t2i_scratch", 13.9)):
        write_relearning(write_run(tmp_path, name), start, checkpoint_sha256=name)
    rendered = FIGURES["relearning"](Request(tmp_path))
    rows = {line.split("  ")[0]: line.split()[-3:] for line in rendered.table.splitlines()[1:]}
    assert rows["pretrained"] == ["12.300", "10.300", "9.300"]
    assert rows["scratch"] == ["13.900", "11.900", "10.900"]
    assert rows["random weights"] == ["8.800", "7.600", "7.000"]
    (axes,) = rendered.figure.axes
    assert axes.get_xlabel() == "training steps on text"
    lines = {str(line.get_gid()): line for line in axes.get_lines()}
    assert list(lines["Held-out text/pretrained/val"].get_ydata()) == [12.3, 10.3, 9.3]
    assert list(lines["Held-out text/random_weights/val"].get_xdata()) == RELEARNING_STEPS


def test_an_arm_that_was_not_measured_names_the_command(tmp_path: Path) -> None:
    write_relearning(write_run(tmp_path, "t2i_pretrained"), 12.3)
    folder = write_run(tmp_path, "t2i_scratch")
    with pytest.raises(ValueError, match=r"t2i_scratch.* was not measured: python -m t2i_lm.evaluate .*--relearn"):
        FIGURES["relearning"](Request(tmp_path))
    (folder / THINNED).touch()
    with pytest.raises(ValueError, match=r"was not measured: collected results lack it; measure the run itself"):
        relearning_of(Run(folder, {}, {}, [], None))


def test_a_result_of_another_checkpoint_is_not_that_of_the_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name) for name in ("t2i_pretrained", "t2i_scratch")]
    for run in runs:
        write_relearning(run, 9.0, checkpoint_sha256="1" * 64, rows=[12, 32], length=128)
    assert "a mean over 32 held-out rows of 128 ids." in FIGURES["relearning"](Request(tmp_path)).caption
    (runs[1] / "checkpoints").mkdir()
    for step, digest in ((200, "1"), (300, "2")):
        (runs[1] / "checkpoints" / f"step-00000{step}.ckpt.sha256").write_text(digest * 64)
    with pytest.raises(ValueError, match=r"t2i_scratch.* was measured of other checkpoints than its last one: python"):
        FIGURES["relearning"](Request(tmp_path))


def test_the_newest_result_is_drawn_whatever_the_times_of_its_file(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name) for name in ("t2i_pretrained", "t2i_scratch")]
    for run in runs:
        write_relearning(run, 9.0)
    folder = runs[0] / "evaluations"
    result = json.loads((folder / "last" / "relearn.json").read_text())
    for name, start, finished in (("b", 5.0, "2026-03-02T10:00:00"), ("a", 6.0, "2026-03-02T09:00:00")):
        (folder / name).mkdir()
        result["nll"]["run"]["nll"][0] = start
        (folder / name / "relearn.json").write_text(json.dumps(sealed({**result, "finished": finished})))
    assert relearning_curves(RunPair(*map(read_run, runs)))[1]["pretrained"][0] == 5.0
    text = (folder / "b" / "relearn.json").read_text()
    (folder / "b" / "relearn.json").write_text(text.replace("5.0", "4.0", 1))
    with pytest.raises(
        ValueError, match=r"b/relearn\.json is damaged: its digest differs from its entries; restore it"
    ):
        FIGURES["relearning"](Request(tmp_path))


def test_arms_measured_in_different_ways_are_refused(tmp_path: Path) -> None:
    write_relearning(write_run(tmp_path, "t2i_pretrained"), 12.3)
    write_relearning(write_run(tmp_path, "t2i_scratch"), 13.9, text="b.txt")
    with pytest.raises(ValueError, match=r"in different ways: text: 'a.txt' and 'b.txt'"):
        FIGURES["relearning"](Request(tmp_path))


@pytest.mark.parametrize("measured", [0, 1])
def test_a_setting_that_one_arm_alone_records_is_a_difference(measured: int, tmp_path: Path) -> None:
    for number, name in enumerate(("t2i_pretrained", "t2i_scratch")):
        write_relearning(write_run(tmp_path, name), 12.3, **({"length": 512} if number == measured else {}))
    with pytest.raises(ValueError, match=r"in different ways: length: (512 and None|None and 512)"):
        FIGURES["relearning"](Request(tmp_path))
