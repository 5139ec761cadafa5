"""Tasks of lm-evaluation-harness: requests against direct computations, and the command on a local task."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_lm.evaluate import main
from t2i_lm.evaluation.forgetting import BASELINE, forgetting_report
from t2i_lm.evaluation.lm_eval import _line
from t2i_lm.evaluation.probes.heldout import text_losses
from t2i_lm.evaluation.probes.questions import encode_option
from t2i_lm.evaluation.probes.scores import score_continuations
from t2i_lm.experiment.restore import load_initial, load_trained
from t2i_lm.models.decoder import Decoder
from t2i_lm.storage.run_folder import Run
from t2i_lm.tokenizers.text import MAX_CHARACTERS, SentencePieceTokenizer
from tests.evaluation.tiny_tasks import TEXT, WORDS

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 't2i_lm[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from t2i_lm.evaluation.probes.harness import HarnessModel  # noqa: E402

TASK = """
task: tiny_rings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
metadata:
  version: 3
"""
CHOICES = 'doc_to_choice: "{{options}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"the {WORDS[number]} circle is", "options": ["above", "a blue", "stars and"], "answer": number % 3}
    for number in range(9)
]


def requests(kind: str, rows: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, row, number, ("tiny", number, 1)) for number, row in enumerate(rows)]


@pytest.mark.parametrize("all_rows", [False, True])
def test_likelihoods_equal_those_of_the_question_probe(
    decoder: Decoder, text: SentencePieceTokenizer, all_rows: bool
) -> None:
    long = " ".join(TEXT)
    pairs = [("the red circle", " is above"), ("", "a blue square"), ("the green ring ", "lies on"), (long, " a grey")]
    found = HarnessModel(decoder, text, all_rows).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    pairs[2] = ("the green ring", " lies on")
    options = [encode_option(text, context, continuation, 65) for context, continuation in pairs]
    assert len(options[3][0]) == 65  # 64 positions, and a last target
    for (nats, best), scores in zip(found, score_continuations(decoder, options), strict=True):
        nll_N = scores.all_rows_N if all_rows else scores.text_rows_N
        assert nats == pytest.approx(-float(nll_N.sum()), abs=1e-5)
        assert best == bool((scores.best_of_all_N if all_rows else scores.best_of_text_N).all())


def test_rolling_likelihood_equals_the_text_loss(decoder: Decoder, text: SentencePieceTokenizer) -> None:
    document = TEXT[0]
    ids = [text.document_end, *text.encode(document)]
    assert 20 < len(ids) <= 65
    mean = text_losses(decoder, torch.tensor([ids]))["text_rows"][0]
    harness = HarnessModel(decoder, text)
    asked = requests("loglikelihood_rolling", [(document,), ("",)])
    assert harness.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx([-mean * (len(ids) - 1), 0.0])


def test_each_id_of_a_long_document_is_scored_once(decoder: Decoder, text: SentencePieceTokenizer) -> None:
    document = " ".join(TEXT)
    ids = text.encode(document)
    assert len(ids) > 3 * 64
    asked = requests("loglikelihood_rolling", [(document,)])
    nats = HarnessModel(decoder, text).loglikelihood_rolling(asked, disable_tqdm=True)[0]
    whole, total = [text.document_end, *ids], 0.0
    for start in range(0, len(ids), 64):  # targets start + 1 ... start + 64, the last window as full as the others
        end = min(start + 64, len(ids))
        window = whole[max(0, end - 64) : end + 1]
        scores = score_continuations(decoder, [(window, len(window) - (end - start))])
        total += float(scores[0].text_rows_N.sum())
    assert nats == pytest.approx(-total, abs=1e-3)


def test_texts_beyond_the_tokenizers_limit_lose_nothing(decoder: Decoder, text: SentencePieceTokenizer) -> None:
    context = "the red circle " * (MAX_CHARACTERS // 10)
    harness = HarnessModel(decoder, text)
    asked = [(context + "the green", " ring"), (context[-3000:] + "the green", " ring")]
    far, near = harness.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert far == pytest.approx(near)
    assert len(harness._encode(context)) >= len(context) // 15 * 3


@pytest.mark.parametrize("all_rows", [False, True])
def test_answers_are_greedy_and_independent_of_the_batch(
    decoder: Decoder, text: SentencePieceTokenizer, all_rows: bool
) -> None:
    from t2i_lm.evaluation.probes.completions import complete

    prompts = ["the red circle", "a", "the green ring lies on a grey field of stars", " ".join(TEXT)]
    asked = [(prompt, {"until": ["\n\n"], "max_gen_toks": 6}) for prompt in prompts]
    harness = HarnessModel(decoder, text, all_rows)
    found = harness.generate_until(requests("generate_until", asked), disable_tqdm=True)
    key = "unmasked" if all_rows else "masked"
    assert found == [complete(decoder, text, prompt, 6, 64)[key] for prompt in prompts]
    assert any(found)
    whole = max(found, key=len)
    stop = whole[len(whole) // 2 :]
    stopped = [(prompts[found.index(whole)], {"until": ["", stop], "max_gen_toks": 6})]
    assert harness.generate_until(requests("generate_until", stopped), disable_tqdm=True) == [whole.split(stop)[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "task tiny: max_gen_toks=64, but the backbone has 64 positions"),
        ({"do_sample": True, "temperature": 0.7}, "task tiny: do_sample=true, but answers are greedy here"),
    ],
)
def test_unsupported_requests_are_refused(
    settings: dict[str, Any], message: str, decoder: Decoder, text: SentencePieceTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessModel(decoder, text).generate_until(requests("generate_until", [("a", settings)]), disable_tqdm=True)


def write_task(folder: Path, kind: str = "multiple_choice", rest: str = CHOICES) -> Path:
    folder.mkdir()
    (folder / "rings.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    task = TASK.format(data=folder / "rings.jsonl", cache=folder / "cache", kind=kind, rest=rest)
    (folder / "rings.yaml").write_text(task)
    return folder


def test_the_model_before_training_is_built_again(probed: Run) -> None:
    assert (probed.folder / BASELINE).is_file()
    initial = load_initial(probed.folder)
    report = forgetting_report(initial, initial.config.forgetting, probed.folder)
    assert report == probed.records("forgetting")[0]["forgetting"]


def test_a_local_task_is_measured_before_and_after(
    probed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_task(tmp_path / "tasks")
    out = tmp_path / "out"
    command = ["--checkpoint", str(probed.folder), "--lm-eval", "tiny_rings", "--lm-eval-tasks", str(tasks)]
    assert main([*command, "--dry-run"]) == 0
    said = "all questions each of tiny_rings, over the text rows only, by the model before and after training"
    assert said in capsys.readouterr().out
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads((out / "lm_eval.json").read_text())
    assert (found["harness"], found["rows"], found["limit"], found["before"]) == (
        lm_eval.__version__,
        "text",
        None,
        True,
    )
    task = found["tasks"]["tiny_rings"]
    assert (task["version"], task["shots"], task["questions"], task["questions_in_all"]) == (3, 0, 9, 9)

    right: dict[str, list[float]] = {}
    for name, model in (("value", load_trained(probed.folder)), ("before", load_initial(probed.folder))):
        for question in QUESTIONS:
            options = [
                encode_option(model.text, str(question["question"]), f" {end}", 64) for end in question["options"]
            ]
            nll = [float(score.text_rows_N.sum()) for score in score_continuations(model.module.decoder, options)]
            right.setdefault(name, []).append(float(nll.index(min(nll)) == question["answer"]))
    accuracy = task["metrics"]["acc"]
    for name, values in right.items():
        assert accuracy[name] == pytest.approx(sum(values) / 9)
        error = torch.tensor(values).std() / 3
        assert accuracy["se" if name == "value" else "before_se"] == pytest.approx(float(error), abs=1e-6)
    change = torch.tensor(right["value"]) - torch.tensor(right["before"])
    assert accuracy["change"] == pytest.approx(float(change.mean()), abs=1e-6)
    assert accuracy["change_se"] == pytest.approx(float(change.std() / 3), abs=1e-6)
    assert set(task["metrics"]) == {"acc", "acc_norm"}
    assert str(tmp_path) not in (out / "lm_eval.json").read_text()

    more = ["--lm-eval-limit", "4", "--lm-eval-all-rows", "--no-before", "--out", str(tmp_path / "few")]
    assert main([*command, *more]) == 0
    found = json.loads((tmp_path / "few" / "lm_eval.json").read_text())
    assert (found["limit"], found["rows"], found["before"]) == (4, "all", False)
    assert found["tasks"]["tiny_rings"]["questions"] == 4
    assert set(found["tasks"]["tiny_rings"]["metrics"]["acc"]) == {"value", "se"}


def test_a_generating_task_is_scored_and_a_random_start_has_no_before(scratch: Run, tmp_path: Path) -> None:
    rest = (
        'doc_to_target: "{{options[answer]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
    )
    tasks = write_task(tmp_path / "tasks", "generate_until", rest)
    command = ["--checkpoint", str(scratch.folder), "--lm-eval", "tiny_*", "--lm-eval-tasks", str(tasks)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert found["before"] is False
    assert found["tasks"]["tiny_rings"]["metrics"]["exact_match"]["value"] == 0


def test_an_unknown_standard_error_is_left_out() -> None:
    values = {"value": 0.5, "se": None, "before": 0.25, "change": 0.25, "change_se": None}
    assert _line(values) == "0.5000 (before 0.2500, change +0.2500)"
    assert _line(values | {"se": 0.1, "change_se": 0.2}) == "0.5000 +- 0.1000 (before 0.2500, change +0.2500 +- 0.2000)"


def test_wrong_options_are_refused_before_loading_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write_task(tmp_path / "tasks")

    def refused(*words: str) -> str:
        assert main(["--checkpoint", str(tmp_path / "no_run"), *words]) == 2
        return capsys.readouterr().err

    close = refused("--lm-eval", "hellaswagg")
    assert "--lm-eval hellaswagg: no task of lm_eval" in close
    assert "hellaswag" in close.split("close ones:")[1]
    assert "tiny_rings" in refused("--lm-eval", "tiny_ring", "--lm-eval-tasks", str(tasks)).split("close ones:")[1]
    assert "--lm-eval ',': expected names of tasks" in refused("--lm-eval", ",")
    assert "--lm-eval-tasks absent: no such folder" in refused("--lm-eval", "piqa", "--lm-eval-tasks", "absent")
    assert "--lm-eval-limit 0: expected at least 1" in refused("--lm-eval", "piqa", "--lm-eval-limit", "0")
    assert "--lm-eval-limit requires --lm-eval" in refused("--forgetting", ".", "--lm-eval-limit", "3")
