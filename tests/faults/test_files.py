"""Seeded damage of shards, assets, exported and other models' folders, files of runs and of evaluations.

Each damage is found and the file named, in one line, before its bytes are used; or it changes nothing that is read.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import t2i_lm.assets
from t2i_lm.comparison.collect import collect
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.config.key_groups import may_move
from t2i_lm.config.load import flatten, load_run, save_experiment
from t2i_lm.data.datamodules import PairBatches
from t2i_lm.data.shards.format import PART, read_part
from t2i_lm.data.shards.parts import Parts
from t2i_lm.evaluation.base import read_result
from t2i_lm.models.open_lm import load_open_lm, save_open_lm
from t2i_lm.storage.cards import CARD, write_card
from t2i_lm.storage.resumable import ResumableParts
from t2i_lm.storage.run_folder import CONFIG, CONFIG_DIGEST, ENVIRONMENT, REPORT, THINNED, read_run, run_folders
from t2i_lm.storage.sealed import DIGEST, sealed
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer
from t2i_lm.training.resumption import config_entry
from tests.data.shards.pair_shards import LAYOUT, write_pairs
from tests.decoders import tiny_decoder
from tests.faults.damage import COUNT, damage
from tests.plots.synthetic_runs import write_run

# Damages of each file: fewer in the suite than of a run's folder.
FEW = COUNT if COUNT > 20 else 4
# What a reader makes of its files, comparable by `==`.
Reader = Callable[[], Any]


def outcome(read: Reader) -> tuple[Any, str | None]:
    """What a reader makes, and why it refuses; an error of another type ends the test."""
    try:
        return read(), None
    except ValueError as error:
        return None, str(error)


def inject(file: Path, read: Reader, seed: int, count: int = FEW) -> dict[str, int]:
    """Damages a file time after time; the number of damages that were named, and of those that changed nothing."""
    draw, whole, before = random.Random(seed), file.read_bytes(), read()
    counts = {"named": 0, "harmless": 0}
    try:
        for _ in range(count):
            content = damage(whole, draw)
            file.write_bytes(content)
            found, refusal = outcome(read)
            if refusal is None:
                assert found == before, f"silent: {file.name}, {len(content)} bytes"
                counts["harmless"] += 1
            else:
                assert file.name in refusal or f"{file.parent} has parts of a different evaluation" in refusal
                assert "\n" not in refusal
                assert content != whole
                counts["named"] += 1
    finally:
        file.write_bytes(whole)
    assert read() == before
    print(f"{file.name}: {count} damages, {counts['named']} named, {counts['harmless']} harmless")
    return counts


def used(content: dict[str, Any] | None, *names: str) -> list[Any]:
    """Entries that are used. Without its name, a digest is that of an older version's file, and tells nothing."""
    assert content is not None
    return [content.get(name) for name in names]


def state(module: torch.nn.Module) -> list[Any]:
    return [(name, tensor.tolist()) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("name", ["index.json", PART, "state.json", "dataset_info.json", "*.arrow"])
def test_shards(name: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, train=(9, 7), val=(3,))

    def read() -> Any:
        rows = []
        for split, size in (("train", 16), ("val", 3)):
            batches = PairBatches(Parts(tmp_path, split), LAYOUT, "first", 0, 1)
            assert len(batches) == size
            rows.append(batches.__getitems__([(0, row) for row in range(size)])["ids_BT"].tolist())
        return rows, used(read_part(tmp_path / "train" / "part-00001"), "rows", "sha256", "caption_tokens")

    file = next((tmp_path / "train" / "part-00001").glob(name), tmp_path / name)
    counts = inject(file, read, 1)
    assert counts["named"] > 0 or name in ("state.json", "dataset_info.json")  # which are not read


FILES = (
    "image_tokenizer/config.json",
    "image_tokenizer/model.safetensors",
    "lm_rotary/config.json",
    "lm_rotary/text_tokenizer.model",
    "lm_rotary/model.safetensors",
    f"lm_rotary/{CARD}",
    "text/novels.txt.gz",
)


@pytest.mark.parametrize("name", FILES)
def test_shipped_assets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(t2i_lm.assets.__file__).parent / Path(name).parent
    shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.setattr(t2i_lm.assets, "_FOLDER", tmp_path)
    asset = f"asset:{folder.name}/{Path(name).name}" if folder.name == "text" else f"asset:{folder.name}"

    def read() -> Any:
        t2i_lm.assets.resolve(asset, "backbone.path")
        return used(json.loads((tmp_path / folder.name / CARD).read_text()), "steps", "files", "completions")

    counts = inject(tmp_path / name, read, 2)
    assert counts["named"] >= FEW // 2
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"(restore it by `git -C .* checkout -- |`pip install ).*`"):
        t2i_lm.assets.resolve(asset, "backbone.path")


def write_folder(folder: Path) -> None:
    """A decoder with its text tokenizer, and an image tokenizer in a subfolder."""
    save_open_lm(tiny_decoder(seed=5), folder / "lm", torch.bfloat16, {})
    source = Path(t2i_lm.assets.__file__).parent / "lm_rotary" / "text_tokenizer.model"
    shutil.copyfile(source, folder / "lm" / "text_tokenizer.model")
    torch.manual_seed(0)
    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16], codes=8)), folder / "vq", torch.float32)


def readers(folder: Path) -> dict[str, Reader]:
    """What is made of each file of `write_folder`."""
    lm, vq = folder / "lm", folder / "vq"

    def decoder() -> Any:
        loaded = load_open_lm(lm)
        return vars(loaded.config), state(loaded)

    def image() -> Any:
        tokenizer = open_image_tokenizer(vq, 32)
        return tokenizer.vocab_size, tokenizer.grid, tokenizer.sha256, tokenizer.codebook.tolist()

    def text() -> Any:
        tokenizer = open_text_tokenizer(lm / "text_tokenizer.model")
        return tokenizer.sha256, tokenizer.encode("a large red circle"), tokenizer.decode(range(300))

    return {
        "lm/config.json": decoder,
        "lm/model.safetensors": decoder,
        "lm/text_tokenizer.model": text,
        "vq/config.json": image,
        "vq/model.safetensors": image,
    }


@pytest.mark.parametrize("name", ["lm/card.json", *readers(Path())])
def test_exported_folders(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for folder in ("lm", "vq"):
        write_card(tmp_path / folder, {"experiment": "x", "task": "text"})
    read = readers(tmp_path)[name.replace(CARD, "config.json")]
    counts = inject(tmp_path / name, read, 3)
    assert counts["named"] >= FEW // 2
    assert name.endswith(CARD) or counts["harmless"] <= FEW // 2  # damages that change no byte


@pytest.mark.parametrize("name", readers(Path()))
def test_folders_of_other_programs_are_read_or_named(name: str, tmp_path: Path) -> None:
    """Without hashes, other numbers cannot be told from the right ones; what cannot be read is named in one line."""
    write_folder(tmp_path)
    read, kept = readers(tmp_path)[name], (tmp_path / name).read_bytes()
    draw, refused = random.Random(4), 0
    for _ in range(FEW):
        (tmp_path / name).write_bytes(damage(kept, draw))
        _, refusal = outcome(read)
        if refusal is not None:
            assert str(tmp_path / Path(name).parent) in refusal
            assert "\n" not in refusal
            refused += 1
    assert refused


@pytest.mark.parametrize("name", [CONFIG, ENVIRONMENT, REPORT])
def test_files_of_a_run_that_is_drawn_or_sampled(name: str, tmp_path: Path) -> None:
    save_experiment(ExperimentConfig(), tmp_path / CONFIG)
    environment = {"data_hash": "0" * 16, "tokenizers": {"text": "1" * 64}, "train_samples": 100}
    environment[CONFIG_DIGEST] = config_entry(tmp_path)
    (tmp_path / ENVIRONMENT).write_text(json.dumps(sealed(environment), indent=2))
    report = {"val": {"all": {"nll": 1.5}}, "environment_digest": sealed(environment)[DIGEST]}
    (tmp_path / REPORT).write_text(json.dumps(sealed(report), indent=2))

    def read() -> Any:
        run, config = read_run(tmp_path), flatten(load_run(tmp_path))
        entries = used(run.environment, *environment), used(run.report, *report)
        return entries, {key: value for key, value in config.items() if not may_move(key)}

    assert inject(tmp_path / name, read, 5)["named"] >= FEW // 4


def test_results_of_an_evaluation_and_of_a_probe(tmp_path: Path) -> None:
    file = tmp_path / "relearn.json"
    result = {"nll": {"run": {"nll": [9.25, 7.125], "se": [0.25, 0.5]}}, "made_with": {"seed": 0}}
    file.write_text(json.dumps(sealed(result), indent=2))
    assert inject(file, lambda: used(read_result(file), *result), 7)["named"] >= FEW // 4


@pytest.mark.parametrize("name", [CONFIG, ENVIRONMENT, REPORT, THINNED])
def test_collected_results(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs", "t2i_pretrained")
    environment = json.loads((folder / ENVIRONMENT).read_text()) | {CONFIG_DIGEST: config_entry(folder)}
    (folder / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    collect(tmp_path / "runs", (), tmp_path / "out")
    (copy,) = run_folders(tmp_path / "out")

    def read() -> Any:
        run, config = read_run(copy), flatten(load_run(copy))
        entries = used(run.environment, *environment), used(run.report, "val", "steps"), run.metrics
        return entries, {key: value for key, value in config.items() if not may_move(key)}

    assert inject(copy / name, read, 8)["named"] >= FEW // 4


def test_parts_of_an_evaluation_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> ResumableParts:
        return ResumableParts(tmp_path, {"seed": 0}, items=64, size=64)

    def read() -> list[float]:
        parts = job()
        parts.complete(lambda span: {"x": torch.arange(64.0).view(8, 8)}, 0, 1, lambda _: None)
        return list(parts.read(0)["x"].flatten().tolist())

    for file in (job().path(0), tmp_path / "parts.json"):
        read()
        inject(file, read, 6)
    assert "part-00000.safetensors is damaged" in capsys.readouterr().err
