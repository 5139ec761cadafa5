"""Floors, best temperature, top-1 accuracy and the second text, against independent computations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.forgetting import curves
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.forgetting import NONFICTION, NOVELS, RELEARNING, ForgettingConfig
from t2i_lm.data.text import read_documents
from t2i_lm.evaluation.forgetting import require_texts
from t2i_lm.evaluation.probes.floors import unigram_nll
from t2i_lm.evaluation.probes.heldout import heldout_text, text_scores
from t2i_lm.evaluation.probes.suite import Probes
from t2i_lm.models.decoder import Decoder
from t2i_lm.tokenizers.text import SentencePieceTokenizer
from tests.decoders import tiny_decoder
from tests.evaluation.tiny_tasks import TEXT


def test_the_unigram_floor_is_that_of_all_other_rows() -> None:
    rows = np.random.default_rng(3).integers(0, 9, (6, 13))
    nats, count = 0.0, 0
    for number in (1, 4):
        others = np.concatenate([rows[other, 1:] for other in range(6) if other != number])
        for token in rows[number, 1:]:
            nats -= math.log(((others == token).sum() + 0.5) / (len(others) + 0.5 * 10))
            count += 1
    assert unigram_nll(torch.from_numpy(rows), [1, 4], 10) == pytest.approx(nats / count)


def test_the_beginning_of_a_document_is_in_no_unigram_floor() -> None:
    rows = torch.tensor([[7, 1, 2, 1, 2], [7, 1, 2, 2, 1]])
    marked = torch.tensor([[7, 1, 2, 9, 1, 2], [7, 9, 1, 2, 2, 1]])
    assert unigram_nll(marked, [0, 1], 10, start=9) == pytest.approx(unigram_nll(rows, [0, 1], 10))


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_the_best_temperature_is_that_of_a_grid(
    scale: float, decoder: Decoder, text: SentencePieceTokenizer, book: Path
) -> None:
    with torch.no_grad():
        decoder.output.text.mul_(scale)
    ids_RT = heldout_text(str(book), text, 3, 24).ids_RT
    scores = text_scores(decoder, ids_RT)
    with torch.no_grad():
        logits_RTV = decoder(ids_RT[:, :-1]).double()
    for name, size in (("all_rows", logits_RTV.shape[-1]), ("text_rows", text.vocab_size)):
        grid = {
            temperature: float(
                -(logits_RTV[..., :size] / temperature).log_softmax(dim=-1).gather(-1, ids_RT[:, 1:, None]).mean()
            )
            for temperature in np.geomspace(1e-3, 1e3, 600)
        }
        found = float(np.mean(scores[name].best_nll_R))
        assert found <= min(grid.values()) + 1e-5
        assert found <= np.mean(scores[name].nll_R) + 1e-6
        if 1e-2 < scores[name].temperature < 1e2:  # else the minimum is flat: as good as a uniform guess
            assert scores[name].temperature == pytest.approx(min(grid, key=lambda key: grid[key]), rel=0.03)
        direct = -(logits_RTV[..., :size] / scores[name].temperature).log_softmax(-1).gather(-1, ids_RT[:, 1:, None])
        assert scores[name].best_nll_R == pytest.approx(direct[..., 0].mean(dim=1).tolist(), abs=1e-4)


def predictable(decoder: Decoder, ids_RT: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Half of the targets are the likeliest text pieces after the true beginning."""
    with torch.no_grad():
        ids_RT[:, 1::2] = decoder(ids_RT[:, :-1])[:, ::2, :vocab_size].argmax(dim=-1)
    return ids_RT


def test_a_temperature_that_is_fitted_on_some_targets_is_evaluated_on_all(
    decoder: Decoder, text: SentencePieceTokenizer, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_RT = predictable(decoder, heldout_text(str(book), text, 5, 32).ids_RT, text.vocab_size)
    whole = text_scores(decoder, ids_RT)["text_rows"]
    monkeypatch.setattr("t2i_lm.evaluation.probes.temperature.FITTED", 40)
    some = text_scores(decoder, ids_RT)["text_rows"]
    assert len(some.best_nll_R) == 5
    assert some.temperature != whole.temperature
    assert np.mean(some.best_nll_R) >= np.mean(whole.best_nll_R) - 1e-6


def test_top_1_accuracy_is_counted_by_row(decoder: Decoder, text: SentencePieceTokenizer, book: Path) -> None:
    ids_RT = predictable(decoder, heldout_text(str(book), text, 3, 32).ids_RT, text.vocab_size)
    with torch.no_grad():
        logits_RTV = decoder(ids_RT[:, :-1])
    scores = text_scores(decoder, ids_RT)
    for name, size in (("all_rows", logits_RTV.shape[-1]), ("text_rows", text.vocab_size)):
        right_RT = logits_RTV[..., :size].argmax(dim=-1) == ids_RT[:, 1:]
        assert scores[name].top1_R == pytest.approx(right_RT.double().mean(dim=1).tolist())
    assert sum(scores["text_rows"].top1_R) > 0


def test_a_record_holds_floors_of_both_texts(
    decoder: Decoder,
    text: SentencePieceTokenizer,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "verse.txt"
    other.write_text("\n\n".join(TEXT[::-1]))
    settings = ForgettingConfig(text=str(book), second_text=str(other), rows=9, length=32, completion_tokens=1)
    made: list[int] = []

    def untrained() -> Decoder:
        made.append(1)
        return tiny_decoder(seed=8, seq_len=64, vocab_size=text.vocab_size)

    probes = Probes(settings, text, tmp_path / "before.json", untrained=untrained)
    record = probes(decoder, initial=True)
    assert probes(decoder) == record
    assert len(made) == 1  # measured once
    assert capsys.readouterr().err == ""
    random = tiny_decoder(seed=8, seq_len=64, vocab_size=text.vocab_size).eval()
    for key, path in settings.texts.items():
        entry = record[key]
        ids_RT, size, unigram = heldout_text(path, text, 9, 32)
        with torch.no_grad():
            nll_RT1 = -random(ids_RT[:, :-1]).log_softmax(dim=-1).gather(-1, ids_RT[:, 1:, None])
        floors = {name: floor["nll"] for name, floor in entry["floors"].items()}
        assert floors == {
            "uniform": pytest.approx(math.log(text.vocab_size)),
            "unigram": unigram,
            "random_weights": pytest.approx(float(nll_RT1.mean()), abs=1e-5),
        }
        assert entry["floors"]["uniform"]["bits_per_byte"] == pytest.approx(
            math.log2(text.vocab_size) * ids_RT[:, 1:].numel() / size
        )
        assert entry["text_rows"]["change"] == 0
        assert entry["text_rows"]["best_temperature"]["nll"] <= entry["text_rows"]["nll"]
    assert (record["text"]["name"], record["second_text"]["name"]) == ("book", "verse")
    assert record["text"]["text_rows"]["nll"] != record["second_text"]["text_rows"]["nll"]
    logged = curves(record, "forgetting")
    assert "forgetting/second_text/text_rows/best_temperature/nll" in logged
    assert not [name for name in logged if "floors" in name or name.endswith("_se")]


def test_a_text_of_fewer_rows_is_said_and_one_of_none_refused(
    decoder: Decoder, text: SentencePieceTokenizer, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ForgettingConfig(text=str(book), rows=10**4, length=32, completion_tokens=1)
    record = Probes(settings, text)(decoder)
    assert f"forgetting.text={book}: {record['text']['rows']} rows of 32 ids, fewer than" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("a red circle")
    settings = ForgettingConfig(text=str(book), second_text=str(short), rows=4, length=32)
    with pytest.raises(ValueError, match=rf"^forgetting\.second_text={short}: less text than one row"):
        Probes(settings, text)(decoder)


def test_shipped_texts_share_no_document_and_fit_the_demo() -> None:
    found = {name: list(read_documents(name, "forgetting.text")) for name in (NOVELS, NONFICTION, RELEARNING)}
    documents = [document for texts in found.values() for document in texts]
    assert len({*documents}) == len(documents) == 7
    paragraphs = [part.strip() for document in documents for part in document.split("\n\n") if len(part) > 200]
    assert len({*paragraphs}) == len(paragraphs)


def test_texts_of_a_run_are_checked_before_it_starts(tmp_path: Path) -> None:
    one, other, empty = (tmp_path / f"{name}.txt" for name in ("one", "other", "empty"))
    one.write_text("a red circle\fa blue ring")
    other.write_text(one.read_text())
    empty.write_text("\n\f ")

    def check(text: str | Path, second: str | Path | None = None) -> None:
        require_texts(ExperimentConfig(forgetting=ForgettingConfig(10, str(text), second and str(second))))

    check(NOVELS, NONFICTION)
    check("org/books", "org/other")  # of a hub: read when they are measured
    for second, words in (
        (other, "the same text as"),
        (one, "the same text as"),
        (empty, "there is no text in it"),
        (tmp_path / "no.txt", "no such file"),
        ("asset:text/novel", "expected one of asset:text/nonfiction.txt.gz, asset:text/novels.txt.gz"),
    ):
        with pytest.raises(ValueError, match=rf"^forgetting\.second_text\W.*{words}"):
            check(one, second)
    require_texts(ExperimentConfig(forgetting=ForgettingConfig(None, str(tmp_path / "no.txt"))))  # measures nothing
