"""Measures a finished run: `python -m t2i_lm.evaluate --checkpoint RUN`, `--coco`, `--forgetting` or `--lm-eval`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.protocol import HEADLINE, PROMPT_SEED

if TYPE_CHECKING:
    from t2i_lm.data.coco import Coco, Prompt
    from t2i_lm.harness_result import ChosenTasks
    from t2i_lm.remedy_sections import ForgettingConfig
    from t2i_lm.subject import Subject

EXAMPLE = """example:
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --coco coco --weights inception.pth
  torchrun --nproc-per-node 8 -m t2i_lm.evaluate --checkpoint RUN --coco coco --weights FILE --prompts 10000 --cfg 3
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --forgetting heldout.txt.gz --tasks questions
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --lm-eval hellaswag,mmlu --lm-eval-limit 200

RUN is a run folder, or a folder of runs, whose newest is taken. PATH holds annotations/captions_val2014.json and
val2014/*.jpg. FILE is torch-fidelity's weights-inception-2015-12-05-6726825d.pth (its release v0.2.0), or
hub:ORG/NAME/FILE[#sha256=HEX]. The same command again continues what was interrupted. Every number carries its
protocol card, and only the canonical one is called COCO FID-30k. Captions too long for the run's data.length are cut
as in training and counted in the card. Distances to few pictures are biased upwards: compare equal --prompts only.
TASKS are lm-evaluation-harness' names (tasks, groups, tags), separated by commas."""

# Options that say nothing without another.
BELONGS = {
    "clip": "coco",
    "tasks": "forgetting",
    "lm_eval_limit": "lm_eval",
    "lm_eval_tasks": "lm_eval",
    "lm_eval_all_rows": "lm_eval",
    "no_before": "lm_eval",
}


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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.evaluate",
        description="Measure a finished run: zero-shot FID, KID and CLIP score on COCO with the tokenizer's floor; "
        "forgetting; tasks of lm-evaluation-harness.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or folder of runs")
    add("--coco", type=Path, metavar="PATH", help="COCO folder of val2014: measure FID and KID")
    add("--weights", metavar="FILE", help="of torch-fidelity's Inception; needed with --coco")
    add("--weights-sha256", metavar="HEX", help="refuse another file")
    add("--features", type=int, default=2048, help="layer of the network, by its width (default: %(default)s)")
    add("--clip", metavar="MODEL", help="with --coco: also the CLIP score, by a CLIP folder or hub:ORG/NAME[@REVISION]")
    add("--prompts", type=int, default=30_000, metavar="N", help="captions, one a picture (default: %(default)s)")
    add("--forgetting", metavar="TEXT", help="held-out text: measure what is left of the language model")
    add("--tasks", type=Path, metavar="FOLDER", help="with --forgetting: questions, NAME.jsonl[.gz]")
    add("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, before training and after (extra lm-eval)")
    add("--lm-eval-tasks", type=Path, metavar="FOLDER", help="with --lm-eval: your own tasks, YAML; their code is run")
    add("--lm-eval-limit", type=int, metavar="N", help="with --lm-eval: questions of each task (default: all)")
    add("--lm-eval-all-rows", action="store_true", help="with --lm-eval: over image rows too, not the text rows alone")
    add("--no-before", action="store_true", help="with --lm-eval: leave out the model before training")
    add("--guidance", "--cfg", type=float, metavar="S", help="scale of classifier-free guidance (default: the run's)")
    add("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    add("--compile", action="store_true", help="compile the drawing step; ids may differ where nearly tied")
    add("--no-floor", action="store_true", help="leave out the reconstruction FID of the tokenizer")
    add("--canonical", action="store_true", help=f"refuse to measure anything that is not {HEADLINE}")
    add("--pictures", action="store_true", help="also write every drawn picture as PNG")
    add("--part", type=int, default=256, metavar="N", help="prompts that a kill loses at most (default: %(default)s)")
    add("--cache", type=Path, default=Path("cache"), help="features of the reference (default: %(default)s)")
    add("--out", type=Path, help="folder to write or continue (default: in RUN/evaluations)")
    add("--dry-run", action="store_true", help="check and describe; load no model, write nothing")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, measures, writes one JSON a measurement; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        wanted = {name: row for name, row in MEASUREMENTS.items() if row.wanted(options)}
        if not wanted:
            raise ValueError("nothing to measure: give --coco PATH, --forgetting TEXT or --lm-eval TASKS")
        for key, whole in BELONGS.items():
            if getattr(options, key) not in (None, False) and getattr(options, whole) is None:
                raise ValueError(f"{_flag(key)}: says nothing without {_flag(whole)}")
        given = {name: row.check(options) for name, row in wanted.items()}
        if options.dry_run:
            print(*(row.describe(options, given[name]) for name, row in wanted.items()), sep="\n")
            return 0
        return _measure(options, wanted, given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(options: argparse.Namespace, wanted: dict[str, Measurement], given: dict[str, Any]) -> int:
    import torch

    from t2i_lm.devices import uses_gpu
    from t2i_lm.parts import write_whole
    from t2i_lm.subject import Subject
    from t2i_lm.trained import find_run, load_trained, newest_checkpoint

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    run = find_run(options.checkpoint)
    checkpoint = newest_checkpoint(run)
    model = load_trained(run)
    torch.set_num_threads(model.config.trainer.threads or torch.get_num_threads())
    if uses_gpu(model.config.trainer.accelerator):
        model.module.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    if options.compile:
        from t2i_lm.drawing import compile_drawing

        compile_drawing(model)
    out = options.out or run / "evaluations" / _default_name(options, checkpoint)
    subject = Subject(options, run, checkpoint, model, out, rank, world)
    if world > 1:
        from datetime import timedelta

        # Ranks wait for the slowest, which may have a part more to draw.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
    try:
        for name, row in wanted.items():
            result = row.run(subject, given[name])
            if rank == 0 and result is not None:
                out.mkdir(parents=True, exist_ok=True)
                write_whole(out / f"{name}.json", json.dumps(result, indent=2) + "\n")
                print(out / f"{name}.json")
        subject.wait()
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()
    return 0


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _default_name(options: argparse.Namespace, checkpoint: Path) -> str:
    """A folder that the same command finds again."""
    guidance = "" if options.guidance is None else f"-cfg{options.guidance:g}"
    return re.sub(r"[^\w.-]", "_", f"{checkpoint.stem}-{options.prompts}-seed{options.seed}{guidance}")


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


# A further measurement is a row here, and its options in `parser`.
MEASUREMENTS: dict[str, Measurement] = {
    "coco": Measurement(lambda options: options.coco is not None, _check_coco, _describe_coco, _run_coco),
    "forgetting": Measurement(
        lambda options: options.forgetting is not None, _check_forgetting, _describe_forgetting, _run_forgetting
    ),
    "lm_eval": Measurement(
        lambda options: options.lm_eval is not None, _check_lm_eval, _describe_lm_eval, _run_lm_eval
    ),
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
