"""What `evaluate` can measure: a row each, of inputs to check, what `--dry-run` says, and the measurement itself.

Torch is imported late, so that `--help` and a wrong option are answered at once.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.protocol import PROMPT_SEED

if TYPE_CHECKING:
    from t2i_lm.data.coco import Coco, Prompt
    from t2i_lm.harness_result import ChosenTasks
    from t2i_lm.remedy_sections import ForgettingConfig
    from t2i_lm.subject import Subject


@dataclass(frozen=True)
class Measurement:
    """One thing to measure; its result becomes OUT/NAME.json.

    Attributes:
        wanted: whether the command line asks for it.
        check: reads its inputs without torch, so that wrong ones are named in a second; what `run` then gets.
        describe: what `--dry-run` says.
        run: measures on every rank; what rank 0 returns is written and printed.
    """

    wanted: Callable[[argparse.Namespace], bool]
    check: Callable[[argparse.Namespace], Any]
    describe: Callable[[argparse.Namespace, Any], str]
    run: Callable[["Subject", Any], dict[str, Any] | None]


def _check_coco(options: argparse.Namespace) -> tuple["Coco", "list[Prompt]"]:
    """Captions and prompts.

    Raises:
        ValueError: naming the option, key or file that is wrong.
    """
    from t2i_lm.assets import PREFIX
    from t2i_lm.data.coco import choose_prompts, read_coco
    from t2i_lm.hashing import file_sha256
    from t2i_lm.hub import PREFIX as HUB
    from t2i_lm.hub import require_model

    for key, least in (("prompts", 2), ("part", 1), ("seed", 0)):
        if getattr(options, key) < least:
            raise ValueError(f"--{key} {getattr(options, key)}: expected at least {least}")
    if options.features not in (64, 192, 768, 2048):
        raise ValueError(f"--features {options.features}: expected 64, 192, 768 or 2048")
    if options.weights is None:
        raise ValueError("--weights: --coco needs the file of torch-fidelity's Inception, see --help")
    if not options.weights.startswith((HUB, PREFIX)):
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
        f"draw {len(prompts):,} captions of val2014, one a picture (sha256 {prompts_sha256(prompts)})",
        f"compare with {len(coco.pictures):,} pictures, centre crop, lanczos to 256 pixels, no antialias in the metric",
        f"network: torch-fidelity's Inception, {options.features} features, {options.weights}",
        f"{-(-len(prompts) // options.part)} parts of {options.part} prompts; seed {options.seed}",
    ]
    if options.clip is not None:
        lines.append(f"CLIP score of the same pictures and captions, by {options.clip}")
    return "\n".join(lines)


def _run_coco(subject: "Subject", given: tuple["Coco", "list[Prompt]"]) -> dict[str, Any] | None:
    from t2i_lm.coco_result import measure_coco

    return measure_coco(subject, *given)


def _check_forgetting(options: argparse.Namespace) -> "ForgettingConfig":
    """What to measure.

    Raises:
        ValueError: if the text or the questions are not there.
    """
    from t2i_lm.remedy_sections import ForgettingConfig

    if not Path(options.forgetting).exists():
        raise ValueError(f"--forgetting {options.forgetting}: no such file or folder")
    if options.tasks is not None and not options.tasks.is_dir():
        raise ValueError(f"--tasks {options.tasks}: no such folder")
    return ForgettingConfig(text=options.forgetting, tasks=None if options.tasks is None else str(options.tasks))


def _describe_forgetting(_: argparse.Namespace, given: "ForgettingConfig") -> str:
    tasks = f", {given.questions} questions of each task in {given.tasks}" if given.tasks else ""
    return f"held-out text: {given.rows} rows of {given.length} ids of {given.text}{tasks}; completions"


def _run_forgetting(subject: "Subject", given: "ForgettingConfig") -> dict[str, Any] | None:
    if subject.rank:
        return None
    from t2i_lm.forgetting import forgetting_report

    record = forgetting_report(subject.model, given, subject.run)
    return {"run": subject.run.name, "checkpoint": subject.checkpoint.name, "settings": vars(given), **record}


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
    from t2i_lm.harness_result import choose_tasks

    return choose_tasks(options.lm_eval, folder)


def _describe_lm_eval(options: argparse.Namespace, given: "ChosenTasks") -> str:
    limit = "all" if options.lm_eval_limit is None else f"at most {options.lm_eval_limit}"
    rows = "all rows" if options.lm_eval_all_rows else "the text rows alone"
    models = "the trained model" if options.no_before else "the model before training and after it"
    return f"lm-evaluation-harness: {limit} questions each of {', '.join(given.names)}, over {rows}, by {models}"


def _run_lm_eval(subject: "Subject", given: "ChosenTasks") -> dict[str, Any] | None:
    if subject.rank:
        return None
    from t2i_lm.harness_result import measure_tasks

    return measure_tasks(subject, given)


# A further measurement is a row here, and its options in the parser of `evaluate`.
MEASUREMENTS: dict[str, Measurement] = {
    "coco": Measurement(lambda options: options.coco is not None, _check_coco, _describe_coco, _run_coco),
    "forgetting": Measurement(
        lambda options: options.forgetting is not None, _check_forgetting, _describe_forgetting, _run_forgetting
    ),
    "lm_eval": Measurement(
        lambda options: options.lm_eval is not None, _check_lm_eval, _describe_lm_eval, _run_lm_eval
    ),
}
