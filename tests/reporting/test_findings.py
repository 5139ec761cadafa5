"""Sentences that are made from runs' numbers."""

import json
from pathlib import Path

from t2i_lm.reporting.findings import alignment_sentences, forgetting_sentences
from t2i_lm.storage.run_folder import METRICS, REPORT, read_run
from tests.plots.synthetic_runs import write_run


def test_an_alignment_tells_its_chance_its_clamped_temperature_and_the_norms_of_its_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "align", config={"align": {"logit_scale_max": 50.0}})
    report = json.loads((folder / REPORT).read_text())
    (folder / REPORT).write_text(json.dumps(report | {"row_norms": {"image": 4.2, "text": 1.5}}))
    text = " ".join(alignment_sentences({"align": read_run(folder)}))
    assert "3.4657" in text, "ln 32, the loss of a guess among a batch"
    assert "at its bound, 50, from step 40 on" in text  # 14 at the start, and 1 more each step
    assert "image rows 4.20, of text rows 1.50" in text


def test_a_run_that_did_not_measure_before_training_tells_no_change(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_pretrained", forgotten=5.0)
    assert "change +5.0000" in " ".join(forgetting_sentences({"pretrained": [read_run(folder)]}))
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    kept = [line for line in lines if line["step"] or "forgetting" not in line]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert forgetting_sentences({"pretrained": [read_run(folder)]}) == []
