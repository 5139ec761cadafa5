"""CLIP score: equal to torchmetrics', on one rank, on two, after a kill, and beside FID."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.multimodal.clip_score import CLIPScore

from t2i_lm.data.coco import choose_prompts, read_coco
from t2i_lm.evaluate import main
from t2i_lm.evaluation.clip_score import Clip
from t2i_lm.evaluation.protocol_card import PROMPT_SEED
from t2i_lm.storage.run_folder import Run
from tests.callbacks.toy_run import finish, server
from tests.data.coco_folder import write_coco
from tests.evaluation.clip_folder import POSITIONS, write_clip
from tests.runs import coco_arguments, coco_result
from tests.test_evaluate import in_process, on_two_ranks

CAPTIONS = ["a red circle", "two blue squares on a green ground", "a", "a ring? (yellow) 3 of them"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def command(
    pretrained: Run, inception_weights: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    root = tmp_path_factory.mktemp("clip_run")
    coco = write_coco(root / "coco", 12)
    words = coco_arguments(pretrained.folder, coco, inception_weights)
    return [*words, "--no-floor", "--cache", str(root / "cache"), "--clip", str(folder)]


@pytest.fixture(scope="module")
def unbroken(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip_unbroken") / "out"
    assert main([*command, "--pictures", "--out", str(out)]) == 0
    return out


def theirs(folder: Path) -> CLIPScore:
    """torchmetrics' metric; it expects the embedding only; since 5.0 transformers returns more."""
    from transformers import CLIPModel, CLIPProcessor

    class Embedding(CLIPModel):
        def get_text_features(self, *arguments: Any) -> Tensor:
            found = super().get_text_features(*arguments)
            return found if isinstance(found, Tensor) else found.pooler_output

        def get_image_features(self, *arguments: Any) -> Tensor:
            found = super().get_image_features(*arguments)
            return found if isinstance(found, Tensor) else found.pooler_output

    model, processor = (
        Embedding.from_pretrained(folder).eval().requires_grad_(False),
        CLIPProcessor.from_pretrained(folder),
    )
    return CLIPScore(lambda: (model, processor))


def test_each_score_equals_torchmetrics(folder: Path) -> None:
    images_BCHW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 256, 256), dtype=np.uint8))
    metric = theirs(folder)
    clip = Clip(str(folder))
    scores = []
    for image, caption in zip(images_BCHW, CAPTIONS, strict=True):
        scores.append(float(clip(image[None], [caption])))
        assert float(metric(image, caption)) == pytest.approx(max(0.0, scores[-1]), abs=1e-5)
    assert min(scores) > 1
    # In one batch float32 sums otherwise: 1e-5 of the score, which goes to 100.
    assert float(metric.compute()) == pytest.approx(float(clip(images_BCHW, CAPTIONS).mean()), rel=1e-5)


def test_a_long_caption_keeps_its_end_token(folder: Path) -> None:
    images_BCHW = torch.zeros(2, 3, 256, 256, dtype=torch.uint8)
    longest = "1" * (POSITIONS - 2)  # a piece each
    cut, whole = Clip(str(folder))(images_BCHW, [longest + "23", longest]).tolist()
    assert cut == pytest.approx(whole, abs=1e-5)


def test_the_score_of_an_evaluation_equals_torchmetrics_on_its_images(
    unbroken: Path, command: list[str], folder: Path
) -> None:
    prompts = choose_prompts(read_coco(Path(command[command.index("--coco") + 1])), 10, PROMPT_SEED)
    found = coco_result(unbroken)["clip"]
    metric = theirs(folder)
    scores = []
    for number, prompt in enumerate(prompts):
        image = np.asarray(Image.open(unbroken / "pictures" / f"{number:05d}-{prompt.caption_id}.png"))
        scores.append(float(metric(torch.from_numpy(image.copy()).permute(2, 0, 1), prompt.text)))
    assert min(scores) > 0  # so that nothing is cut at zero
    assert found["score"] == pytest.approx(float(metric.compute()), rel=1e-5)
    assert found["se"] == pytest.approx(float(torch.tensor(scores).std() / 10**0.5), abs=1e-4)
    assert (found["n"], found["clip_model"]) == (10, "tiny")
    assert len(found["clip_sha256"]) == len(found["clip_settings_sha256"]) == 64


def test_two_ranks_and_an_interrupted_evaluation_give_the_same_score(
    unbroken: Path, command: list[str], tmp_path: Path
) -> None:
    on_two_ranks([*command, "--out", str(tmp_path / "two")])
    assert coco_result(tmp_path / "two")["clip"] == coco_result(unbroken)["clip"]

    arguments = [*command, "--out", str(tmp_path / "killed")]
    process = server.Process(target=in_process, args=(arguments, {}, 6))  # four parts drawn, two scored
    process.start()
    assert finish(process) == [-signal.SIGKILL]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert {path.parent.name for path in before} == {"drawn", "drawn-clip"}
    assert main(arguments) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert coco_result(tmp_path / "killed")["clip"] == coco_result(unbroken)["clip"]


def test_a_finished_evaluation_is_scored_without_sampling_again(
    unbroken: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = command.index("--clip")
    plain, out = [*command[:at], *command[at + 2 :]], ["--out", str(tmp_path / "out")]
    assert main([*plain, *out]) == 0
    assert "clip" not in coco_result(tmp_path / "out")
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "drawn").iterdir()}
    assert main([*command, *out]) == 0
    assert drawn == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "drawn").iterdir()}
    assert coco_result(tmp_path / "out")["clip"] == coco_result(unbroken)["clip"]
    assert coco_result(tmp_path / "out")["fid"] == coco_result(unbroken)["fid"]
    capsys.readouterr()
    assert main([*plain, *out]) == 0  # what was scored stays
    assert coco_result(tmp_path / "out")["clip"] == coco_result(unbroken)["clip"]
    assert "coco.json keeps its CLIP score" in capsys.readouterr().err

    other = write_clip(tmp_path / "other", seed=1)
    assert main([*plain, *out, "--clip", str(other)]) == 2
    assert "parts of a different evaluation (clip_model='tiny', now 'other'; clip_sha256=" in capsys.readouterr().err


def test_reconstructions_are_scored_beside_their_floor(command: list[str], tmp_path: Path) -> None:
    with_floor = [word for word in command if word != "--no-floor"]
    assert main([*with_floor, "--prompts", "3", "--out", str(tmp_path / "out")]) == 0
    result = coco_result(tmp_path / "out")
    assert result["floor"]["clip"]["n"] == 3
    assert result["floor"]["clip"]["score"] != result["clip"]["score"]
    at = command.index("--clip")
    assert main([*command[:at], *command[at + 2 :], "--prompts", "3", "--out", str(tmp_path / "out")]) == 0
    assert coco_result(tmp_path / "out")["floor"] == result["floor"]  # with neither --clip nor a floor


def test_wrong_models_are_refused_before_loading(
    command: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main([*command, "--out", str(tmp_path / "out"), *words]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "--clip absent: expected a folder of a clip model" in refused("--clip", "absent")
    assert "expected a whole repository" in refused("--clip", "hf://org/clip/model.safetensors")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "has model_type='bert', expected 'clip'" in refused("--clip", str(tmp_path / "bert"))
    (tmp_path / "bert" / "config.json").write_text((folder / "config.json").read_text())
    assert "expected model.safetensors or pytorch_model.bin" in refused("--clip", str(tmp_path / "bert"))
    assert main(["--checkpoint", "runs", "--clip", str(folder), "--forgetting", str(tmp_path)]) == 2
    assert "--clip requires --coco" in capsys.readouterr().err


def test_a_model_without_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    short = tmp_path / "short"
    short.mkdir()
    for file in folder.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    state = load_file(short / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensor text_projection\.weight"):
        Clip(str(short))


def test_a_dry_run_names_the_model(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--dry-run"]) == 0
    assert f"CLIP score of the same images and captions, by {command[-1]}" in capsys.readouterr().out
