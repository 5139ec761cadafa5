"""Exports of real runs for transformers, through the command line."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch

import t2i_lm
from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import open_text
from t2i_lm.experiment.export import export, language_model_numbers
from t2i_lm.export import main
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.open_lm import decoder_config, save_open_lm
from t2i_lm.storage.run_folder import Run, run_folders
from t2i_lm.tokenizers.documents import TOKENIZER_CONFIG, document_start
from t2i_lm.tokenizers.text import SentencePieceTokenizer, open_text_tokenizer
from t2i_lm.train import main as train
from tests.decoders import tiny_decoder
from tests.runs import PRETRAINED


@pytest.fixture(scope="session")
def run(guided: Run) -> Path:
    return guided.folder


TRANSFORMERS = ["--format", "transformers"]


def test_an_exported_run_computes_the_same_logits(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert main([str(run), "--out", str(out), *TRANSFORMERS, "--dtype", "float32"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(model).__name__ == "StableLmForCausalLM"
    ids_BT = torch.arange(100).view(2, 50) * 17 % (512 + 7 + 32)
    with torch.no_grad():
        logits_BTV, expected_BTV = model(ids_BT).logits, t2i_lm.load(run).model(ids_BT)
    assert (logits_BTV - expected_BTV).abs().max() <= 1e-5 * expected_BTV.abs().max()
    card = json.loads((out / "card.json").read_text())
    ranges = (512, 519, 551)
    assert (card["text_rows"], card["image_offset"], card["rows"]) == ranges
    assert (model.config.text_rows, model.config.image_offset, model.config.vocab_size) == ranges
    for read in (model.config, model.generation_config):
        assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (512, 513, 518)
    assert card["architecture"] == "StableLmForCausalLM"
    assert "AutoTokenizer does not read it" in card["text_tokenizer"]
    assert (out / "text_tokenizer.model").is_file()


@pytest.mark.parametrize("form", ["native", "transformers"])
def test_an_export_overwrites_nothing(form: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main([str(run), "--out", str(tmp_path), "--format", form]) == 2
    assert f"--out {tmp_path}: exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_of_a_decoder_needs_no_data(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_lm.experiment.build.prepare_pairs", lambda *_: pytest.fail("the data was prepared"))
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "new", *(tmp_path / "out").iterdir()]}
    assert len(modes) == 1  # as readable to others as any new file


def test_a_tokenizer_json_is_written_for_auto_tokenizer(tiny: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    words.train_from_iterator(["a red circle on a white background", "a blue star"], trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    values = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": 16, "vocab_size": 320, "qk_norm": True}
    more = {"positional_embedding_type": "llama_rotary", "model_norm": "rms_norm", "weight_tying": True}
    decoder = Decoder(decoder_config(values | more))
    decoder.reset_parameters(torch.Generator().manual_seed(5))
    save_open_lm(decoder, tmp_path / "lm", torch.float32, {})
    overrides = [
        f"backbone.path={tmp_path}/lm",
        f"text_tokenizer.path={tmp_path}/tokenizer.json",
        "text_tokenizer.document_start=<|endoftext|>",
        "trainer.max_steps=3",
    ]
    quick = ["samples.prompts=0", "trainer.max_steps=3", f"run.dir={tmp_path}/runs", "samples.preference_scenes=0"]
    assert train([PRETRAINED, *tiny, *overrides, *quick]) == 0
    (folder,) = run_folders(tmp_path / "runs")
    assert main([str(folder), "--out", str(tmp_path / "out"), *TRANSFORMERS]) == 0
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reread("a red star")["input_ids"] == t2i_lm.load(folder).tokenizers.text.encode("a red star")
    assert document_start(open_text_tokenizer(tmp_path / "out" / "tokenizer.json")) == 0
    assert json.loads((tmp_path / "out" / "card.json").read_text())["architecture"] == "OlmoeForCausalLM"


def test_a_language_model_has_the_same_numbers_in_both_formats(language_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cards = {}
    other = tmp_path / "other.txt"
    other.write_text("A red circle. A blue star on white paper.\n\n" * 200)
    for form in ("native", "transformers"):
        arguments = ["--out", str(tmp_path / form), "--format", form, "--other-text", str(other)]
        assert main([str(language_model), *arguments]) == 0
        cards[form] = json.loads((tmp_path / form / "card.json").read_text())
        assert "model.safetensors" in cards[form].pop("files")
        assert cards[form].pop("digest")
        text = SentencePieceTokenizer(tmp_path / form / "text_tokenizer.model")
        assert text.documents.end_from == TOKENIZER_CONFIG
    assert cards["transformers"].items() >= cards["native"].items()
    assert cards["transformers"]["architecture"] == "StableLmForCausalLM"
    card = cards["native"]
    assert 0.9 < card["other_domain_bytes"] / other.stat().st_size <= 1  # the last, incomplete row is dropped
    assert card["other_domain_bits_per_byte"] != card["held_out_bits_per_byte"]


def test_rows_without_a_piece_are_left_out_of_completions(tiny: list[str]) -> None:
    text = open_text(load_experiment(PRETRAINED, "demo", tiny))
    decoder = tiny_decoder(vocab_size=text.vocab_size + 500, seq_len=64)
    row = {"text_ids": text.encode("a red circle on white")[:4], "bytes": 9}
    numbers = language_model_numbers(decoder, text, datasets.Dataset.from_list([row]).with_format("numpy"))
    assert len(numbers["completions"]) == 10


@pytest.mark.parametrize("form", ["native", "transformers"])
def test_an_export_that_fails_leaves_nothing(
    form: str, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "transformers":
        pytest.importorskip("transformers")

    def fail(*_: object) -> None:
        raise ValueError("no numbers")

    monkeypatch.setattr("t2i_lm.experiment.export.held_out_sums", fail)
    with pytest.raises(ValueError, match="no numbers"):
        export(language_model, tmp_path / "out", "float32", form)
    assert not list(tmp_path.iterdir())


def test_an_earlier_checkpoint_is_exported_with_its_tokens(
    language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = {}
    for name, words in (("newest", ()), ("earlier", ("--step", "10"))):
        assert main([str(language_model), "--out", str(tmp_path / name), *words]) == 0
        cards[name] = json.loads((tmp_path / name / "card.json").read_text())
    assert [(card["steps"], card["tokens"]) for card in cards.values()] == [(30, 30 * 8 * 32), (10, 10 * 8 * 32)]
    assert cards["earlier"]["held_out_nll"] > cards["newest"]["held_out_nll"]
    capsys.readouterr()
    assert main([str(language_model), "--out", str(tmp_path / "out"), "--step", "20"]) == 2
    assert "--step 20: " in (said := capsys.readouterr().err)
    assert "has no checkpoint of this step; of steps: 10, 30 (a run keeps" in said
    assert not (tmp_path / "out").exists()


def test_text_of_another_domain_requires_a_language_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--out", str(tmp_path / "out"), "--other-text", "any.txt"]) == 2
    assert "--other-text any.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_position_free_runs_are_refused_before_anything_is_built(
    tiny: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    changed = tmp_path / "run"
    changed.mkdir()
    config = (run / "config.yaml").read_text()
    assert "positional: null" in config
    (changed / "config.yaml").write_text(config.replace("positional: null", "positional: head_rotary"))
    assert main([str(changed), "--out", str(tmp_path / "out"), *TRANSFORMERS]) == 2
    assert "positional_embedding_type='head_rotary' is position-free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["native", "transformers"])
@pytest.mark.parametrize("key", ["modality_experts", "lora.image_only"])
def test_weights_that_depend_on_the_modality_are_refused(
    form: str, key: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "run"
    changed.mkdir()
    leaf = key.rpartition(".")[2]
    config = (run / "config.yaml").read_text().replace(f"{leaf}: false", f"{leaf}: true").replace("rank: 0", "rank: 2")
    (changed / "config.yaml").write_text(config)
    assert main([str(changed), "--out", str(tmp_path / "out"), "--format", form]) == 2
    assert f"--format {form}: {changed} has {key}=true" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_without_an_export_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    config = (run / "config.yaml").read_text()
    assert main([str(run), "--out", str(tmp_path / "full"), *TRANSFORMERS]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    for task, form in (("align", "native"), ("image_tokenizer", "transformers")):
        folder = tmp_path / task
        folder.mkdir()
        changes = {"task: text_to_image": f"task: {task}", "caption_dropout: 0.2": "caption_dropout: 0.0"}
        if task == "image_tokenizer":
            changes["init: pretrained"] = "init: random"
        own = config
        for old, new in changes.items():
            assert old in own
            own = own.replace(old, new)
        (folder / "config.yaml").write_text(own)
        assert main([str(folder), "--out", str(tmp_path / "out"), "--format", form]) == 2
        assert f"is a run of task={task}; expected text_to_image" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([str(run), "--out", str(tmp_path / "out"), *TRANSFORMERS]) == 2
    assert "pip install 't2i_lm[hf]'" in capsys.readouterr().err
