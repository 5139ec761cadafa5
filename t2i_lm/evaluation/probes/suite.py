"""All probes of a language model, each with its standard error and its change since before training.

The numbers of a record are means over rows of text or questions, `se` their standard error; where the model was
measured before training, `change` is the mean of the paired differences and `change_se` its own, much smaller error.
The error of a single row or question is None.
Differences are taken between equal rows and equal questions only: the file from before training holds their hashes.
A text's floors are what a model reaches without knowing the language: a uniform guess among the text rows, the text's
own frequencies of pieces (cross-validated), and the same architecture with random weights.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_lm.config.forgetting import ForgettingConfig
from t2i_lm.evaluation.probes.completions import PROMPTS, complete
from t2i_lm.evaluation.probes.floors import uniform_nll
from t2i_lm.evaluation.probes.heldout import (
    HeldoutText,
    RowScores,
    heldout_text,
    target_count,
    text_losses,
    text_scores,
)
from t2i_lm.evaluation.probes.questions import Task, answer, read_tasks
from t2i_lm.models.backbone import Backbone
from t2i_lm.storage.sealed import read_sealed, sealed
from t2i_lm.storage.writing import write_atomic
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import document_key, document_start

# One value per row or question, by group (`text`, `second_text`, `tasks/NAME`) and by name in it.
Values = dict[str, dict[str, list[float]]]
# Parameters above which random weights are not measured: they would need as much memory again as the model.
MOST_RANDOM = 2_500_000_000


class Probes:
    """All probes of an experiment, called on rank 0 only; text and questions are read at the first call."""

    def __init__(
        self,
        settings: ForgettingConfig,
        text: TextTokenizer,
        baseline: Path | None = None,
        documents: Mapping[str, Iterable[str]] | None = None,
        tasks: list[Task] | None = None,
        untrained: Callable[[], Backbone] | None = None,
    ) -> None:
        """Names the work.

        Args:
            settings: what to measure.
            text: the model's tokenizer.
            baseline: file of the values before training: written before the first step where it is missing.
            documents: those of `settings.texts`, by key, where they have been read.
            tasks: those of `settings.tasks`, where they have been read.
            untrained: the model's architecture with random weights, for the floors; None leaves these out.
        """
        self.settings, self.text, self.baseline = settings, text, baseline
        self._documents, self._tasks, self._untrained = documents or {}, tasks, untrained
        self._texts: dict[str, HeldoutText] | None = None
        self._random: dict[str, dict[str, float]] | None = None
        self._noted = False

    def __call__(self, decoder: Backbone, initial: bool = False) -> dict[str, Any]:
        """Measures a decoder in evaluation mode.

        Args:
            decoder: the model.
            initial: whether it has not been trained yet.

        Returns:
            As JSON can hold it: `text` and `second_text`, each with `all_rows`, `text_rows` and `floors`, `tasks` by
            name, `completions`, and in `note` which groups have no `change` though the model was measured before
            training, and why.

        Raises:
            ValueError: if text or questions cannot be read, or rows or completions do not fit the model's positions.
        """
        settings, limit = self.settings, decoder.config.seq_len
        if settings.length > limit:
            raise ValueError(
                f"forgetting.length={settings.length}: the backbone has {limit} positions; "
                f"give at most {limit} (evaluate: --length {limit})"
            )
        if settings.completion_tokens >= limit:  # at least one id is continued
            raise ValueError(
                f"forgetting.completion_tokens={settings.completion_tokens}: the backbone has {limit} positions; "
                f"give at most {limit - 1}"
            )
        if self._texts is None:
            self._texts = self._read_texts()
        start = document_start(self.text)
        scores = {key: text_scores(decoder, one.ids_RT, start) for key, one in self._texts.items()}
        values: Values = {key: {name: rows.nll_R for name, rows in columns.items()} for key, columns in scores.items()}
        if self._tasks is None:
            self._tasks = [] if settings.tasks is None else read_tasks(Path(settings.tasks), settings.questions)
        for task in self._tasks:
            values[f"tasks/{task.name}"] = answer(decoder, self.text, task, limit)
        before, note = self._before(values, initial)
        record: dict[str, Any] = {"text": {}, "tasks": {}}
        for group, columns in values.items():
            entry = {
                name: summary("nll" if group in scores or name.endswith("_nll") else "accuracy", column, earlier)
                for name, column in columns.items()
                for earlier in [before.get(group, {}).get(name)]
            }
            if group in scores:
                record[group] = self._text_entry(group, entry, scores[group], decoder)
            else:
                record["tasks"][group.removeprefix("tasks/")] = entry
        for task in self._tasks:
            record["tasks"][task.name] |= {"chance": task.chance, "questions": len(task.questions)}
        record["completions"] = {
            name: complete(decoder, self.text, prompt, settings.completion_tokens, limit)
            for name, prompt in {**PROMPTS, **{prompt: prompt for prompt in settings.prompts}}.items()
        }
        if note is not None:
            record["note"] = note
            if not self._noted:
                print(f"note: {note}", file=sys.stderr)
            self._noted = True
        return record

    def _read_texts(self) -> dict[str, HeldoutText]:
        """The rows of each text; says which have fewer than `settings.rows`."""
        settings, texts = self.settings, dict[str, HeldoutText]()
        for key, path in settings.texts.items():
            name, documents = f"forgetting.{key}", self._documents.get(key)
            texts[key] = heldout_text(path, self.text, settings.rows, settings.length, documents, name)
            if (found := len(texts[key].ids_RT)) < settings.rows:
                print(
                    f"note: {name}={path}: {found} rows of {settings.length} ids, fewer than "
                    f"forgetting.rows={settings.rows}",
                    file=sys.stderr,
                )
        return texts

    def _text_entry(
        self, key: str, entry: dict[str, dict[str, Any]], scores: Mapping[str, RowScores], decoder: Backbone
    ) -> dict[str, Any]:
        """The entry of a text: its losses, bits per byte, top-1 accuracy, loss at the best temperature, floors, sizes.

        Bits per byte are comparable across vocabularies.
        """
        assert self._texts is not None
        text = self._texts[key]
        targets = target_count(text.ids_RT, document_start(self.text))
        per_byte = targets / math.log(2) / text.size
        for name, values in entry.items():
            top1, best = (
                summary(unit, column)
                for unit, column in (("accuracy", scores[name].top1_R), ("nll", scores[name].best_nll_R))
            )
            values["bits_per_byte"] = values["nll"] * per_byte
            values |= {"top1": top1["accuracy"], "top1_se": top1["se"]}
            values["best_temperature"] = {
                "temperature": scores[name].temperature,
                "nll": best["nll"],
                "se": best["se"],
                "bits_per_byte": best["nll"] * per_byte,
            }
        floors = {"uniform": uniform_nll(len(decoder.output.text)), "unigram": text.unigram_nll}
        floors |= self._random_weights(decoder).get(key, {})
        named = {name: {"nll": nll, "bits_per_byte": nll * per_byte} for name, nll in floors.items()}
        return {
            **entry,
            "floors": named,
            "name": text_name(self.settings.texts[key]),
            "rows": len(text.ids_RT),
            "targets": targets,
        }

    def _random_weights(self, decoder: Backbone) -> dict[str, dict[str, float]]:
        """Loss of random weights over the text rows, by text; measured once."""
        assert self._texts is not None
        if self._random is None:
            self._random = {}
            small = sum(parameter.numel() for parameter in decoder.parameters()) <= MOST_RANDOM
            if self._untrained is not None and self._texts and small:
                untrained = self._untrained().to(decoder.output.text.device).eval()
                start = document_start(self.text)
                for key, one in self._texts.items():
                    losses = text_losses(untrained, one.ids_RT, start)["text_rows"]
                    self._random[key] = {"random_weights": sum(losses) / len(losses)}
        return self._random

    def _identity(self) -> dict[str, str]:
        """Hashes of the text tokenizer, of each text's ids, and of each task's questions; a stated document."""
        identity = {f"tasks/{task.name}": task.sha256 for task in self._tasks or ()}
        for key, one in (self._texts or {}).items():
            content = f"{list(one.ids_RT.shape)} ".encode() + one.ids_RT.numpy().tobytes()
            identity[key] = hashlib.sha256(content).hexdigest()
        stated = {name: json.dumps(value) for name, value in document_key(self.text).items()}
        return {"text_tokenizer": self.text.sha256, **stated, **identity}

    def _before(self, values: Values, initial: bool) -> tuple[Values, str | None]:
        """Values before training of the current rows and questions, and a note on those without.

        Before training, the current values are written as these.
        """
        if self.baseline is None:
            return {}, None
        identity = self._identity()
        if not self.baseline.is_file():
            if not initial:
                return {}, f"no change for any value: not measured before training, {self.baseline.name} is missing"
            write_atomic(self.baseline, json.dumps(sealed({"identity": identity, "values": values})) + "\n")
        try:
            before = read_sealed(self.baseline, "restore it from a copy")
        except ValueError as error:
            return {}, f"no change for any value: {error}"
        name = self.baseline.name
        if "identity" not in before:  # written by an earlier version
            return {}, f"no change for any value: {name} has no hashes of its rows and questions"
        differing = {key for key, value in identity.items() if before["identity"].get(key) != value}
        other = [group for group in values if differing & {group, "text_tokenizer", "documents"}]
        earlier = {group: before["values"][group] for group in values if group not in other}
        if not other:
            return earlier, None
        return earlier, f"no change for {', '.join(other)}: {name} holds other rows, questions or token ids"


def text_name(path: str) -> str:
    """Name of a text: that of its file or folder, without folders and suffixes."""
    name = path.rstrip("/").rpartition("/")[2]
    for suffix in (".gz", ".txt"):
        name = name.removesuffix(suffix)
    return name


def summary(unit: str, values: Sequence[float], before: Sequence[float] | None = None) -> dict[str, Any]:
    """Mean and standard error as `unit` and `se`; `ppl` for nll; with `before`, mean and error of the differences."""
    column = torch.tensor(values, dtype=torch.float64)
    entry: dict[str, Any] = {unit: float(column.mean()), "se": _error(column)}
    if unit == "nll":
        entry["ppl"] = math.exp(min(entry[unit], 700.0))
    if before is not None and len(before) == len(values):
        difference = column - torch.tensor(before, dtype=torch.float64)
        entry |= {"change": float(difference.mean()), "change_se": _error(difference)}
    return entry


def _error(column: Tensor) -> float | None:
    """Standard error of a mean; None, unknown, for a single value."""
    return float(column.std() / len(column) ** 0.5) if len(column) > 1 else None
