"""Measures a finished run: `python -m t2i_lm.evaluate --checkpoint RUN` with `--coco`, `--forgetting` or `--lm-eval`.

`--report` writes a run's report.json again instead.

A further evaluator is one file in `evaluation/` with one subclass of `Evaluator`, and one row of `EVALUATORS`.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from t2i_lm.evaluation.base import Evaluator
from t2i_lm.evaluation.coco import CocoEvaluator
from t2i_lm.evaluation.forgetting import ForgettingEvaluator
from t2i_lm.evaluation.lm_eval import LmEvalEvaluator
from t2i_lm.evaluation.relearning import RelearningEvaluator
from t2i_lm.runtime.command_line import command_parser, exit_code, out_folder
from t2i_lm.storage.run_folder import find_run

EXAMPLE = """example:
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --coco coco --weights inception.pth
  torchrun --nproc-per-node 8 -m t2i_lm.evaluate --checkpoint RUN --coco coco --weights FILE --prompts 10000 --cfg 3
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --forgetting heldout.txt.gz --tasks questions
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --lm-eval hellaswag,mmlu --lm-eval-limit 200
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --forgetting --relearn
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --report

RUN is a run folder, or a folder of runs, whose newest is taken. PATH holds annotations/captions_val2014.json and
val2014/*.jpg. FILE is torch-fidelity's weights-inception-2015-12-05-6726825d.pth (its release v0.2.0), or
hf://ORG/NAME/FILE[#sha256=HEX]. The same command again continues an interrupted evaluation; a result of other settings
is never overwritten and requires another --out. TEXT is a .txt or .txt.gz file of documents, a folder of them, or a
Hugging Face dataset, NAME[:SPLIT], column text; without TEXT, the run's own or the shipped texts are measured. Other
settings of forgetting are the run's. Every number carries its protocol card, and only the canonical one is called COCO
FID-30k. Captions too long for the run's data.length are cut as in training and counted in the card. Distances to few
images are biased upwards: compare equal --prompts only.
TASKS are lm-evaluation-harness' names (tasks, groups, tags), separated by commas."""

# In the order in which they run. The name is the option that requests the evaluator, and its result's file name.
EVALUATORS: dict[str, type[Evaluator]] = {
    "coco": CocoEvaluator,
    "forgetting": ForgettingEvaluator,
    "lm_eval": LmEvalEvaluator,
    "relearn": RelearningEvaluator,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser(
        "evaluate",
        "Measure a finished run: zero-shot FID, KID and CLIP score on COCO with the tokenizer's floor; forgetting; "
        "tasks of lm-evaluation-harness.",
        EXAMPLE,
    )
    add = arguments.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or folder of runs")
    add("--out", type=out_folder, help="folder to write or continue (default: in RUN/evaluations)")
    add("--dry-run", action="store_true", help="check and describe; load no model, write nothing")
    add("--report", action="store_true", help="write RUN/report.json again from its last checkpoint; alone")
    for evaluator in EVALUATORS.values():
        evaluator.add_arguments(arguments.add_argument_group(evaluator.title).add_argument)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the requested evaluators; returns the exit code."""
    options = parser().parse_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    requested = {name: kind for name, kind in EVALUATORS.items() if getattr(options, name) is not None}
    if not (requested or options.report):
        raise ValueError(
            "nothing to measure: give --coco PATH, --forgetting [TEXT], --lm-eval TASKS, --relearn [TEXT] or --report"
        )
    for name, kind in EVALUATORS.items():
        if name not in requested:
            _require_unused(options, name, kind)
    if options.report:
        return _report_again(options, requested)
    evaluators = {name: kind(options) for name, kind in requested.items()}
    for evaluator in evaluators.values():
        if evaluator.alone and len(evaluators) > 1:
            raise ValueError(evaluator.alone)
    run = find_run(options.checkpoint)

    from t2i_lm.evaluation.session import evaluate

    evaluate(run, evaluators, options)
    return 0


def _report_again(options: argparse.Namespace, requested: Collection[str]) -> int:
    """Writes the report of a run again; the exit code is 1 if a part of it fails."""
    if requested or options.out is not None or options.dry_run:
        others = [*map(_flag, requested), *(["--out"] if options.out is not None else []), "--dry-run"]
        raise ValueError(f"--report: writes report.json into the run's own folder, and alone; not with {others[0]}")
    run = find_run(options.checkpoint)

    from t2i_lm.evaluation.parts import failed
    from t2i_lm.evaluation.report import write_report_again

    return 1 if failed(write_report_again(run)) else 0


def _require_unused(options: argparse.Namespace, name: str, kind: type[Evaluator]) -> None:
    """Refuses options of an evaluator that is not requested."""
    own = argparse.ArgumentParser(add_help=False)
    kind.add_arguments(own.add_argument)
    for key, default in vars(own.parse_args([])).items():
        if getattr(options, key) != default:
            raise ValueError(f"{_flag(key)} requires {_flag(name)}")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
