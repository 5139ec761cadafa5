"""Relearning: a few steps on text from a run's weights and from controls."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from t2i_lm.assets import resolve
from t2i_lm.config.forgetting import NOVELS, RELEARNING
from t2i_lm.data.text import first_documents
from t2i_lm.evaluate import main as evaluate
from t2i_lm.evaluate import parser
from t2i_lm.evaluation.probes.heldout import text_losses
from t2i_lm.evaluation.relearning import (
    BATCH,
    HELDOUT_ROWS,
    POINTS,
    RANDOM,
    RUN,
    RelearningEvaluator,
    RelearningRows,
    beginnings,
    relearn,
)
from t2i_lm.evaluation.relearning import LENGTH as SHIPPED_LENGTH
from t2i_lm.experiment.restore import load_trained
from t2i_lm.models.huggingface_folder import load_huggingface
from t2i_lm.storage.run_folder import Run
from t2i_lm.tokenizers.text import SentencePieceTokenizer
from tests.decoders import tiny_decoder
from tests.evaluation.tiny_tasks import TEXT

LENGTH = 24
# Backbones of transformers, the first with dropout, the second with a bias of the output.
SIZES = {
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "Phi": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"max_position_embeddings": 32},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Text to train on, and held-out text in other words."""
    folder = tmp_path_factory.mktemp("texts")
    train, heldout = folder / "train.txt", folder / "heldout.txt"
    train.write_text("\f".join(["\n\n".join(TEXT * 60)] * 2), encoding="utf-8")
    heldout.write_text("\n\n".join(TEXT[::-1] * 20), encoding="utf-8")
    return train, heldout


@pytest.mark.slow
def test_a_decoder_relearns_text_and_equal_starts_give_equal_curves(pretrained: Run, texts: tuple[Path, Path]) -> None:
    model = load_trained(pretrained.folder)
    path = str(texts[0])
    rows = RelearningRows(
        beginnings(path, "--relearn", None, model.text, BATCH * POINTS[-1], LENGTH),
        beginnings(path, "--relearn-heldout", None, model.text, HELDOUT_ROWS, LENGTH),
    )
    assert rows.train_ST.shape == (BATCH * POINTS[-1], LENGTH)
    assert rows.heldout_RT.shape == (HELDOUT_ROWS, LENGTH)
    with torch.no_grad():
        before = torch.tensor(text_losses(model.decoder, rows.heldout_RT)["text_rows"]).mean()
    steps: list[int] = []
    curve = relearn(model.decoder, rows, steps.append)
    assert sum(steps) == POINTS[-1]
    assert curve["nll"][0] == pytest.approx(float(before))
    assert curve["nll"][-1] < curve["nll"][0] - 1
    assert relearn(load_trained(pretrained.folder).decoder, rows) == curve


@pytest.mark.parametrize("kind", SIZES)
def test_dropout_is_off_and_an_output_bias_is_trained(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, bos_token_id=0, eos_token_id=0, **SIZES[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids_ST = torch.randint(1, 64, (BATCH * POINTS[-1], 9), generator=torch.Generator().manual_seed(1))
    rows = RelearningRows(ids_ST, ids_ST[:8])
    curves = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        decoder = load_huggingface(tmp_path)
        before = None if decoder.output.bias is None else decoder.output.bias.clone()
        curves.append(relearn(decoder, rows))
    assert curves[0] == curves[1]
    assert (before is None) == (kind == "GPT2")
    assert before is None or not torch.equal(before, decoder.output.bias)


def test_the_beginning_of_a_document_is_no_target() -> None:
    decoder = tiny_decoder(vocab_size=64)
    ids_ST = torch.randint(2, 64, (BATCH * POINTS[-1], 9), generator=torch.Generator().manual_seed(1))
    ids_ST[:, 4] = 1
    rows = RelearningRows(ids_ST, ids_ST[:8])
    with torch.no_grad():
        before = torch.tensor(text_losses(decoder, rows.heldout_RT, 1)["text_rows"]).mean()
    assert relearn(decoder, rows, start=1)["nll"][0] == pytest.approx(float(before))
    with torch.no_grad():
        logits_RTV = decoder(rows.heldout_RT)
    assert float(logits_RTV.log_softmax(dim=-1)[:, 3, 1].mean()) < -3, "it always follows there, and was not learned"


@pytest.mark.slow
def test_the_command_measures_the_run_and_its_controls(
    pretrained: Run, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_lm.evaluation.relearning.LENGTH", LENGTH)
    out = tmp_path / "out"
    command = ["--checkpoint", str(pretrained.folder), "--relearn", str(texts[0]), "--out", str(out)]
    assert evaluate([*command, "--relearn-heldout", str(texts[1])]) == 0
    result = json.loads((out / "relearn.json").read_text(encoding="utf-8"))
    assert result["steps"] == list(POINTS)
    assert set(result["nll"]) == {RUN, RANDOM, "language model"}
    for curve in result["nll"].values():
        assert len(curve["nll"]) == len(curve["se"]) == len(POINTS)
    assert result["nll"][RUN]["nll"][0] != result["nll"][RANDOM]["nll"][0]


def test_of_a_dataset_on_a_hub_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ("word " * 100 for _ in itertools.count())
    monkeypatch.setattr("t2i_lm.data.text._hub_documents", lambda name, key: endless)
    monkeypatch.setattr("t2i_lm.data.text.HUB_CHARACTERS", 1200)
    assert [len(document) for document in first_documents("an/endless:train", "forgetting.text")] == [500, 500, 200]


def test_without_a_text_the_shipped_ones_are_used() -> None:
    options = parser().parse_args(["--checkpoint", "runs", "--relearn"])
    evaluator = RelearningEvaluator(options)
    assert (evaluator.text, evaluator.heldout) == (RELEARNING, NOVELS)
    text = SentencePieceTokenizer(resolve("asset:lm_rotary/text_tokenizer.model", "text_tokenizer.path"))
    rows = beginnings(RELEARNING, "--relearn", evaluator.documents, text, BATCH * POINTS[-1], SHIPPED_LENGTH)
    assert rows.shape == (BATCH * POINTS[-1], SHIPPED_LENGTH)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--relearn", "TRAIN"], "--relearn TEXT requires --relearn-heldout"),
        (["--relearn", "TRAIN", "--relearn-heldout", "COPY"], "2 of its documents are also in"),
        (["--relearn", "--relearn-heldout", RELEARNING], "this is the text to train on"),
        (["--relearn", "TRAIN", "--relearn-heldout", "TRAIN"], "this is the text to train on"),
        (["--relearn", "nosuch.txt", "--relearn-heldout", "TRAIN"], "--relearn='nosuch.txt': no such file"),
        (["--relearn-heldout", "TRAIN"], "nothing to measure"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], words: str, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"TRAIN": texts[0], "COPY": texts[0].with_name("copy.txt")}
    named["COPY"].write_text("another one\f" + texts[0].read_text(encoding="utf-8"), encoding="utf-8")
    given = [str(named.get(word, word)) for word in options]
    assert evaluate(["--checkpoint", "runs", *given]) == 2
    assert words in capsys.readouterr().err
