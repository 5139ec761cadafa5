"""The lm-eval measurement of `evaluate`: lm-evaluation-harness' tasks before training and after (extra `lm-eval`)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from t2i_lm.evaluation.base import EvaluationContext
from t2i_lm.evaluation.forgetting import summary
from t2i_lm.experiment.build import ImageModel
from t2i_lm.experiment.restore import load_initial
from t2i_lm.storage.run_folder import environment


@dataclass(frozen=True)
class ChosenTasks:
    """Names that the harness knows, and the harness' index of tasks."""

    names: list[str]
    manager: Any


def choose_tasks(wanted: str, folder: Path | None) -> ChosenTasks:
    """Finds tasks, groups and tags by name.

    Args:
        wanted: names, separated by commas; `*` stands for anything.
        folder: further tasks, one YAML each; Python code that a YAML names is run.

    Raises:
        ValueError: naming a name that stands for nothing, with those that are close.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    names: list[str] = []
    for name in filter(None, (name.strip() for name in wanted.split(","))):
        found = manager.match_tasks([name])
        if not found:
            close = get_close_matches(name, manager.all_tasks, n=5) or ["none"]
            where = "" if folder is None else f" and none of {folder}"
            raise ValueError(
                f"--lm-eval {name}: no task of lm_eval {version('lm_eval')}{where}; close ones: {', '.join(close)}"
            )
        names += [task for task in found if task not in names]
    if not names:
        raise ValueError(f"--lm-eval {wanted!r}: expected names of tasks, separated by commas")
    return ChosenTasks(names, manager)


def measure_tasks(subject: EvaluationContext, chosen: ChosenTasks) -> dict[str, Any]:
    """Runs the tasks on the trained model and, unless left out or random, on the model that training began with.

    Returns:
        What JSON can hold. `tasks`: by name the task's version, shots, number of questions, and by metric its value
        with the harness' standard error (`se`); of both models also `before`, `before_se`, `change`, and where the
        metric is a mean over questions `change_se`, of the paired differences.

    Raises:
        ValueError: if a task cannot be run, or the model before training cannot be built again.
    """
    options, model = subject.options, subject.model
    after = _run(model, chosen, options.lm_eval_limit, options.lm_eval_all_rows)
    before = None
    if model.config.init != "random" and not options.no_before:
        before = _run(_initial(subject), chosen, options.lm_eval_limit, options.lm_eval_all_rows)
    tasks = {name: _entry(name, after, before) for name in after["results"]}
    for name, entry in tasks.items():
        for metric, found in entry["metrics"].items():
            print(f"{name} {metric}: {_said(found)}")
    return {
        "run": subject.run.name,
        "checkpoint": subject.checkpoint.name,
        "harness": version("lm_eval"),
        "rows": "all" if options.lm_eval_all_rows else "text",
        "context": "after the end of a document",
        "positions": model.decoder.config.seq_len,
        "text_tokenizer_sha256": model.text.sha256,
        "limit": options.lm_eval_limit,
        "before": before is not None,
        "tasks": tasks,
        "environment": environment(finished=time.strftime("%Y-%m-%dT%H:%M:%S")),
    }


def _initial(subject: EvaluationContext) -> ImageModel:
    try:
        return load_initial(subject.run)
    except ValueError as error:
        raise ValueError(f"the model before training: {error} (--no-before leaves it out)") from error


def _run(model: ImageModel, chosen: ChosenTasks, limit: int | None, all_rows: bool) -> dict[str, Any]:
    """What the harness says of a model, with the values of each question."""
    from lm_eval import simple_evaluate

    from t2i_lm.evaluation.probes.harness import HarnessModel

    harness = HarnessModel(model.decoder, model.text, all_rows)
    found: dict[str, Any] = simple_evaluate(harness, tasks=chosen.names, task_manager=chosen.manager, limit=limit)
    return found


def _entry(name: str, after: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """A task or group as the result shows it."""
    results = after["results"][name]
    metrics = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = f"{metric}_stderr,{kind}"
        found = {"value": float(value), "se": _number(results.get(error))}
        if before is not None:
            earlier = before["results"][name]
            found |= {"before": float(earlier[key]), "before_se": _number(earlier.get(error))}
            found |= _change(found, *(_values(one, name, metric, kind) for one in (after, before)))
        metrics[metric if kind == "none" else key] = found
    return {
        "version": after["versions"].get(name),
        "shots": after["n-shot"].get(name),
        "questions": after["n-samples"].get(name, {}).get("effective", results.get("sample_len")),
        "questions_in_all": after["n-samples"].get(name, {}).get("original"),
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """A standard error, which the harness gives as a word where it has none."""
    return float(value) if isinstance(value, int | float) else None


def _values(found: dict[str, Any], name: str, metric: str, kind: str) -> list[Any]:
    """A metric of each question, in order; none of a group."""
    rows = [row for row in found["samples"].get(name, []) if row["filter"] == kind and metric in row]
    return [row[metric] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]


def _change(found: dict[str, Any], after: Sequence[Any], before: Sequence[Any]) -> dict[str, float]:
    """The difference, with its error where the metric is the mean of the questions' values."""
    change = {"change": found["value"] - found["before"]}
    if not after or not all(isinstance(value, int | float) for value in (*after, *before)):
        return change
    means = (sum(after) / len(after), sum(before) / len(before))
    if max(abs(means[0] - found["value"]), abs(means[1] - found["before"])) > 1e-9:
        return change
    return change | {"change_se": summary("value", after, before)["change_se"]}


def _said(found: dict[str, Any]) -> str:
    said = f"{found['value']:.4f}" + ("" if found["se"] is None else f" +- {found['se']:.4f}")
    if "before" in found:
        error = f" +- {found['change_se']:.4f}" if "change_se" in found else ""
        said += f" (before {found['before']:.4f}, change {found['change']:+.4f}{error})"
    return said
