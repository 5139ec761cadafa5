import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from t2i_lm.config.load import load_experiment
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.evaluation import scenes as scene_report
from t2i_lm.evaluation.report import print_summary
from t2i_lm.evaluation.scenes import prompt_accuracy
from t2i_lm.experiment.build import build
from t2i_lm.generation.grid import MARGIN, PIXELS, captioned_grid
from t2i_lm.runtime.tables import markdown_table
from t2i_lm.tokenizers.layout import Layout
from tests.decoders import image_model

ROOT = Path(__file__).parents[2]


def test_accuracy_is_one_for_matching_scenes_and_low_for_others() -> None:
    source = SceneSource(60, "compositional", 0)
    pairs = [source[index] for index in range(60)]
    meanings = [pair.meaning or {} for pair in pairs]
    images = [np.asarray(pair.image) for pair in pairs]
    perfect = prompt_accuracy(images, meanings)
    assert {name: entry["right"] for name, entry in perfect.items()} == dict.fromkeys(perfect, 1.0)
    assert {entry["se"] for entry in perfect.values()} == {0.0}
    assert perfect["relation"]["of"] == sum(meaning["family"] == "pair" for meaning in meanings)
    assert perfect["background"]["of"] < 60  # some captions leave it out
    shifted = prompt_accuracy(images[1:] + images[:1], meanings)
    assert shifted["all"]["right"] < 0.1
    assert shifted["background"]["right"] < 0.4
    for entry in shifted.values():
        assert entry["se"] == pytest.approx(math.sqrt(entry["right"] * (1 - entry["right"]) / entry["of"]))


def test_the_summary_shows_standard_errors_of_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, limit = {"right": 0.25, "se": 0.0541, "of": 64}, {"right": 0.981, "se": 0.004, "of": 1000}
    report = {
        **{"experiment": "x", "scale": "demo", "seed": 0, "steps": 1, "wall_s": 1, "val": None},
        "samples": {"accuracy": {"kind": right}},
        "ceiling": {"accuracy": {"kind": limit}},
        "preference": {"size": {"preferred": 0.83, "se": 0.0168, "of": 500}},
    }
    print_summary(report, tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "right in samples (at most): kind 25% +- 5% (98%)" in printed
    assert "true caption preferred (chance 0.5): size 83% +- 2%" in printed


def test_the_summary_shows_every_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"nll": 1.25, "ppl": 3.49, "count": 64}
    preferred = {"size": {"preferred": 0.83, "se": 0.0168, "of": 500}}
    report = {
        **{"experiment": "x", "scale": "demo", "seed": 0, "steps": 1, "wall_s": 1, "image_floor_nll": 0.0625},
        **{"val/iid": {"image": entry}, "val/compositional": {"image": entry | {"nll": 1.5}}},
        **{"iid": {"preference": preferred}, "compositional": {"preference": preferred}},
    }
    print_summary(report, tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "iid image │ 1.2500",
        "compositional image │ 1.5000",
        "floor of the image loss (entropy of the generator): 0.0625 nats/token",
        "true caption preferred (chance 0.5), compositional: size 83% +- 2%",
    ):
        assert words in printed


def test_the_likelihood_of_an_image_is_that_of_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of several lengths, in batches by length."""
    monkeypatch.setattr(scene_report, "SCORE_BATCH", 3)
    model, draw = image_model(), np.random.default_rng(0)
    layout, decoder = model.layout, model.module.decoder
    assert isinstance(layout, Layout)
    captions = ["a red circle", "a star", "two green squares on a black background", "a blue cross and a star", "a"]
    image_ids_BN = draw.integers(512, size=(len(captions), layout.image_tokens))
    found = scene_report.image_nll(model, captions, image_ids_BN)
    for caption, ids_N, nll in zip(captions, image_ids_BN, found, strict=True):
        prompt = layout.prompt(np.array(model.text.encode(caption)))
        ids_1T = torch.from_numpy(np.concatenate([prompt, ids_N + layout.vocab.image_offset]))[None]
        with torch.no_grad():
            nll_T = -decoder(ids_1T[:, :-1]).log_softmax(-1)[0].gather(1, ids_1T[0, 1:, None])[:, 0]
        assert float(nll) == pytest.approx(float(nll_T[len(prompt) - 1 :].double().sum()), rel=1e-6)


def test_the_accuracy_ceiling_is_that_of_reconstructions_and_cached(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*tiny, "image_tokenizer.path=asset:image_tokenizer", f"data.cache_dir={tmp_path}"]
    experiment = build(load_experiment(ROOT / "experiments" / "t2i_scratch.yaml", "demo", given))
    monkeypatch.setattr(scene_report, "CEILING_SCENES", 60)
    found = scene_report.accuracy_ceiling(experiment, "iid")
    assert found["scenes"] == 60
    right = {name: entry["right"] for name, entry in found["accuracy"].items()}
    assert right["any_colour"] == 1
    assert 0.9 < right["kind"] <= 1
    assert right["all"] <= min(right["colour"], right["kind"])
    file = next((tmp_path / "ceilings").iterdir())
    written = file.stat().st_mtime_ns
    assert scene_report.accuracy_ceiling(experiment, "iid") == found
    assert file.stat().st_mtime_ns == written

    content = json.loads(file.read_text())
    content["identity"]["code"][0] = "0" * 64  # by another version of the scenes
    content["accuracy"] = {}
    file.write_text(json.dumps(content))
    assert scene_report.accuracy_ceiling(experiment, "iid") == found
    assert file.stat().st_mtime_ns != written


def test_a_table_escapes_the_text_of_its_cells() -> None:
    table = markdown_table(["id", "token"], [[1, "|"], [2, "\n"], [3, " a\\<b>\nc "]])
    assert table.split("\n") == ["| id | token |", "|---|---|", "| 1 | \\| |", "| 2 |  |", "| 3 | a\\\\&lt;b><br>c |"]


def test_a_grid_shows_every_image_with_its_caption() -> None:
    black = np.zeros((64, 64, 3), dtype=np.uint8)
    grid = np.asarray(captioned_grid([black] * 5, ["a caption"] * 5))
    assert grid.shape[1] == 4 * (PIXELS + 2 * MARGIN)
    blacks = (grid == 0).all(axis=-1).sum()
    assert blacks >= 5 * PIXELS**2
    with pytest.raises(ValueError, match="5 images for 4 captions"):
        captioned_grid([black] * 5, ["a"] * 4)


@pytest.mark.parametrize("name", ["[/x]", "[v2]", "[red]a[/red]", ":smile:", "[link=a]b"])
def test_names_are_no_markup(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / name
    run.mkdir(parents=True)
    (run / "report.json").write_text("{}")
    report = {"experiment": name, "scale": "demo", "seed": 0, "steps": 1, "wall_s": 1, "val": {name: 1.0}}
    print_summary(report, run)
    printed = capsys.readouterr().out
    assert "nats" not in printed
    assert f"{run}/report.json" in printed
    assert printed.count(name) == 3
