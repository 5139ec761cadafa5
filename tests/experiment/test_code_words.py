"""An image tokenizer whose codes are words: built, exported, opened, and image rows that start from its words."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_lm.config.load import load_experiment
from t2i_lm.data.scenes.oracle import SceneOracle
from t2i_lm.data.splits import SCENE_VALIDATIONS
from t2i_lm.experiment.build import ImageTokenizerExperiment, build, build_expanded, trained_image_tokenizer
from t2i_lm.experiment.export import export_image_tokenizer
from t2i_lm.models.expand import MEAN_NOISE
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ, VQTokenizer, to_unit
from t2i_lm.tokenizers.words import WordVQ, phrase_rows, pieces_of
from t2i_lm.training.continuity import started_from
from tests.runs import EXPERIMENTS, PRETRAINED

SMALL = [
    "image_tokenizer.path=null",
    "image_tokenizer.model.block_out_channels=[16,16]",
    "image_tokenizer.model.codes=32",
]


@pytest.mark.parametrize("name", ["aligned", "words"])
def test_a_tokenizer_is_exported_with_what_its_codes_mean(name: str, tiny: list[str], tmp_path: Path) -> None:
    config = load_experiment(EXPERIMENTS / f"image_tokenizer_{name}.yaml", "demo", [*tiny, *SMALL])
    experiment = build(config)
    assert isinstance(experiment, ImageTokenizerExperiment)
    start = started_from(experiment)
    assert start["tokenizers"].keys() == {"text"}
    assert any(file.endswith("model.safetensors") for file in start["backbone"])
    card = export_image_tokenizer(experiment, tmp_path, torch.float32)
    assert experiment.data.validation_splits == SCENE_VALIDATIONS  # no image of either in training
    assert card["pictures"] == 20
    assert card["meaning"]["colour"]["bits"] > 1
    tokenizer, model = open_image_tokenizer(tmp_path, 64), experiment.module.model
    images_BCHW = experiment.data.val_set.__getitems__([(0, 0), (0, 1)])["images_BCHW"]
    with torch.no_grad():
        expected_BN = model.nearest(model.latents(to_unit(images_BCHW))).flatten(1)
    assert torch.equal(tokenizer.encode(images_BCHW), expected_BN)
    start_from_words = load_experiment(
        Path(PRETRAINED), "demo", [*tiny, f"image_tokenizer.path={tmp_path}", "new_rows=words"]
    )
    if name == "aligned":
        assert "words_in_caption" not in card
        assert "words" not in json.loads((tmp_path / "config.json").read_text())
        with pytest.raises(
            ValueError, match=rf"^new_rows=words: the codes of image_tokenizer\.path={tmp_path} have no"
        ):
            build_expanded(start_from_words)
        return
    assert isinstance(model, WordVQ)
    assert 0 <= card["words_in_caption"]["right"] <= 1
    decoder, _, text, image = build_expanded(start_from_words)
    random = build_expanded(replace(start_from_words, new_rows="random"))[0]
    assert isinstance(image, VQTokenizer)
    assert image.words == model.words
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace(f'"{model.words[0]}"', '"other"'))
    assert open_image_tokenizer(tmp_path, 64).sha256 != image.sha256
    rows = phrase_rows(decoder.output.text, [pieces_of(text, word) for word in model.words])
    assert decoder.output.image is not None
    assert random.output.image is not None
    assert torch.allclose(decoder.output.image, rows + MEAN_NOISE * random.output.image, atol=1e-6)


@pytest.mark.parametrize("name", ["aligned", "words"])
def test_a_checkpoint_is_restored_without_the_language_model(name: str, tiny: list[str]) -> None:
    config = load_experiment(EXPERIMENTS / f"image_tokenizer_{name}.yaml", "demo", [*tiny, *SMALL])
    experiment = build(config)
    backbone = replace(config.backbone, path="gone")
    text_tokenizer = replace(config.text_tokenizer, path="gone")
    gone = replace(config, backbone=backbone, text_tokenizer=text_tokenizer)
    restored = trained_image_tokenizer(gone, {}, experiment.module.state_dict()).module.model
    expected = experiment.module.model
    assert isinstance(expected, PatchedVQ)
    found = restored.plain_state()
    assert all(torch.equal(found[key], value) for key, value in expected.plain_state().items())
    if isinstance(expected, WordVQ):
        assert isinstance(restored, WordVQ)
        assert restored.words == expected.words


def test_the_oracle_names_its_codes(tiny: list[str]) -> None:
    oracle = ["image_tokenizer.path=code:t2i_lm.data.scenes.oracle:open_oracle", "allow_code=true", "new_rows=words"]
    decoder, _, text, image = build_expanded(load_experiment(Path(PRETRAINED), "demo", [*tiny, *oracle]))
    assert isinstance(image, SceneOracle)
    words = image.words
    assert words[:2] == ["white", "grey"]
    assert words[8] == "small red circle"
    assert words.count("") == 512 - 392
    assert decoder.tok_embeddings.image is not None
    row_D = decoder.tok_embeddings.text[pieces_of(text, "white")].mean(dim=0)
    assert torch.nn.functional.cosine_similarity(decoder.tok_embeddings.image[0], row_D, dim=0) > 0.99


def test_each_code_has_a_text_of_its_own(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = ["image_tokenizer.path=code:t2i_lm.data.scenes.oracle:open_oracle", "allow_code=true", "new_rows=words"]
    config = load_experiment(Path(PRETRAINED), "demo", [*tiny, *oracle])
    monkeypatch.setattr(SceneOracle, "words", ["white", "grey"])
    with pytest.raises(ValueError, match=r"^new_rows=words: image_tokenizer\.path=code:.* 2 codes; expected 512"):
        build_expanded(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2: expected 1"),
        (["data.captions=all"], "data.captions='all': expected first or random"),
        (["image_tokenizer.words=some"], "image_tokenizer.words='some': expected null or one of captions, frequent"),
        (["image_tokenizer.caption_weight=-1"], "image_tokenizer.caption_weight=-1.0: expected 0 or more"),
    ],
)
def test_wrong_values_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_experiment(EXPERIMENTS / "image_tokenizer_words.yaml", "demo", changes)


@pytest.mark.parametrize("key", ["text_tokenizer.path", "backbone.path"])
def test_the_language_model_is_required(key: str) -> None:
    for name in ("words", "aligned"):
        config = load_experiment(EXPERIMENTS / f"image_tokenizer_{name}.yaml", "demo", [f"{key}=null"])
        with pytest.raises(ValueError, match=rf"^{key}=None: expected .*the language model"):
            config.require_paths()
    load_experiment(EXPERIMENTS / "image_tokenizer.yaml", "demo", [f"{key}=null"]).require_paths()
