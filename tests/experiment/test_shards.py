"""What is counted of the data is said before training, and recorded."""

from dataclasses import replace

import pytest

from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import ImageExperiment, build
from t2i_lm.experiment.shards import data_counts, describe_data, require_whole_captions
from t2i_lm.storage.run_folder import Run
from tests.runs import PRETRAINED


@pytest.fixture(scope="module")
def experiment(tiny: list[str]) -> ImageExperiment:
    """One whose captions leave it 8 ids, with some counts of its index changed."""
    built = build(load_experiment(PRETRAINED, "demo", [*tiny, f"data.length={64 + 6 + 8}"]))
    assert isinstance(built, ImageExperiment)
    built.index["splits"]["train"] |= {
        "caption_tokens": {"0": 1, "8": 5, "9": 3, "40": 1},
        "rejects": {"no caption": 2},
    }
    for split in ("val/iid", "val/compositional"):
        built.index["splits"][split]["caption_tokens"] = {"8": 20}
    built.index["notes"] = {"train": ["a tar has 7 unused bytes"], "val/iid": ["a tar has 7 unused bytes"]}
    built.index["recurring"]["val/compositional"]["images"] = 3
    return built


def test_counts_and_their_lines(experiment: ImageExperiment) -> None:
    assert data_counts(experiment) == {
        "text_budget": 8,
        "train": {"rows": 60, "rejects": {"no caption": 2}, "captions": 10, "empty": 1, "truncated": 4},
        "val/iid": {"rows": 20, "rejects": {}, "captions": 20, "empty": 0, "truncated": 0},
        "val/compositional": {"rows": 20, "rejects": {}, "captions": 20, "empty": 0, "truncated": 0},
        "notes": {"train": ["a tar has 7 unused bytes"], "val/iid": ["a tar has 7 unused bytes"]},
        "recurring_images": {"val/iid": 0, "val/compositional": 3},
    }
    rows, note, captions = describe_data(experiment)
    assert rows.startswith("data: 60 train, 20 val/iid and 20 val/compositional rows, data hash ")
    recurring = "validation images that recur in training: 0 of val/iid and 3 of val/compositional"
    assert rows.endswith(f"; left out: 2 train (no caption); {recurring}")
    assert note == "data: a tar has 7 unused bytes"
    assert captions == (
        "captions: 4 of 10 train (40.0%), 0 of 20 val/iid (0.0%) and 0 of 20 val/compositional (0.0%) are cut to the 8 "
        "text ids that fit; 1 are empty"
    )


@pytest.mark.parametrize(("share", "refused"), [(1.0, False), (0.4, False), (0.39, True), (0.0, True)])
def test_too_many_cut_captions_are_refused(experiment: ImageExperiment, share: float, refused: bool) -> None:
    config = experiment.config
    strict = replace(experiment, config=replace(config, data=replace(config.data, max_truncated_share=share)))
    if refused:
        with pytest.raises(
            ValueError, match=rf"data\.max_truncated_share={share}: 4 of 10 train captions .* data\.length"
        ):
            require_whole_captions(strict)
    else:
        require_whole_captions(strict)


def test_a_run_records_them(pretrained: Run) -> None:
    assert pretrained.report is not None
    counts = pretrained.report["data"]
    assert counts == pretrained.environment["data"]
    assert counts["train"]["truncated"] / counts["train"]["captions"] == pretrained.report["truncated_captions"]
    assert counts["recurring_images"].keys() == {"val/iid", "val/compositional"}
