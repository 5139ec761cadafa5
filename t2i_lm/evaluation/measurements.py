"""What `evaluate` can measure: a row each, of inputs to check, what `--dry-run` says, and the measurement itself.

Torch is imported late, so that `--help` and a wrong option are answered at once.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.evaluation.protocol_card import PROMPT_SEED

if TYPE_CHECKING:
    from t2i_lm.config.experiment import ExperimentConfig
    from t2i_lm.config.sections import ForgettingConfig
    from t2i_lm.data.coco import Coco, Prompt
    from t2i_lm.evaluation.base import EvaluationContext
    from t2i_lm.evaluation.lm_eval import ChosenTasks


@dataclass(frozen=True)
class Measurement:
    """One thing to measure; its result becomes OUT/NAME.json.

    Attributes:
        wanted: whether the command line asks for it.
        check: reads its inputs without torch, so that wrong ones are named in a second; what `run` then gets.
        describe: what `--dry-run` says.
        made_with: what a result depends on beside the checkpoint; one of other values is not replaced.
        run: measures on every rank; what rank 0 returns is written and printed.
    """

    wanted: Callable[[argparse.Namespace], bool]
    check: Callable[[argparse.Namespace], Any]
    describe: Callable[[argparse.Namespace, Any], str]
    made_with: Callable[[argparse.Namespace, Any, "ExperimentConfig"], dict[str, Any]]
    run: Callable[["EvaluationContext", Any], dict[str, Any] | None]


def _check_coco(options: argparse.Namespace) -> tuple["Coco", "list[Prompt]"]:
    """Captions and prompts.

    Raises:
        ValueError: naming the option, key or file that is wrong.
    """
    from t2i_lm.assets import PREFIX
    from t2i_lm.data.coco import choose_prompts, read_coco
    from t2i_lm.storage.hashing import file_sha256
    from t2i_lm.storage.hub import is_hub, require_model

    for key, least in (("prompts", 2), ("part", 1), ("seed", 0)):
        if getattr(options, key) < least:
            raise ValueError(f"--{key} {getattr(options, key)}: expected at least {least}")
    if options.features not in (64, 192, 768, 2048):
        raise ValueError(f"--features {options.features}: expected 64, 192, 768 or 2048")
    if options.weights is None:
        raise ValueError("--weights: --coco needs the file of torch-fidelity's Inception, see --help")
    if not options.weights.startswith(PREFIX) and not is_hub(options.weights):
        file = Path(options.weights)
        if not file.is_file():
            raise ValueError(f"--weights {file}: no such file")
        if options.weights_sha256 is not None and file_sha256(file) != options.weights_sha256.lower():
            raise ValueError(f"--weights {file} has sha256 {file_sha256(file)}, expected {options.weights_sha256}")
    if options.clip is not None:
        if find_spec("transformers") is None:
            raise ValueError("--clip needs transformers: pip install 't2i_lm[clip]'")
        require_model(options.clip, "clip", "--clip")
    coco = read_coco(options.coco)
    return coco, choose_prompts(coco, options.prompts, PROMPT_SEED)


def _describe_coco(options: argparse.Namespace, given: tuple["Coco", "list[Prompt]"]) -> str:
    from t2i_lm.data.coco import prompts_sha256

    coco, prompts = given
    lines = [
        f"draw {len(prompts):,} captions of val2014, one an image (sha256 {prompts_sha256(prompts)})",
        f"compare with {len(coco.images):,} images, center crop, lanczos to 256 pixels, no antialias in the metric",
        f"network: torch-fidelity's Inception, {options.features} features, {options.weights}",
        f"{-(-len(prompts) // options.part)} parts of {options.part} prompts; seed {options.seed}",
    ]
    if options.clip is not None:
        lines.append(f"CLIP score of the same images and captions, by {options.clip}")
    return "\n".join(lines)


def _coco_made_with(
    options: argparse.Namespace, given: tuple["Coco", "list[Prompt]"], config: "ExperimentConfig"
) -> dict[str, Any]:
    """Named as in the card, by which results are known that do not say it themselves."""
    from t2i_lm.data.coco import prompts_sha256

    coco, prompts = given
    return {
        "prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "captions_sha256": coco.captions_sha256,
        "features": options.features,
        "seed": options.seed,
        "guidance": config.samples.guidance if options.guidance is None else options.guidance,
        "weights": "bfloat16" if options.bf16 else "float32",
    }


def _run_coco(subject: "EvaluationContext", given: tuple["Coco", "list[Prompt]"]) -> dict[str, Any] | None:
    from t2i_lm.evaluation.coco import measure_coco

    result = measure_coco(subject, *given)
    file = subject.out / "coco.json"
    if result is not None and file.is_file():
        _keep(json.loads(file.read_text()), result, file)
    return result


def _keep(earlier: dict[str, Any], result: dict[str, Any], file: Path) -> None:
    """Adds what an earlier command measured of the same images and this one was not asked for."""
    kept = []
    if "floor" in earlier and "floor" not in result:
        result["floor"] = earlier["floor"]
        kept.append("floor")
    for entry, before in ((result, earlier), (result.get("floor", {}), earlier.get("floor", {}))):
        if "clip" in before and "clip" not in entry:
            entry["clip"] = before["clip"]
            kept.append("CLIP score")
    if kept:
        print(f"note: {file} keeps its {' and '.join(dict.fromkeys(kept))}", file=sys.stderr)


@dataclass(frozen=True)
class AskedForgetting:
    """What to measure, and hashes of its text (None of a hub's) and of each task's questions."""

    settings: "ForgettingConfig"
    text_sha256: str | None
    tasks_sha256: dict[str, str]


def _check_forgetting(options: argparse.Namespace) -> AskedForgetting:
    """The run's own settings with what the command changes.

    Raises:
        ValueError: if there is no run, or the text or the questions cannot be read.
    """
    from t2i_lm.config.load import load_experiment
    from t2i_lm.evaluation.probes.questions import read_tasks
    from t2i_lm.storage.run_folder import CONFIG, find_run

    sizes = {key: getattr(options, key) for key in ("rows", "length", "questions")}
    chosen = {key: value for key, value in sizes.items() if value is not None}
    for key, value in chosen.items():
        if value < 1:
            raise ValueError(f"--{key} {value}: expected at least 1")
    if options.tasks is not None and not options.tasks.is_dir():
        raise ValueError(f"--tasks {options.tasks}: no such folder")
    own = load_experiment(find_run(options.checkpoint) / CONFIG).forgetting
    tasks = None if options.tasks is None else str(options.tasks)
    settings = replace(own, text=options.forgetting, tasks=tasks, **chosen)
    asked = [] if options.tasks is None else read_tasks(options.tasks, settings.questions, "--tasks")
    return AskedForgetting(settings, _text_sha256(options.forgetting), {task.name: task.sha256 for task in asked})


def _text_sha256(path: str) -> str | None:
    """Hash of a text's documents; of one on a hub only the first is read, and there is none.

    Raises:
        ValueError: if it has no document or cannot be read.
    """
    from t2i_lm.data.text import DOCUMENT_SEPARATOR, read_documents

    documents = read_documents(path, "--forgetting")
    first = next(documents, None)
    if first is None:
        raise ValueError(f"--forgetting {path}: there is no text in it")
    if not Path(path).exists():
        return None
    digest = hashlib.sha256(first.encode())
    for document in documents:
        digest.update(f"{DOCUMENT_SEPARATOR}{document}".encode())
    return digest.hexdigest()


def _describe_forgetting(_: argparse.Namespace, given: AskedForgetting) -> str:
    settings = given.settings
    names = ", ".join(given.tasks_sha256)
    tasks = f", {settings.questions} questions each of {names} in {settings.tasks}" if names else ""
    return f"held-out text: {settings.rows} rows of {settings.length} ids of {settings.text}{tasks}; completions"


def _forgetting_made_with(_: argparse.Namespace, given: AskedForgetting, __: "ExperimentConfig") -> dict[str, Any]:
    kept = {key: value for key, value in vars(given.settings).items() if key not in ("interval", "text", "tasks")}
    text = {"text": given.settings.text} if given.text_sha256 is None else {"text_sha256": given.text_sha256}
    return {**text, **kept, "tasks_sha256": given.tasks_sha256}


def _run_forgetting(subject: "EvaluationContext", given: AskedForgetting) -> dict[str, Any] | None:
    if subject.rank:
        return None
    from t2i_lm.evaluation.forgetting import forgetting_report

    record = forgetting_report(subject.model, given.settings, subject.run)
    return {"run": subject.run.name, "checkpoint": subject.checkpoint.name, "settings": vars(given.settings), **record}


def _check_lm_eval(options: argparse.Namespace) -> "ChosenTasks":
    """The tasks.

    Raises:
        ValueError: if the harness is not installed or knows no such task, or an option is wrong.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("--lm-eval needs lm-evaluation-harness: pip install 't2i_lm[lm-eval]'")
    folder, limit = options.lm_eval_tasks, options.lm_eval_limit
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--lm-eval-tasks {folder}: no such folder")
    if limit is not None and limit < 1:
        raise ValueError(f"--lm-eval-limit {limit}: expected at least 1")
    from t2i_lm.evaluation.lm_eval import choose_tasks

    return choose_tasks(options.lm_eval, folder)


def _describe_lm_eval(options: argparse.Namespace, given: "ChosenTasks") -> str:
    limit = "all" if options.lm_eval_limit is None else f"at most {options.lm_eval_limit}"
    rows = "all rows" if options.lm_eval_all_rows else "the text rows alone"
    models = "the trained model" if options.no_before else "the model before training and after it"
    return f"lm-evaluation-harness: {limit} questions each of {', '.join(given.names)}, over {rows}, by {models}"


def _lm_eval_made_with(options: argparse.Namespace, given: "ChosenTasks", config: "ExperimentConfig") -> dict[str, Any]:
    from t2i_lm.storage.hashing import folder_sha256

    folder = options.lm_eval_tasks
    return {
        "tasks": given.names,
        "folder_sha256": None if folder is None else folder_sha256(folder, (".yaml", ".yml", ".py")),
        "limit": options.lm_eval_limit,
        "rows": "all" if options.lm_eval_all_rows else "text",
        "before": config.init != "random" and not options.no_before,
    }


def _run_lm_eval(subject: "EvaluationContext", given: "ChosenTasks") -> dict[str, Any] | None:
    if subject.rank:
        return None
    from t2i_lm.evaluation.lm_eval import measure_tasks

    return measure_tasks(subject, given)


# A further measurement is a row here, and its options in the parser of `evaluate`.
MEASUREMENTS: dict[str, Measurement] = {
    "coco": Measurement(
        lambda options: options.coco is not None, _check_coco, _describe_coco, _coco_made_with, _run_coco
    ),
    "forgetting": Measurement(
        lambda options: options.forgetting is not None,
        _check_forgetting,
        _describe_forgetting,
        _forgetting_made_with,
        _run_forgetting,
    ),
    "lm_eval": Measurement(
        lambda options: options.lm_eval is not None, _check_lm_eval, _describe_lm_eval, _lm_eval_made_with, _run_lm_eval
    ),
}
