"""Sentences that are made from runs' numbers."""

import json
from pathlib import Path

import pytest

from t2i_lm.reporting.findings import alignment_sentences, endpoint_label, forgetting_sentences
from t2i_lm.reporting.setup import _last_counts, positions_of
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


def change_forgetting(folder: Path, **entries: object) -> None:
    """Changes what every measurement of the first text says."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for line in lines:
        if "forgetting" in line:
            line["forgetting"]["text"] |= entries
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_of_other_held_out_texts_have_no_mean_and_seeds_without_one_are_counted(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "t2i_pretrained", f"2026011{seed}-093000", config={"seed": seed}, forgotten=forgotten)
        for seed, forgotten in enumerate((5.0, 6.0, None))
    ]
    said = " ".join(forgetting_sentences({"pretrained": [*map(read_run, folders)]}))
    assert "change +5.5000" in said
    assert "(n = 2 of 3 seeds)" in said
    change_forgetting(folders[1], targets=9999)
    (refused,) = forgetting_sentences({"pretrained": [*map(read_run, folders)]})
    assert "the runs were not measured alike: targets 512 (1 runs), 9999 (1 runs)" in refused


def test_runs_of_an_image_tokenizer_have_no_token_counts_and_no_losses_to_be_finite(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_pretrained")
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for line in lines:
        if "val" in line:
            line["val"] = {"psnr": 26.1, "nll": 0.2}
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert (_last_counts(run), run.nonfinite) == ({}, 0)


def test_positions_are_those_of_the_config_or_of_files_at_hand() -> None:
    assert positions_of({"backbone.path": "asset:lm_rotary"}) == "rotary"
    assert positions_of({"backbone.path": "asset:lm_rotary", "backbone.positional": "head_rotary"}) == "head_rotary"
    assert positions_of({"backbone.path": "/nowhere"}) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("val/iid.image.nll", "held-out image loss (new images of trained color-shape pairs)"),
        ("relearning.step_60.nll", "loss of plain text after 60 steps of relearning"),
        ("report.iid.preference.kind.preferred", "report.iid.preference.kind.preferred"),
    ],
)
def test_an_endpoint_is_named_in_words_where_it_has_some(name: str, words: str) -> None:
    assert endpoint_label(name) == words
