"""Training and export of language models and image tokenizers, through the command line."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from t2i_lm.config.load import load_experiment
from t2i_lm.data.datamodules import evenly_spaced
from t2i_lm.experiment.build import TextExperiment, build
from t2i_lm.export import main as export
from t2i_lm.models.open_lm import load_open_lm
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.tokenizers.vq import VQTokenizer
from t2i_lm.train import main

ROOT = Path(__file__).parents[2]
VQ = str(ROOT / "experiments" / "image_tokenizer.yaml")
LM = str(ROOT / "experiments" / "text_lm.yaml")
SMALL_VQ = [
    "image_tokenizer.model.block_out_channels=[16,16]",
    "image_tokenizer.model.codes=32",
    "image_tokenizer.restart_every=4",
    "data.train_size=64",
    "data.val_size=40",
    "data.batch_size=8",
    "optim.warmup_steps=2",
    "trainer.max_steps=30",
    "trainer.precision=32-true",
    "trainer.val_check_interval=15",
    "trainer.checkpoint_interval=7",
    "log.interval=5",
    "log.logger=none",
]


@pytest.mark.slow
def test_an_image_tokenizer_learns_is_exported_and_its_codes_are_in_use(tmp_path: Path) -> None:
    assert main([VQ, *SMALL_VQ, f"run.dir={tmp_path}"]) == 0
    run = read_run(run_folders(tmp_path)[-1])
    first, last = run.validations()[0]["val"], run.validations()[-1]["val"]
    assert last["psnr"] > first["psnr"] + 0.5
    assert last["codes_used"] > 0.5
    assert export([str(run.folder), "--out", str(tmp_path / "vq"), "--dtype", "float32"]) == 0
    card = json.loads((tmp_path / "vq" / "card.json").read_text())
    assert card["psnr_db"] == pytest.approx(last["psnr"], rel=1e-5)
    assert card["codes_used"] == pytest.approx(last["codes_used"])
    assert 0 <= card["checker_right"]["background"] <= 1
    assert VQTokenizer.from_folder(tmp_path / "vq", 64).vocab_size == 32


@pytest.mark.slow
def test_a_tokenizer_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Across the k-means and the re-seeding of codes, whose inputs are in the checkpoint."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main([VQ, *SMALL_VQ, f"run.dir={whole}"]) == 0
    assert main([VQ, *SMALL_VQ, f"run.dir={half}"]) == 0
    folder = run_folders(half)[-1]
    newest = sorted((folder / "checkpoints").glob("*.ckpt"))[-1]
    newest.unlink()  # as if it had been killed after step 28
    (folder / "report.json").unlink()
    assert main([VQ, "--resume", str(folder), f"run.dir={half}"]) == 0
    curves = [
        [{key: value for key, value in record.items() if key != "time"} for record in read_run(path).metrics]
        for path in (run_folders(whole)[-1], folder)
    ]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_tokenizer_run_that_takes_more_steps_stays_quantized(tmp_path: Path) -> None:
    half = ["trainer.max_steps=12", "image_tokenizer.warmup_fraction=0.4"]
    assert main([VQ, *SMALL_VQ, f"run.dir={tmp_path}", *half]) == 0
    folder = run_folders(tmp_path)[-1]
    for file in (*folder.glob("checkpoints/step-00000012.*"), folder / "report.json"):
        file.unlink()  # as if it had been killed after step 7, of which the fifth was the first quantized one
    assert main([VQ, "--resume", str(folder), "trainer.max_steps=40", "--allow-mismatch", "trainer.max_steps"]) == 0
    commits = {record["step"]: record["train"]["commit"] for record in read_run(folder).metrics if "train" in record}
    assert set(commits) == set(range(5, 45, 5))
    assert min(commits.values()) > 0


def test_validation_during_training_takes_windows_from_all_over_the_held_out_text() -> None:
    rows = datasets.Dataset.from_dict({"row": list(range(100))})
    assert evenly_spaced(rows, 4)["row"][:] == [0, 25, 50, 75]
    assert len(evenly_spaced(rows, None)) == len(evenly_spaced(rows, 1000)) == 100


@pytest.mark.slow
def test_a_shipped_text_tokenizer_serves_another_language_model(language_model: Path, tmp_path: Path) -> None:
    config = load_experiment(
        language_model / "config.yaml",
        None,
        ["text_tokenizer.path=asset:lm_rotary/text_tokenizer.model", "data.val_size=3", "backbone.config=demo_7m"],
    )
    experiment = build(config)
    experiment.data.setup("fit")
    assert len(experiment.data.val_set) == 3
    assert isinstance(experiment, TextExperiment)
    assert experiment.text.vocab_size == 4096


@pytest.mark.slow
def test_a_language_model_learns_and_is_exported(language_model: Path, tmp_path: Path) -> None:
    run = read_run(language_model)
    assert run.validations()[-1]["val"]["text"]["nll"] < run.validations()[0]["val"]["text"]["nll"] - 1
    out = tmp_path / "exported"
    assert export([str(language_model), "--out", str(out)]) == 0
    card = json.loads((out / "card.json").read_text())
    assert 0 < card["held_out_bits_per_byte"] < 8
    assert len(card["completions"]) == 10
    assert load_open_lm(out).output.text.dtype == torch.float32
    assert (out / "text_tokenizer.model").is_file()
