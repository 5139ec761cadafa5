"""All probes of a language model, each with its standard error and its change since before training.

The numbers of a record are means over rows of text or questions, `se` their standard error; where the model was
measured before training, `change` is the mean of the paired differences and `change_se` its own, much smaller error.
Differences are taken between equal rows and equal questions only: the file from before training holds their hashes.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_lm.config.sections import ForgettingConfig
from t2i_lm.evaluation.probes.completions import PROMPTS, complete
from t2i_lm.evaluation.probes.heldout import heldout_rows, target_count, text_losses
from t2i_lm.evaluation.probes.questions import Task, answer, read_tasks
from t2i_lm.models.backbone import Backbone
from t2i_lm.storage.resumable import write_atomic
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import document_key, document_start

# One value per row or question, by group (`text`, `tasks/NAME`) and by name in it.
Values = dict[str, dict[str, list[float]]]


class Probes:
    """All probes of an experiment, called on rank 0 only; text and questions are read at the first call."""

    def __init__(
        self,
        settings: ForgettingConfig,
        text: TextTokenizer,
        baseline: Path | None = None,
        documents: Iterable[str] | None = None,
        tasks: list[Task] | None = None,
    ) -> None:
        """Names the work.

        Args:
            settings: what to measure.
            text: the model's tokenizer.
            baseline: file of the values before training: written by the first call where it is missing.
            documents: those of `settings.text`, where they have been read.
            tasks: those of `settings.tasks`, where they have been read.
        """
        self.settings, self.text, self.baseline = settings, text, baseline
        self._documents, self._tasks = documents, tasks
        self._rows: tuple[Tensor, int] | None = None
        self._noted = False

    def __call__(self, decoder: Backbone) -> dict[str, Any]:
        """Measures a decoder in evaluation mode.

        Returns:
            As JSON can hold it: `text` (`all_rows`, `text_rows`), `tasks` by name, `completions`, and in `note` which
            groups have no `change` though the model was measured before training, and why.

        Raises:
            ValueError: if text or questions cannot be read, or the rows are longer than the model's positions.
        """
        settings, limit = self.settings, decoder.config.seq_len
        if settings.length > limit:
            raise ValueError(
                f"forgetting.length={settings.length}: the backbone has {limit} positions; "
                f"give at most {limit} (evaluate: --length {limit})"
            )
        values: Values = {}
        if settings.text is not None:
            if self._rows is None:
                self._rows = heldout_rows(settings.text, self.text, settings.rows, settings.length, self._documents)
            values["text"] = text_losses(decoder, self._rows[0], document_start(self.text))
        if self._tasks is None:
            self._tasks = [] if settings.tasks is None else read_tasks(Path(settings.tasks), settings.questions)
        for task in self._tasks:
            values[f"tasks/{task.name}"] = answer(decoder, self.text, task, limit)
        before, note = self._before(values)
        record: dict[str, Any] = {"text": {}, "tasks": {}}
        for group, columns in values.items():
            entry = {
                name: summary("nll" if group == "text" or name.endswith("_nll") else "accuracy", column, earlier)
                for name, column in columns.items()
                for earlier in [before.get(group, {}).get(name)]
            }
            if group == "text":
                record["text"] = entry | self._per_byte(entry)
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

    def _per_byte(self, entry: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Sizes of the held-out text; adds bits per byte, comparable across vocabularies, to the entry."""
        assert self._rows is not None
        ids_RT, size = self._rows
        targets = target_count(ids_RT, document_start(self.text))
        for values in entry.values():
            values["bits_per_byte"] = values["nll"] * targets / math.log(2) / size
        return {"rows": len(ids_RT), "targets": targets}

    def _identity(self) -> dict[str, str]:
        """Hashes of the text tokenizer, of the ids of all rows, and of each task's questions; a stated document."""
        identity = {f"tasks/{task.name}": task.sha256 for task in self._tasks or ()}
        if self._rows is not None:
            ids_RT, _ = self._rows
            content = f"{list(ids_RT.shape)} ".encode() + ids_RT.numpy().tobytes()
            identity["text"] = hashlib.sha256(content).hexdigest()
        stated = {name: json.dumps(value) for name, value in document_key(self.text).items()}
        return {"text_tokenizer": self.text.sha256, **stated, **identity}

    def _before(self, values: Values) -> tuple[Values, str | None]:
        """Values before training of the current rows and questions, and a note on those without.

        Before training, the current values are written as these.
        """
        if self.baseline is None:
            return {}, None
        identity = self._identity()
        if not self.baseline.is_file():
            write_atomic(self.baseline, json.dumps({"identity": identity, "values": values}) + "\n")
        before = json.loads(self.baseline.read_text(encoding="utf-8"))
        name = self.baseline.name
        if "identity" not in before:  # written by an earlier version
            return {}, f"no change for any value: {name} has no hashes of its rows and questions"
        differing = {key for key, value in identity.items() if before["identity"].get(key) != value}
        other = [group for group in values if differing & {group, "text_tokenizer", "documents"}]
        earlier = {group: before["values"][group] for group in values if group not in other}
        if not other:
            return earlier, None
        return earlier, f"no change for {', '.join(other)}: {name} holds other rows, questions or token ids"


def summary(unit: str, values: Sequence[float], before: Sequence[float] | None = None) -> dict[str, float]:
    """Mean and standard error as `unit` and `se`; `ppl` for nll; with `before`, mean and error of the differences."""
    column = torch.tensor(values, dtype=torch.float64)
    entry = {unit: float(column.mean()), "se": _error(column)}
    if unit == "nll":
        entry["ppl"] = math.exp(min(entry[unit], 700.0))
    if before is not None and len(before) == len(values):
        difference = column - torch.tensor(before, dtype=torch.float64)
        entry |= {"change": float(difference.mean()), "change_se": _error(difference)}
    return entry


def _error(column: Tensor) -> float:
    """Standard error of a mean; 0 for a single value."""
    return float(column.std() / len(column) ** 0.5) if len(column) > 1 else 0.0
