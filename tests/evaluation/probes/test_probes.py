"""Probes on a tiny decoder and a tiny text: every number against a direct computation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_lm.config.forgetting import ForgettingConfig
from t2i_lm.evaluation.probes.completions import complete, spell
from t2i_lm.evaluation.probes.heldout import heldout_text, text_losses
from t2i_lm.evaluation.probes.questions import answer, encode_option, read_tasks
from t2i_lm.evaluation.probes.scores import score_continuations, score_targets
from t2i_lm.evaluation.probes.suite import Probes, summary
from t2i_lm.models.decoder import Decoder
from t2i_lm.tokenizers.text import SentencePieceTokenizer, train_sentencepiece
from tests.evaluation.tiny_tasks import TEXT, write_tasks


def test_text_losses_equal_a_direct_computation(decoder: Decoder, text: SentencePieceTokenizer, book: Path) -> None:
    ids_RT, size, _ = heldout_text(str(book), text, 7, 32)
    assert ids_RT.shape == (7, 33)
    assert size > 0
    losses = text_losses(decoder, ids_RT)
    with torch.no_grad():
        logits_RTV = decoder(ids_RT[:, :-1]).double()
    for name, rows in (("all_rows", logits_RTV), ("text_rows", logits_RTV[..., : text.vocab_size])):
        nll_RT = -rows.log_softmax(dim=-1).gather(-1, ids_RT[:, 1:, None])[..., 0]
        assert losses[name] == pytest.approx(nll_RT.mean(dim=1).tolist(), abs=1e-5)
    assert all(one < both for one, both in zip(losses["text_rows"], losses["all_rows"], strict=True))


def test_without_new_rows_both_losses_are_equal(bare: Decoder, text: SentencePieceTokenizer, book: Path) -> None:
    ids_RT, *_ = heldout_text(str(book), text, 3, 32)
    losses = text_losses(bare, ids_RT)
    assert losses["text_rows"] == losses["all_rows"]


def test_large_new_rows_raise_only_the_loss_over_all_rows(
    decoder: Decoder, text: SentencePieceTokenizer, book: Path
) -> None:
    ids_RT, *_ = heldout_text(str(book), text, 3, 32)
    before = text_losses(decoder, ids_RT)
    with torch.no_grad():
        assert decoder.output.image is not None
        decoder.output.image.mul_(50)
    after = text_losses(decoder, ids_RT)
    assert after["text_rows"] == before["text_rows"]
    assert sum(after["all_rows"]) > sum(before["all_rows"]) + 3


def test_rows_are_evenly_spaced_and_a_short_text_is_refused(text: SentencePieceTokenizer, book: Path) -> None:
    every, *_ = heldout_text(str(book), text, 10**6, 32)
    some, *_ = heldout_text(str(book), text, 4, 32)
    assert torch.equal(some, every[[place * len(every) // 4 for place in range(4)]])
    with pytest.raises(ValueError, match=r"forgetting\.length=9999"):
        heldout_text(str(book), text, 4, 9999)


def test_a_batch_of_continuations_scores_as_single_ones(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(3)
    sequences = [
        (torch.randint(300, (length,), generator=generator).tolist(), first)
        for length, first in ((5, 1), (30, 25), (12, 11), (12, 3))
    ]
    for (ids, first), scores in zip(sequences, score_continuations(decoder, sequences), strict=True):
        target_BT = torch.zeros(1, len(ids), dtype=torch.bool)
        target_BT[0, first:] = True
        alone = score_targets(decoder, torch.tensor([ids]), target_BT)
        assert torch.allclose(scores.all_rows_N, alone.all_rows_N, atol=1e-5)
        assert torch.equal(scores.best_of_text_N, alone.best_of_text_N)


def test_questions_are_answered_by_the_likelier_option(
    decoder: Decoder, text: SentencePieceTokenizer, tmp_path: Path
) -> None:
    tasks = {task.name: task for task in read_tasks(write_tasks(tmp_path / "tasks"), 2)}
    assert {name: (task.form, len(task.questions), task.chance) for name, task in tasks.items()} == {
        "arc": ("choices", 2, 0.5),
        "wino": ("contexts", 2, 0.5),
        "lambada.v2": ("cloze", 1, 0.0),
    }
    for name, task in tasks.items():
        values = answer(decoder, text, task, 64)
        question = task.questions[0]
        direct = []
        for context, continuation in question.options:
            ids, first = encode_option(text, context, continuation, 64)
            assert ids[0] == text.document_end
            assert text.decode(ids[first:]).strip() == continuation.strip()
            with torch.no_grad():
                logits_TV = decoder(torch.tensor([ids]))[0, :-1, : text.vocab_size]
            nll_T = -logits_TV.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            direct.append(float(nll_T[first - 1 :].sum()))
        if name == "lambada.v2":
            assert values["text_rows_nll"] == pytest.approx(direct, abs=1e-4)
            assert values["all_rows_nll"][0] > values["text_rows_nll"][0]
            continue
        assert values["text_rows"] == [float(direct[question.gold] == min(direct))] * 2
        if name == "arc":
            each = [nll / len(option[1].strip()) for nll, option in zip(direct, question.options, strict=True)]
            assert values["text_rows_norm"] == [float(each[question.gold] == min(each))] * 2


def test_a_query_line_is_followed_by_answer(tmp_path: Path) -> None:
    arc = next(task for task in read_tasks(write_tasks(tmp_path / "tasks"), 9) if task.name == "arc")
    assert arc.questions[0].options[0] == ("Question: the red\nAnswer:", " circle")


def test_a_long_context_is_cut_on_the_left(text: SentencePieceTokenizer) -> None:
    context, continuation = " ".join(TEXT), " the red ring"
    whole, at = encode_option(text, context, continuation, 10**6)
    ids, first = encode_option(text, context, continuation, 20)
    assert (ids, ids[first:]) == (whole[-20:], whole[at:])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('\n{"query": "x"}\n', "lambada.v2.jsonl line 2: expected the keys"),
        ("\n{", "line 2"),
        ('\n{"query": 3, "choices": ["a"], "gold": 0}', "lambada.v2.jsonl line 2: query=3: expected a text"),
        ('\n{"query": "x", "choices": "ab", "gold": 0}', "line 2: choices='ab': expected a list of texts"),
        ('\n{"context_options": ["a", 4], "continuation": "b", "gold": 0}', "line 2: context_options="),
        ('\n{"context": null, "continuation": "b"}', "line 2: context=None: expected a text"),
        ('\n{"query": "x", "choices": ["a", "b"], "gold": 0.9}', "line 2: gold=0.9: expected a whole number"),
        ('\n{"query": "x", "choices": ["a", "b"], "gold": 1e999}', "line 2: gold=inf: expected a whole number"),
        ('\n{"query": "x", "choices": ["a", "b"], "gold": true}', "line 2: gold=True: expected a whole number"),
        ("\n" + "[" * 100_000, "line 2: maximum recursion depth"),
    ],
)
def test_a_bad_line_is_refused(extra: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_tasks(write_tasks(tmp_path / "tasks", extra), 9)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    content = bytearray((folder / "wino.jsonl.gz").read_bytes())
    content[21:25] = b"\xff" * 4
    (folder / "wino.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"wino\.jsonl\.gz cannot be read"):
        read_tasks(folder, 9)


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"forgetting\.tasks"):
        read_tasks(tmp_path, 9)


def test_a_task_is_named_after_its_file_and_names_are_unique(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    for name in ("arc.easy.jsonl", "arc.challenge.jsonl"):
        (folder / name).write_text((folder / "arc.jsonl").read_text())
    names = [task.name for task in read_tasks(folder, 9)]
    assert sorted(names) == ["arc", "arc.challenge", "arc.easy", "lambada.v2", "wino"]
    (folder / "wino.jsonl").write_text((folder / "arc.jsonl").read_text())
    with pytest.raises(ValueError, match=r"wino\.jsonl and wino\.jsonl\.gz are both the task wino"):
        read_tasks(folder, 9)


def test_completions_distinguish_leaking_image_rows_from_forgetting(
    decoder: Decoder, text: SentencePieceTokenizer
) -> None:
    quiet = complete(decoder, text, "the red circle", 5, 64)
    with torch.no_grad():
        assert decoder.output.image is not None
        decoder.output.image.copy_(decoder.output.image.sign() * 9)
    loud = complete(decoder, text, "the red circle", 5, 64)
    assert loud["masked"] == quiet["masked"]
    assert loud["unmasked"].startswith("<image ")
    assert spell([text.vocab_size, text.vocab_size + 7 + 3], text, text.vocab_size) == "<doc><image 3>"
    assert complete(decoder, text, " ".join(TEXT), 5, 64)["masked"]  # longer than the model's positions
    with torch.no_grad():  # as training may do, which the measurement must not end
        decoder.output.image.fill_(math.nan)
    broken = complete(decoder, text, "the red circle", 5, 64)
    assert broken["masked"] == quiet["masked"]
    assert broken["unmasked"] == "(none: the logits are not finite)"


def test_summaries_have_standard_errors_and_paired_changes() -> None:
    entry = summary("nll", [1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert entry["nll"] == 2
    assert entry["se"] == pytest.approx(3**-0.5)
    assert (entry["change"], entry["change_se"]) == (1, 0)
    assert summary("accuracy", [1.0, 0.0])["se"] == pytest.approx(0.5)
    assert "change" not in summary("accuracy", [1.0, 0.0], [1.0])
    single = summary("nll", [1.0], [0.5])
    assert (single["change"], single["se"], single["change_se"]) == (0.5, None, None)  # unknown, not 0


def test_later_measurements_are_compared_with_the_first(
    decoder: Decoder, text: SentencePieceTokenizer, book: Path, tmp_path: Path
) -> None:
    settings = ForgettingConfig(
        text=str(book),
        rows=5,
        length=32,
        tasks=str(write_tasks(tmp_path / "tasks")),
        completion_tokens=4,
        prompts=["a ring"],
    )
    probes = Probes(settings, text, tmp_path / "before.json")
    unknown = probes(decoder)  # of a run that did not measure before training
    assert "change" not in unknown["text"]["text_rows"]
    assert "not measured before training" in unknown["note"]
    assert not (tmp_path / "before.json").exists()
    first = Probes(settings, text, tmp_path / "before.json")(decoder, initial=True)
    assert first["text"]["text_rows"]["change"] == 0
    assert first["text"]["text_rows"]["bits_per_byte"] > 0
    assert set(first["completions"]) == {"fact", "translation", "a ring"}
    with torch.no_grad():
        decoder.output.text.add_(torch.randn(decoder.output.text.shape, generator=torch.Generator().manual_seed(4)))
    later = Probes(settings, text, tmp_path / "before.json")(decoder)  # as a resumed run
    entry = later["text"]["text_rows"]
    assert entry["change"] == pytest.approx(entry["nll"] - first["text"]["text_rows"]["nll"])
    assert entry["change"] > 0
    json.dumps(later, allow_nan=False)
    with pytest.raises(ValueError, match=r"forgetting\.length=65: the backbone has 64.*--length 64"):
        Probes(ForgettingConfig(text=str(book), length=65), text)(decoder)
    with pytest.raises(
        ValueError, match=r"forgetting\.completion_tokens=64: the backbone has 64 positions; .* most 63$"
    ):
        Probes(ForgettingConfig(text=str(book), length=64, completion_tokens=64), text)(decoder)
    longest = ForgettingConfig(text=str(book), rows=1, length=64, completion_tokens=63)
    assert Probes(longest, text)(decoder)["text"]["text_rows"]["top1_se"] is None


def test_only_equal_rows_and_questions_of_one_tokenizer_are_compared(
    decoder: Decoder, text: SentencePieceTokenizer, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    settings = ForgettingConfig(text=str(book), rows=5, length=32, tasks=str(tasks), completion_tokens=1)
    baseline = tmp_path / "before.json"
    Probes(settings, text, baseline)(decoder, initial=True)

    def compared(settings: ForgettingConfig, text: SentencePieceTokenizer = text) -> tuple[set[str], str]:
        """Groups that have a change, which must be 0, and the note on the others, printed once."""
        probes = Probes(settings, text, baseline)
        record = probes(decoder)
        assert probes(decoder) == record
        groups = {"text": record["text"], **record["tasks"]}
        changes = {name: entry["all_rows"].get("change") for name, entry in groups.items()}
        assert all(change in (None, 0) for change in changes.values())
        note = record.get("note", "")
        assert capsys.readouterr().err == (f"note: {note}\n" if note else "")
        return {name for name, change in changes.items() if change is not None}, note

    everything = {"text", "arc", "lambada.v2", "wino"}
    assert compared(settings) == (everything, "")
    other = tmp_path / "other.txt"  # as many rows of as many ids
    other.write_text(" ".join(reversed(book.read_text().split(" "))))
    found, note = compared(replace(settings, text=str(other)))
    assert found == everything - {"text"}
    assert note.startswith("no change for text: before.json holds other rows")
    assert compared(replace(settings, length=31))[0] == everything - {"text"}
    lines = (tasks / "arc.jsonl").read_text().splitlines()
    (tasks / "arc.jsonl").write_text("\n".join([lines[0].replace("the red", "the blue"), *lines[1:]]))
    assert compared(settings)[0] == everything - {"arc"}
    (tasks / "arc.jsonl").write_text("\n".join(lines))
    assert compared(replace(settings, questions=2))[0] == everything - {"arc"}
    again = train_sentencepiece(iter(TEXT), text.vocab_size - 4, tmp_path / "again.model")
    assert again.sha256 != text.sha256
    assert compared(settings, again)[0] == set()

    baseline.write_text(json.dumps(json.loads(baseline.read_text())["values"]))  # as earlier versions wrote it
    found, note = compared(settings)
    assert not found
    assert "before.json has no hashes of its rows and questions" in note


def test_the_formats_of_real_tasks_are_read(shared: Path) -> None:
    forms = {task.name: task.form for task in read_tasks(shared / "data" / "lm_eval", 3)}
    assert forms == {
        "arc_easy": "choices",
        "copa": "choices",
        "lambada_openai": "cloze",
        "piqa": "choices",
        "winogrande": "contexts",
    }
