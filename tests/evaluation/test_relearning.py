"""Relearning: a few steps on text from a run's weights and from controls."""

import json
from pathlib import Path

import pytest
import torch

from t2i_lm.assets import resolve
from t2i_lm.config.forgetting import NOVELS, RELEARNING
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
from t2i_lm.storage.run_folder import Run
from t2i_lm.tokenizers.text import SentencePieceTokenizer
from tests.evaluation.tiny_tasks import TEXT

LENGTH = 24


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


def test_without_a_text_the_shipped_ones_are_used() -> None:
    options = parser().parse_args(["--checkpoint", "runs", "--relearn"])
    evaluator = RelearningEvaluator(options)
    assert (evaluator.text, evaluator.heldout) == (RELEARNING, NOVELS)
    text = SentencePieceTokenizer(resolve("asset:lm_rotary/text_tokenizer.model"))
    rows = beginnings(RELEARNING, "--relearn", evaluator.documents, text, BATCH * POINTS[-1], SHIPPED_LENGTH)
    assert rows.shape == (BATCH * POINTS[-1], SHIPPED_LENGTH)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--relearn", "TRAIN"], "--relearn TEXT requires --relearn-heldout"),
        (["--relearn", "TRAIN", "--relearn-heldout", "COPY"], "1 of its documents are also in"),
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
