"""What a model has kept of its language: probes with standard errors, during training and after it (Table 1).

The numbers of a record are means over rows of text or questions, `se` their standard error; where the model was
measured before training, `change` is the mean of the paired differences and `change_se` its own, much smaller error.
Differences are taken between equal rows and equal questions alone: the file from before training says which it holds.
"""

import csv
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from t2i_lm.config.sections import ForgettingConfig
from t2i_lm.evaluation.probes.completions import PROMPTS, complete
from t2i_lm.evaluation.probes.heldout import heldout_rows, text_losses
from t2i_lm.evaluation.probes.questions import Task, answer, read_tasks
from t2i_lm.experiment.build import Experiment, ImageExperiment, ImageModel
from t2i_lm.models.backbone import Backbone
from t2i_lm.modules.base import DecoderModule
from t2i_lm.runtime.tables import markdown_table
from t2i_lm.storage.resumable import write_atomic
from t2i_lm.storage.run_folder import Run
from t2i_lm.tokenizers.base import TextTokenizer

# Values of each row and question before training, and hashes of these, in the run folder.
BASELINE = "forgetting_before.json"
# Table 1 of a run, in its folder.
TABLE = "completions"
# Of each group (`text`, `tasks/NAME`) and name in it, a value a row or question.
Values = dict[str, dict[str, list[float]]]


class Probes:
    """All probes of an experiment. Text and questions are read at the first call, which rank 0 alone makes."""

    def __init__(self, settings: ForgettingConfig, text: TextTokenizer, baseline: Path | None = None) -> None:
        """`baseline` is written by the first call where it does not exist, and compared with by later ones."""
        self.settings, self.text, self.baseline = settings, text, baseline
        self._rows: tuple[Tensor, int] | None = None
        self._tasks: list[Task] | None = None
        self._told = False

    def __call__(self, decoder: Backbone) -> dict[str, Any]:
        """Measures a decoder in evaluation mode.

        Returns:
            `text` (`all_rows`, `text_rows`), `tasks` (by name) and `completions`, and in `note` what has no `change`
            though the model was measured before training, and why; what JSON can hold.

        Raises:
            ValueError: if text or questions cannot be read, or the rows are longer than the model's positions.
        """
        settings, limit = self.settings, decoder.config.seq_len
        if settings.length > limit:
            raise ValueError(
                f"forgetting.length={settings.length}: the backbone has {limit} positions; "
                f"give at most so many (evaluate: --length {limit})"
            )
        values: Values = {}
        if settings.text is not None:
            if self._rows is None:
                self._rows = heldout_rows(settings.text, self.text, settings.rows, settings.length)
            values["text"] = text_losses(decoder, self._rows[0])
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
            if not self._told:
                print(f"note: {note}", file=sys.stderr)
            self._told = True
        return record

    def _per_byte(self, entry: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Sizes of the held-out text, and its bits per byte: what models of other vocabularies can be compared by."""
        assert self._rows is not None
        ids_RT, size = self._rows
        targets = ids_RT.shape[0] * (ids_RT.shape[1] - 1)
        for values in entry.values():
            values["bits_per_byte"] = values["nll"] * targets / math.log(2) / size
        return {"rows": len(ids_RT), "targets": targets}

    def _identity(self) -> dict[str, str]:
        """Hashes of the text tokenizer, of the ids of all rows, and of each task's questions."""
        identity = {f"tasks/{task.name}": task.sha256 for task in self._tasks or ()}
        if self._rows is not None:
            ids_RT, _ = self._rows
            content = f"{list(ids_RT.shape)} ".encode() + ids_RT.numpy().tobytes()
            identity["text"] = hashlib.sha256(content).hexdigest()
        return {"text_tokenizer": self.text.sha256, **identity}

    def _before(self, values: Values) -> tuple[Values, str | None]:
        """Values before training of the rows and questions that are measured now, and what is to be said of others.

        Written where this is before training.
        """
        if self.baseline is None:
            return {}, None
        identity = self._identity()
        if not self.baseline.is_file():
            write_atomic(self.baseline, json.dumps({"identity": identity, "values": values}) + "\n")
        found = json.loads(self.baseline.read_text())
        name = self.baseline.name
        if "identity" not in found:  # written by an earlier version
            return {}, f"no change of anything: {name} does not say which rows and questions it holds"
        differing = {key for key, value in identity.items() if found["identity"].get(key) != value}
        other = [group for group in values if differing & {group, "text_tokenizer"}]
        earlier = {group: found["values"][group] for group in values if group not in other}
        if not other:
            return earlier, None
        return earlier, f"no change of {', '.join(other)}: {name} holds other rows or questions, or another tokenizer's"


def summary(unit: str, values: Sequence[float], before: Sequence[float] | None = None) -> dict[str, float]:
    """Mean and standard error under `unit` and `se`, of a nll also `ppl`; with `before`, those of the differences."""
    column = torch.tensor(values, dtype=torch.float64)
    entry = {unit: float(column.mean()), "se": _error(column)}
    if unit == "nll":
        entry["ppl"] = math.exp(min(entry[unit], 700.0))
    if before is not None and len(before) == len(values):
        difference = column - torch.tensor(before, dtype=torch.float64)
        entry |= {"change": float(difference.mean()), "change_se": _error(difference)}
    return entry


def _error(column: Tensor) -> float:
    """Standard error of a mean; 0 of a single value, which says nothing."""
    return float(column.std() / len(column) ** 0.5) if len(column) > 1 else 0.0


def forgetting_probes(experiment: Experiment, folder: Path) -> Callable[[pl.LightningModule], dict[str, Any]] | None:
    """What measures a run's module at `forgetting.interval`; None where nothing is to be measured."""
    if experiment.config.forgetting.interval is None:
        return None
    assert isinstance(experiment, ImageExperiment)
    probes = Probes(experiment.config.forgetting, experiment.text, folder / BASELINE)

    def measure(module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(module, DecoderModule)
        return probes(module.decoder)

    return measure


def forgetting_report(model: ImageModel, settings: ForgettingConfig, folder: Path | None = None) -> dict[str, Any]:
    """Measures a trained model (`trained.load_trained`), compared with before training where `folder` knows that.

    Args:
        model: a model with a text tokenizer.
        settings: what to measure; its interval does not matter.
        folder: the run folder.

    Raises:
        ValueError: if text or questions cannot be read.
    """
    known = folder is not None and (folder / BASELINE).is_file()
    probes = Probes(settings, model.text, folder / BASELINE if folder is not None and known else None)
    model.module.eval()
    with torch.no_grad():
        return probes(model.decoder)


def completion_rows(run: Run) -> list[dict[str, str]]:
    """Table 1: each prompt with its completions before training and at the last measurement, both ways of decoding."""
    lines = run.records("forgetting")
    if not lines:
        return []
    first, last = lines[0]["forgetting"]["completions"], lines[-1]["forgetting"]["completions"]
    after = f"after {lines[-1]['tokens_nominal']:,} tokens"
    return [
        {"prompt": entry["prompt"], "rows": rows, "original": entry[key], after: last[name][key]}
        for name, entry in first.items()
        if name in last
        for rows, key in (("text rows", "masked"), ("all rows", "unmasked"))
    ]


def write_completions(run: Run) -> list[Path]:
    """Writes Table 1 into the run folder as CSV and Markdown; nothing where nothing was measured."""
    rows = completion_rows(run)
    if not rows:
        return []
    paths = [run.folder / f"{TABLE}.csv", run.folder / f"{TABLE}.md"]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = markdown_table(list(rows[0]), (list(row.values()) for row in rows))
    paths[1].write_text(f"{table}\n", encoding="utf-8")
    return paths
