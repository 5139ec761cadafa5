"""`evaluate --lm-eval`: tasks of lm-evaluation-harness before and after training (extra `lm-eval`).

Torch and the harness are imported late: the command checks task names before it loads a model.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.evaluation.base import EvaluationContext, Evaluator
from t2i_lm.runtime.tables import with_error
from t2i_lm.storage.hashing import folder_sha256
from t2i_lm.storage.run_folder import environment
from t2i_lm.tokenizers.documents import document_start

if TYPE_CHECKING:
    from t2i_lm.experiment.build import ImageModel


class LmEvalEvaluator(Evaluator):
    """Tasks on the trained model and, unless left out or random, on the model that training began with."""

    title = "lm-evaluation-harness (require --lm-eval)"

    def __init__(self, options: argparse.Namespace) -> None:
        """Finds the tasks.

        Raises:
            ValueError: if the harness is not installed or has no such task, or an option is wrong.
        """
        self.folder, self.limit = options.lm_eval_tasks, options.lm_eval_limit
        self.all_rows, self.no_before = options.lm_eval_all_rows, options.no_before
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--lm-eval-tasks {self.folder}: no such folder")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--lm-eval-limit {self.limit}: expected at least 1")
        self.tasks = choose_tasks(options.lm_eval, self.folder)

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add("--lm-eval", metavar="TASKS", help="tasks to run before and after training (extra lm-eval)")
        add("--lm-eval-tasks", type=Path, metavar="FOLDER", help="your own tasks, YAML; Python code they name is run")
        add("--lm-eval-limit", type=int, metavar="N", help="questions per task (default: all)")
        add("--lm-eval-all-rows", action="store_true", help="score over image rows too, not over text rows only")
        add("--no-before", action="store_true", help="leave out the model before training")

    def describe(self) -> str:
        limit = "all" if self.limit is None else f"at most {self.limit}"
        rows = "all rows" if self.all_rows else "the text rows only"
        models = "the trained model" if self.no_before else "the model before and after training"
        return (
            f"lm-evaluation-harness: {limit} questions each of {', '.join(self.tasks.names)}, over {rows}, by {models}"
        )

    def identity(self, config: ExperimentConfig) -> dict[str, Any]:
        return {
            "tasks": self.tasks.names,
            "folder_sha256": None if self.folder is None else folder_sha256(self.folder, (".yaml", ".yml", ".py")),
            "limit": self.limit,
            "rows": "all" if self.all_rows else "text",
            "before": self._has_before(config),
        }

    def run(self, context: EvaluationContext) -> dict[str, Any] | None:
        """Measures on rank 0.

        Returns:
            As JSON can hold it. `tasks`: by name the task's version, shots, number of questions, and by metric its
            value with the harness' standard error (`se`); of both models also `before`, `before_se`, `change`, and
            where the metric is a mean over questions `change_se`, of the paired differences.

        Raises:
            ValueError: if a task cannot be run, or the model before training cannot be built again.
        """
        if context.rank:
            return None
        model = context.model
        after = self._measure(model)
        before = self._measure(_load_initial(context.run)) if self._has_before(model.config) else None
        tasks = {name: _entry(name, after, before) for name in after["results"]}
        for name, entry in tasks.items():
            for metric, values in entry["metrics"].items():
                print(f"{name} {metric}: {_line(values)}")
        return {
            "run": context.run.name,
            "checkpoint": context.checkpoint.name,
            "harness": version("lm_eval"),
            "rows": "all" if self.all_rows else "text",
            "context": "after the end of a document" if document_start(model.text) is None else "at its beginning",
            "positions": model.decoder.config.seq_len,
            "text_tokenizer_sha256": model.text.sha256,
            "limit": self.limit,
            "before": before is not None,
            "tasks": tasks,
            "environment": environment(finished=time.strftime("%Y-%m-%dT%H:%M:%S")),
        }

    def _has_before(self, config: ExperimentConfig) -> bool:
        return config.init != "random" and not self.no_before

    def _measure(self, model: "ImageModel") -> dict[str, Any]:
        """The harness' own result, with the values of each question."""
        from lm_eval import simple_evaluate

        from t2i_lm.evaluation.probes.harness import HarnessModel

        harness = HarnessModel(model.decoder, model.text, self.all_rows)
        result: dict[str, Any] = simple_evaluate(
            harness, tasks=self.tasks.names, task_manager=self.tasks.manager, limit=self.limit
        )
        return result


@dataclass(frozen=True)
class ChosenTasks:
    """Names of tasks, and the harness' index that contains them."""

    names: list[str]
    manager: Any


def choose_tasks(names: str, folder: Path | None) -> ChosenTasks:
    """Finds tasks, groups and tags by name.

    Args:
        names: separated by commas; `*` matches anything.
        folder: further tasks, one per YAML file; Python code that a YAML names is run.

    Raises:
        ValueError: if the harness is not installed; for a name that matches nothing, with close ones.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("--lm-eval requires lm-evaluation-harness: pip install 't2i_lm[lm-eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    tasks: list[str] = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        matches = manager.match_tasks([name])
        if not matches:
            close = get_close_matches(name, manager.all_tasks, n=5) or ["none"]
            where = "" if folder is None else f" and none of {folder}"
            raise ValueError(
                f"--lm-eval {name}: no task of lm_eval {version('lm_eval')}{where}; close ones: {', '.join(close)}"
            )
        tasks += [task for task in matches if task not in tasks]
    if not tasks:
        raise ValueError(f"--lm-eval {names!r}: expected names of tasks, separated by commas")
    return ChosenTasks(tasks, manager)


def _load_initial(run: Path) -> "ImageModel":
    from t2i_lm.experiment.restore import load_initial

    try:
        return load_initial(run)
    except ValueError as error:
        raise ValueError(f"the model before training: {error} (--no-before leaves it out)") from error


def _entry(name: str, after: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """A task or group in the result."""
    results = after["results"][name]
    metrics = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = f"{metric}_stderr,{kind}"
        entry = {"value": float(value), "se": _number(results.get(error))}
        if before is not None:
            earlier = before["results"][name]
            entry |= {"before": float(earlier[key]), "before_se": _number(earlier.get(error))}
            entry |= _change(entry, *(_values(result, name, metric, kind) for result in (after, before)))
        metrics[metric if kind == "none" else key] = entry
    return {
        "version": after["versions"].get(name),
        "shots": after["n-shot"].get(name),
        "questions": after["n-samples"].get(name, {}).get("effective", results.get("sample_len")),
        "questions_in_all": after["n-samples"].get(name, {}).get("original"),
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """A standard error; None where the harness has none, for which it writes a word."""
    return float(value) if isinstance(value, int | float) else None


def _values(result: dict[str, Any], name: str, metric: str, kind: str) -> list[Any]:
    """A metric of each question, in order; empty for a group."""
    rows = [row for row in result["samples"].get(name, []) if row["filter"] == kind and metric in row]
    return [row[metric] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]


def _change(entry: dict[str, Any], after: Sequence[Any], before: Sequence[Any]) -> dict[str, float]:
    """The difference, with its error where the metric is the mean of the questions' values."""
    from t2i_lm.evaluation.probes.suite import summary

    change = {"change": entry["value"] - entry["before"]}
    if not after or not all(isinstance(value, int | float) for value in (*after, *before)):
        return change
    means = (sum(after) / len(after), sum(before) / len(before))
    if max(abs(means[0] - entry["value"]), abs(means[1] - entry["before"])) > 1e-9:
        return change
    return change | {"change_se": summary("value", after, before)["change_se"]}


def _line(entry: dict[str, Any]) -> str:
    line = with_error(f"{entry['value']:.4f}", entry["se"])
    if "before" in entry:
        change = with_error(f"{entry['change']:+.4f}", entry.get("change_se"))
        line += f" (before {entry['before']:.4f}, change {change})"
    return line
