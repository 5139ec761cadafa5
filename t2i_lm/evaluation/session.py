"""One evaluation of a finished run: its model is loaded once, and every evaluator writes one JSON file."""

import argparse
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.evaluation.base import FINISHED, EvaluationContext, Evaluator, read_result
from t2i_lm.experiment.restore import image_config, load_trained, newest_checkpoint
from t2i_lm.runtime import progress
from t2i_lm.runtime.launch import global_rank, world_size
from t2i_lm.runtime.rank_beats import Limits
from t2i_lm.runtime.rank_watch import RankWatch
from t2i_lm.runtime.threads import default_threads
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.run_folder import require_no_links
from t2i_lm.storage.sealed import sealed
from t2i_lm.storage.writing import write_atomic

# Ranks wait for the slowest, which may have one more part to generate.
PATIENCE = timedelta(days=2)


def evaluate(run: Path, evaluators: Mapping[str, Evaluator], options: argparse.Namespace) -> None:
    """Writes OUT/NAME.json for each evaluator and prints its path; with `--dry-run`, describes the evaluation only.

    Args:
        run: the run folder.
        evaluators: by name, in the order in which they run.
        options: of the command line.

    Raises:
        ValueError: if the run has no whole checkpoint, or a result of other settings would be overwritten.
    """
    rank, world = global_rank(), world_size()
    if world > 1 and "RANK" not in os.environ:
        raise ValueError("several tasks of srun share an evaluation through torchrun: srun torchrun ..., see --help")
    require_no_links(run)
    config, checkpoint = image_config(run), newest_checkpoint(run)
    out = options.out or run / "evaluations" / default_name(options, checkpoint)
    sha256 = file_sha256(checkpoint)
    made_with = {
        name: {"checkpoint_sha256": sha256, **evaluator.identity(config)} for name, evaluator in evaluators.items()
    }
    for name, settings in made_with.items():
        _require_replaceable(out / f"{name}.json", settings)
    if options.dry_run:
        print(f"measure {checkpoint}, write to {out}")
        print(*(evaluator.describe() for evaluator in evaluators.values()), sep="\n")
        return
    with _watch(rank, world, config) if world > 1 else nullcontext():
        model = load_trained(run, checkpoint)
        torch.set_num_threads(model.config.trainer.threads or default_threads())
        context = EvaluationContext(run, checkpoint, sha256, model, out, rank, world)
        if world > 1:
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        try:
            for name, evaluator in evaluators.items():
                result = evaluator.run(context)
                if rank == 0 and result is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    finished = time.strftime("%Y-%m-%dT%H:%M:%S")
                    content = sealed({**result, "made_with": made_with[name], FINISHED: finished})
                    write_atomic(out / f"{name}.json", json.dumps(content, indent=2) + "\n")
                    print(out / f"{name}.json")
            context.wait()
        finally:
            if world > 1:
                torch.distributed.destroy_process_group()


def _watch(rank: int, world: int, config: ExperimentConfig) -> AbstractContextManager[object]:
    """The watch over the ranks: one that dies or stops ends the evaluation on all of them."""
    watch = RankWatch(rank, world, Limits(config.trainer.rank_timeout, PATIENCE.total_seconds()))
    watch.advice = lambda: "The same command continues the evaluation"
    progress.listeners[:] = [watch.moved]
    watch.open(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    watch.enter("evaluating")
    return watch


def default_name(options: argparse.Namespace, checkpoint: Path) -> str:
    """The result folder's name without `--out`: the same for the same command, which continues in it."""
    guidance = "" if options.guidance is None else f"-cfg{options.guidance:g}"
    weights = "-bf16" * options.bf16 + "-compiled" * options.compile
    return re.sub(r"[^\w.-]", "_", f"{checkpoint.stem}-{options.prompts}-seed{options.seed}{guidance}{weights}")


def _require_replaceable(file: Path, settings: dict[str, Any]) -> None:
    """Refuses to overwrite a result produced with different settings.

    Raises:
        ValueError: naming the settings that differ, or the file if it is damaged.
    """
    if not file.is_file():
        return
    content = read_result(file)
    try:
        # COCO results of earlier versions have these settings in their card.
        earlier = content.get("made_with") or {**content, **content["card"]}
        differing = [key for key, value in settings.items() if earlier.get(key) != value]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not name its settings; give another folder: --out FOLDER") from error
    if differing:
        values = "; ".join(f"{key}={earlier.get(key)!r}, now {settings[key]!r}" for key in differing)
        raise ValueError(f"{file} holds a result of other settings ({values}); give another folder: --out FOLDER")
