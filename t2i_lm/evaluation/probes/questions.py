"""Multiple-choice and cloze questions from JSONL files, answered by log-likelihood.

A task is a file NAME.jsonl or NAME.jsonl.gz; its lines have one of three forms:

- `query`, `choices`, `gold` (ARC, PIQA, COPA): the choice most likely to follow the query;
- `context_options`, `continuation`, `gold` (WinoGrande): the context after which the continuation is likeliest;
- `context`, `continuation` (LAMBADA): whether every id of the continuation is the likeliest one.

Zero-shot. A query that ends with a newline (ARC, PIQA) is followed by `Answer:`; every other continuation follows after
a space. A continuation is scored from the first id in which context and context + continuation differ. Every text
stands at the beginning of a document, behind what the model was trained behind (`tokenizers/documents.py`).

Torch is imported late: commands read the files before they load a model.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.tokenizers.documents import leading_ids

if TYPE_CHECKING:
    from t2i_lm.evaluation.probes.scores import TargetScores
    from t2i_lm.models.backbone import Backbone
    from t2i_lm.tokenizers.base import TextTokenizer

FORMS = {
    "choices": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "cloze": ("context", "continuation"),
}


@dataclass(frozen=True)
class Question:
    """Options, each (context, continuation), and the index of the right one (0 for a cloze)."""

    options: Sequence[tuple[str, str]]
    gold: int


@dataclass(frozen=True)
class Task:
    """Questions of one form."""

    name: str
    form: str
    questions: Sequence[Question]

    @property
    def chance(self) -> float:
        """Accuracy of guessing; 0 for a cloze."""
        if self.form == "cloze":
            return 0.0
        return sum(1 / len(question.options) for question in self.questions) / len(self.questions)

    @property
    def sha256(self) -> str:
        """Hash of the questions, in order."""
        content = [self.form, [asdict(question) for question in self.questions]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_tasks(folder: Path, limit: int, key: str = "forgetting.tasks") -> list[Task]:
    """The tasks of a folder by name, at most `limit` evenly spaced questions of each.

    Args:
        folder: contains files NAME.jsonl or NAME.jsonl.gz.
        limit: questions per task.
        key: the config key or option that names the folder, for errors.

    Raises:
        ValueError: if there is no task, two files have one name, or a line has none of the three forms.
    """
    files: dict[str, Path] = {}
    for file in sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(pattern)):
        name = file.name.removesuffix(".gz").removesuffix(".jsonl")
        if name in files:
            raise ValueError(f"{key}={folder}: {files[name].name} and {file.name} are both the task {name}; remove one")
        files[name] = file
    if not files:
        raise ValueError(f"{key}={folder}: no .jsonl or .jsonl.gz file in it")
    return [_read_task(name, file, limit, key) for name, file in files.items()]


def _read_task(name: str, file: Path, limit: int, key: str) -> Task:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            lines = [line for line in stream if line.strip()]
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ValueError(f"{key}: {file} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"{key}: {file} is empty")
    forms, questions = set(), []
    for number in evenly_spaced_indices(len(lines), limit):
        try:
            form, question = _question(json.loads(lines[number]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{key}: {file} line {number + 1}: {error}") from error
        forms.add(form)
        questions.append(question)
    if len(forms) > 1:
        raise ValueError(f"{key}: {file} mixes the forms {', '.join(sorted(forms))}")
    return Task(name, forms.pop(), questions)


def _question(line: dict[str, Any]) -> tuple[str, Question]:
    form = next((name for name, keys in FORMS.items() if all(key in line for key in keys)), None)
    if form is None:
        raise ValueError(f"expected the keys {' or '.join(', '.join(keys) for keys in FORMS.values())}")
    for key in FORMS[form]:
        _require_text(key, line[key])
    if form == "choices":
        # The space belongs to the answer: tokenizers put it before a word.
        query = line["query"] + ("Answer:" if line["query"].endswith("\n") else "")
        options = [(query, f" {choice}") for choice in line["choices"]]
    elif form == "contexts":
        options = [(context, f" {line['continuation']}") for context in line["context_options"]]
    else:
        options = [(line["context"], f" {line['continuation']}")]
    gold = _index(line.get("gold", 0))
    if not 0 <= gold < len(options):
        raise ValueError(f"gold={gold}: expected 0 to {len(options) - 1}")
    return form, Question(options, gold)


def _index(value: Any) -> int:
    """A whole number, which some data sets write as text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"gold={value!r}: expected a whole number")
    return int(value)


def _require_text(key: str, value: Any) -> None:
    """Checks that a value is a text, or a list of texts where the key's name is a plural; `gold` is a number."""
    if key in ("choices", "context_options"):
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{key}={value!r}: expected a list of texts")
    elif key != "gold" and not isinstance(value, str):
        raise ValueError(f"{key}={value!r}: expected a text")


def encode_option(text: "TextTokenizer", context: str, continuation: str, limit: int) -> tuple[list[int], int]:
    """Ids of an option at the beginning of a document, and the index of the first one that is scored.

    A context that does not fit into `limit` ids is cut on the left.
    """
    before, whole = text.encode(context), text.encode(context + continuation)
    first = 0
    while first < min(len(before), len(whole) - 1) and before[first] == whole[first]:
        first += 1
    ids, over = leading_ids(text, whole, limit)
    return ids, max(1, first + 1 - over)


def answer(decoder: "Backbone", text: "TextTokenizer", task: Task, limit: int) -> dict[str, list[float]]:
    """One value per question, 1 where the answer is right.

    Args:
        decoder: expanded or not.
        text: its tokenizer.
        task: the questions.
        limit: positions of the model.

    Returns:
        `text_rows` and `all_rows`: by likelihood renormalized to the text rows, and over all rows. For choices also
        `..._norm`: by likelihood per character of the choice (lm-evaluation-harness' `acc_norm`). For a cloze also
        `..._nll`: nats of the whole continuation.
    """
    from t2i_lm.evaluation.probes.scores import score_continuations

    encoded = [
        encode_option(text, context, continuation, limit)
        for question in task.questions
        for context, continuation in question.options
    ]
    scored = iter(score_continuations(decoder, encoded))
    values: dict[str, list[float]] = {}
    for question in task.questions:
        options = [next(scored) for _ in question.options]
        for name, value in _judge(task.form, question, options).items():
            values.setdefault(name, []).append(value)
    return values


def _judge(form: str, question: Question, options: "list[TargetScores]") -> dict[str, float]:
    rows = {
        "text_rows": [float(option.text_rows_N.sum()) for option in options],
        "all_rows": [float(option.all_rows_N.sum()) for option in options],
    }
    if form == "cloze":
        right = {"text_rows": options[0].best_of_text_N, "all_rows": options[0].best_of_all_N}
        hits = {name: float(best_N.all()) for name, best_N in right.items()}
        return hits | {f"{name}_nll": nll[0] for name, nll in rows.items()}
    values = {name: float(_smallest(nll) == question.gold) for name, nll in rows.items()}
    if form == "choices":
        lengths = [len(continuation.strip()) for _, continuation in question.options]
        for name, nll in rows.items():
            each = [loss / max(1, length) for loss, length in zip(nll, lengths, strict=True)]
            values[f"{name}_norm"] = float(_smallest(each) == question.gold)
    return values


def _smallest(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
