"""Forgetting: the probes of a language model during training and after it (`evaluate --forgetting`), and Table 1.

Torch is imported late: the command reads text and questions before it loads a model.
"""

import argparse
import csv
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.forgetting import NONFICTION, NOVELS, ForgettingConfig
from t2i_lm.config.load import load_run
from t2i_lm.config.sections import SHARDED
from t2i_lm.data.text import (
    DOCUMENT_SEPARATOR,
    beginning,
    is_dataset_name,
    read_documents,
    recurring_in,
    same_dataset,
    text_location,
)
from t2i_lm.evaluation.base import EvaluationContext, Evaluator
from t2i_lm.evaluation.probes.questions import Task, read_tasks
from t2i_lm.runtime.tables import markdown_table
from t2i_lm.storage.run_folder import Run, find_run
from t2i_lm.storage.writing import atomic_file, write_atomic

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from t2i_lm.experiment.build import Experiment, ImageModel

# Values of each row and question before training, and their hashes, in the run folder.
BASELINE = "forgetting_before.json"
# Value of `--forgetting` without a text.
OWN = ""
# Table 1 of a run, in its folder.
TABLE = "completions"


class ForgettingEvaluator(Evaluator):
    """Perplexity on held-out text, question accuracy and completions, with the run's own settings unless overridden."""

    title = "forgetting (require --forgetting)"

    def __init__(self, options: argparse.Namespace) -> None:
        """Reads the text and the questions; of a text on a hub, the first document.

        Raises:
            ValueError: if there is no run, or the text or the questions cannot be read.
        """
        if options.questions is not None and options.tasks is None:
            raise ValueError("--questions requires --tasks")
        sizes = {key: getattr(options, key) for key in ("rows", "length", "questions")}
        overrides = {key: value for key, value in sizes.items() if value is not None}
        for key, value in overrides.items():
            if value < 1:
                raise ValueError(f"--{key} {value}: expected at least 1")
        if options.tasks is not None and not options.tasks.is_dir():
            raise ValueError(f"--tasks {options.tasks}: no such folder")
        of_run = load_run(find_run(options.checkpoint)).forgetting
        folder = None if options.tasks is None else str(options.tasks)
        texts = {"text": options.forgetting, "second_text": options.second_text}
        flags = {"text": "--forgetting", "second_text": "--second-text"}
        if options.forgetting == OWN:
            texts = {"text": NOVELS, "second_text": NONFICTION} if of_run.text is None else of_run.texts
            texts |= {"second_text": options.second_text} if options.second_text is not None else {}
            flags |= {key: f"--forgetting: forgetting.{key}" for key in texts if getattr(options, key, None) is None}
        self.settings: ForgettingConfig = replace(of_run, **{"second_text": None, **texts}, tasks=folder, **overrides)
        self.tasks: list[Task] = []
        if options.tasks is not None:
            self.tasks = read_tasks(options.tasks, self.settings.questions, "--tasks")
        self.documents = {key: read_text(path, flags[key]) for key, path in self.settings.texts.items()}
        require_other_text(self.settings, self.documents, flags["second_text"])

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add(
            "--forgetting",
            metavar="TEXT",
            nargs="?",
            const=OWN,
            help="held-out text; without TEXT those of the run, or the shipped ones",
        )
        add("--second-text", metavar="TEXT", help="held-out text of another domain")
        add("--tasks", type=Path, metavar="FOLDER", help="questions, NAME.jsonl[.gz]")
        add("--rows", type=int, metavar="N", help="rows of TEXT (default: the run's forgetting.rows)")
        add("--length", type=int, metavar="N", help="ids per row (default: the run's)")
        add("--questions", type=int, metavar="N", help="with --tasks: questions per task (default: the run's)")

    def describe(self) -> str:
        settings = self.settings
        names = ", ".join(task.name for task in self.tasks)
        tasks = f", {settings.questions} questions each of {names} in {settings.tasks}" if names else ""
        texts = " and of ".join(settings.texts.values())
        return f"held-out text: {settings.rows} rows of {settings.length} ids of {texts}{tasks}; completions"

    def identity(self, config: ExperimentConfig) -> dict[str, Any]:
        """Settings, and hashes of the texts and the questions; the name of a text on a hub; None for an absent one."""
        names = [name for key in ("text", "second_text") for name in (key, f"{key}_sha256")]
        texts: dict[str, str | None] = dict.fromkeys(names)
        for key, path in self.settings.texts.items():
            read = self.documents[key]
            texts |= {key: path} if read is None else {f"{key}_sha256": text_sha256(read)}
        unnamed = ("interval", "text", "second_text", "tasks")
        sizes = {key: value for key, value in vars(self.settings).items() if key not in unnamed}
        return {**texts, **sizes, "tasks_sha256": {task.name: task.sha256 for task in self.tasks}}

    def run(self, context: EvaluationContext) -> dict[str, Any] | None:
        if context.rank:
            return None
        record = forgetting_report(context.model, self.settings, context.run, self.documents, self.tasks)
        names = {"run": context.run.name, "checkpoint": context.checkpoint.name}
        return {**names, "settings": vars(self.settings), **record}


def read_text(path: str, flag: str) -> list[str] | None:
    """Documents of a text; None for a text on a hub, of which only the first document is read here.

    Raises:
        ValueError: if it has no document or cannot be read.
    """
    documents = read_documents(path, flag)
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{flag} {path}: there is no text in it")
    return [first, *documents] if text_location(path, flag).exists() else None


def require_texts(config: ExperimentConfig) -> None:
    """Checks the texts that a run measures on, before it starts; a text on a hub is read when it is measured.

    Says where the scale's default is left out.

    Raises:
        ValueError: if one is missing, empty or unreadable, or both are the same.
    """
    settings, strategy = config.forgetting, config.trainer.strategy
    if not config.measures_forgetting:
        if settings.interval is not None and strategy in SHARDED:
            print(f"note: forgetting is not measured with trainer.strategy={strategy}", file=sys.stderr)
        return
    found = {
        key: read_text(path, f"forgetting.{key}")
        for key, path in settings.texts.items()
        if text_location(path, f"forgetting.{key}").exists() or not is_dataset_name(path)
    }
    require_other_text(settings, found, "forgetting.second_text")
    require_unseen(config, dict.fromkeys(settings.texts) | found)


def require_unseen(config: ExperimentConfig, documents: Mapping[str, Sequence[str] | None]) -> None:
    """Checks that no document of a run's held-out texts is replayed; of those on a hub, names alone are compared.

    Raises:
        ValueError: naming both texts and the document.
    """
    path, key = config.data.replay_path, "data.replay_path"
    if not config.data.replayed or path is None:
        return
    for name in documents:
        if same_dataset(path, text := str(config.value(f"forgetting.{name}"))):
            raise ValueError(
                f"{key}={path}: forgetting.{name}={text} is the same text; name another split, or other text"
            )
    if not text_location(path, key).exists():
        return
    measured = {f"forgetting.{name}": several or () for name, several in documents.items()}
    for document in recurring_in([*chain(*measured.values())], read_documents(path, key)):
        name = next(name for name, several in measured.items() if document in several)
        raise ValueError(
            f"{key}={path}: a document of {name}={config.value(name)}, on which forgetting is measured, is in it "
            f"({beginning(document)!r}); give other text"
        )


def require_other_text(settings: ForgettingConfig, documents: Mapping[str, Sequence[str] | None], flag: str) -> None:
    """Checks that the second text is not the first, under another name or none.

    Raises:
        ValueError: if it is.
    """
    first, second = (documents.get(key) for key in ("text", "second_text"))
    same = bool(first and second) and len(recurring_in(first or (), second or ())) == len(first or ())
    one, other = settings.text, settings.second_text
    if same or (one is not None and other is not None and (one == other or same_dataset(one, other))):
        raise ValueError(f"{flag} {settings.second_text}: the same text as {settings.text}; give one of another domain")


def text_sha256(documents: Sequence[str]) -> str:
    """Hash of a text's documents, however they are cut into files."""
    digest = hashlib.sha256(documents[0].encode())
    for document in documents[1:]:
        digest.update(f"{DOCUMENT_SEPARATOR}{document}".encode())
    return digest.hexdigest()


def forgetting_probes(
    experiment: "Experiment", folder: Path
) -> "Callable[[pl.LightningModule], dict[str, Any]] | None":
    """Measures a run's module every `forgetting.interval` steps; None where that is null or impossible."""
    if not experiment.config.measures_forgetting:
        return None
    from t2i_lm.evaluation.probes.suite import Probes
    from t2i_lm.experiment.build import ImageExperiment
    from t2i_lm.models.factory import random_backbone
    from t2i_lm.modules.base import DecoderModule

    assert isinstance(experiment, ImageExperiment)
    config = experiment.config
    probes = Probes(config.forgetting, experiment.text, folder / BASELINE, untrained=lambda: random_backbone(config))

    def measure(module: "pl.LightningModule") -> dict[str, Any]:
        assert isinstance(module, DecoderModule)
        return probes(module.decoder, initial=module.trainer.global_step == 0)

    return measure


def forgetting_report(
    model: "ImageModel",
    settings: ForgettingConfig,
    folder: Path | None = None,
    documents: Mapping[str, Sequence[str] | None] | None = None,
    tasks: list[Task] | None = None,
) -> dict[str, Any]:
    """Measures a trained model (`experiment.restore.load_trained`).

    Args:
        model: a model with a text tokenizer.
        settings: what to measure; its interval is ignored.
        folder: the run folder, whose values before training are compared with where it has any.
        documents: those of `settings.texts`, by key, where they have been read.
        tasks: those of `settings.tasks`, where they have been read.

    Raises:
        ValueError: if text or questions cannot be read.
    """
    import torch

    from t2i_lm.evaluation.probes.suite import Probes
    from t2i_lm.models.factory import random_backbone

    baseline = None if folder is None or not (folder / BASELINE).is_file() else folder / BASELINE
    read = {key: text for key, text in (documents or {}).items() if text is not None}
    probes = Probes(settings, model.text, baseline, read, tasks, lambda: random_backbone(model.config))
    model.module.eval()
    with torch.no_grad():
        return probes(model.decoder)


def completion_rows(run: Run) -> list[dict[str, str]]:
    """Table 1: the completions of each prompt before training and at the last measurement, over text and all rows."""
    lines, before = run.records("forgetting"), run.before("forgetting")
    if before is None:
        return []
    first, last = (line["forgetting"].get("completions", {}) for line in (before, lines[-1]))
    after = f"after {lines[-1]['tokens_nominal']:,} tokens"
    return [
        {"prompt": entry["prompt"], "rows": rows, "original": entry[key], after: last[name][key]}
        for name, entry in first.items()
        if name in last
        for rows, key in (("text rows", "masked"), ("all rows", "unmasked"))
    ]


def write_completions(run: Run) -> list[Path]:
    """Writes Table 1 of a run that measured forgetting into its folder, as CSV and Markdown."""
    rows = completion_rows(run)
    if not rows:
        return []
    paths = [run.folder / f"{TABLE}.csv", run.folder / f"{TABLE}.md"]
    with atomic_file(paths[0]) as own, own.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = markdown_table(list(rows[0]), (list(row.values()) for row in rows))
    write_atomic(paths[1], f"{table}\n")
    return paths
