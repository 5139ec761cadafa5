"""Measures a finished run: `python -m t2i_lm.evaluate --checkpoint RUN`, `--coco`, `--forgetting` or `--lm-eval`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2i_lm.evaluation.measurements import MEASUREMENTS, Measurement
from t2i_lm.evaluation.protocol_card import HEADLINE
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.run_folder import find_run

EXAMPLE = """example:
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --coco coco --weights inception.pth
  torchrun --nproc-per-node 8 -m t2i_lm.evaluate --checkpoint RUN --coco coco --weights FILE --prompts 10000 --cfg 3
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --forgetting heldout.txt.gz --tasks questions
  python -m t2i_lm.evaluate --checkpoint runs/t2i_pretrained --lm-eval hellaswag,mmlu --lm-eval-limit 200

RUN is a run folder, or a folder of runs, whose newest is taken. PATH holds annotations/captions_val2014.json and
val2014/*.jpg. FILE is torch-fidelity's weights-inception-2015-12-05-6726825d.pth (its release v0.2.0), or
hf://ORG/NAME/FILE[#sha256=HEX]. The same command again continues what was interrupted; a result of other settings is
never replaced, so these need an --out of their own. TEXT is a .txt or .txt.gz file of documents, a folder of them, or
a Hugging Face dataset, NAME[:SPLIT], column text; other settings of forgetting are the run's. Every number carries its
protocol card, and only the canonical one is called COCO FID-30k. Captions too long for the run's data.length are cut
as in training and counted in the card. Distances to few images are biased upwards: compare equal --prompts only.
TASKS are lm-evaluation-harness' names (tasks, groups, tags), separated by commas."""

# Options that say nothing without another.
BELONGS = {
    "clip": "coco",
    "bf16": "coco",
    "tasks": "forgetting",
    "rows": "forgetting",
    "length": "forgetting",
    "questions": "tasks",
    "lm_eval_limit": "lm_eval",
    "lm_eval_tasks": "lm_eval",
    "lm_eval_all_rows": "lm_eval",
    "no_before": "lm_eval",
}


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
    add(
        "--clip", metavar="MODEL", help="with --coco: also the CLIP score, by a CLIP folder or hf://ORG/NAME[@REVISION]"
    )
    add("--prompts", type=int, default=30_000, metavar="N", help="captions, one an image (default: %(default)s)")
    add("--forgetting", metavar="TEXT", help="held-out text: measure what is left of the language model")
    add("--tasks", type=Path, metavar="FOLDER", help="with --forgetting: questions, NAME.jsonl[.gz]")
    add("--rows", type=int, metavar="N", help="with --forgetting: rows of TEXT (default: the run's forgetting.rows)")
    add("--length", type=int, metavar="N", help="with --forgetting: ids of a row (default: the run's)")
    add("--questions", type=int, metavar="N", help="with --tasks: questions of each task (default: the run's)")
    add("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, before training and after (extra lm-eval)")
    add("--lm-eval-tasks", type=Path, metavar="FOLDER", help="with --lm-eval: your own tasks, YAML; their code is run")
    add("--lm-eval-limit", type=int, metavar="N", help="with --lm-eval: questions of each task (default: all)")
    add("--lm-eval-all-rows", action="store_true", help="with --lm-eval: over image rows too, not the text rows alone")
    add("--no-before", action="store_true", help="with --lm-eval: leave out the model before training")
    add("--guidance", "--cfg", type=float, metavar="S", help="scale of classifier-free guidance (default: the run's)")
    add("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    add("--compile", action="store_true", help=f"compile the drawing step; nearly tied ids may differ: no {HEADLINE}")
    add("--bf16", action="store_true", help=f"with --coco alone: draw with weights in bfloat16: no {HEADLINE}")
    add("--no-floor", action="store_true", help="leave out the reconstruction FID of the tokenizer")
    add("--canonical", action="store_true", help=f"refuse to measure anything that is not {HEADLINE}")
    add("--pictures", action="store_true", help="also write every drawn image as PNG")
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
        if options.bf16 and len(wanted) > 1:
            raise ValueError("--bf16 rounds the weights for all that follows: measure the rest in a command of its own")
        given = {name: row.check(options) for name, row in wanted.items()}
        return _measure(options, wanted, given, find_run(options.checkpoint))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(options: argparse.Namespace, wanted: dict[str, Measurement], given: dict[str, Any], run: Path) -> int:
    import torch

    from t2i_lm.evaluation.base import EvaluationContext
    from t2i_lm.experiment.restore import image_config, load_trained, newest_checkpoint
    from t2i_lm.generation.images import prepare_drawing
    from t2i_lm.runtime.devices import global_rank, world_size
    from t2i_lm.storage.resumable import write_atomic

    rank, world = global_rank(), world_size()
    if world > 1 and "RANK" not in os.environ:
        raise ValueError("several tasks of srun share an evaluation through torchrun: srun torchrun ..., see --help")
    config, checkpoint = image_config(run), newest_checkpoint(run)
    out = options.out or run / "evaluations" / _default_name(options, checkpoint)
    sha256 = {"checkpoint_sha256": file_sha256(checkpoint)}
    made_with = {name: sha256 | row.made_with(options, given[name], config) for name, row in wanted.items()}
    for name in wanted:
        _require_replaceable(out / f"{name}.json", made_with[name])
    if options.dry_run:
        print(f"measure {checkpoint}, write to {out}")
        print(*(row.describe(options, given[name]) for name, row in wanted.items()), sep="\n")
        return 0
    model = load_trained(run, checkpoint)
    torch.set_num_threads(model.config.trainer.threads or torch.get_num_threads())
    prepare_drawing(model, bf16=options.bf16, compiled=options.compile)
    subject = EvaluationContext(options, run, checkpoint, model, out, rank, world)
    if world > 1:
        from datetime import timedelta

        # Ranks wait for the slowest, which may have a part more to draw.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
    try:
        for name, row in wanted.items():
            result = row.run(subject, given[name])
            if rank == 0 and result is not None:
                out.mkdir(parents=True, exist_ok=True)
                content = {**result, "made_with": made_with[name]}
                write_atomic(out / f"{name}.json", json.dumps(content, indent=2) + "\n")
                print(out / f"{name}.json")
        subject.wait()
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()
    return 0


def _require_replaceable(file: Path, asked: dict[str, Any]) -> None:
    """Lets only a result be replaced that was made with what is asked for now.

    Raises:
        ValueError: if there is another one, naming what differs.
    """
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        # COCO results of earlier versions say it in their card.
        made = found.get("made_with") or {**found, **found["card"]}
        differing = [key for key, value in asked.items() if made.get(key) != value]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not say what it was made with; give another folder: --out FOLDER") from error
    if differing:
        said = "; ".join(f"{key}={made.get(key)!r}, now {asked[key]!r}" for key in differing)
        raise ValueError(f"{file} holds another result ({said}); give another folder: --out FOLDER")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _default_name(options: argparse.Namespace, checkpoint: Path) -> str:
    """A folder that the same command finds again."""
    guidance = "" if options.guidance is None else f"-cfg{options.guidance:g}"
    weights = "-bf16" * options.bf16 + "-compiled" * options.compile
    return re.sub(r"[^\w.-]", "_", f"{checkpoint.stem}-{options.prompts}-seed{options.seed}{guidance}{weights}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
