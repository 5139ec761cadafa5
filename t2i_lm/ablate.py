"""Trains an experiment with parameters frozen, or all arms of Figure 5: `python -m t2i_lm.ablate --freeze ffn`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.models.freeze import EXPERT_GROUPS, FREEZE_GROUPS, TUNE_SETS
from t2i_lm.plots.groups import FIGURE5
from t2i_lm.runtime.command_line import add_jobs, add_scale, add_strict, command_parser, exit_code, out_folder
from t2i_lm.training.ablation import DEFAULT, ablated_experiments
from t2i_lm.training.jobs import Job, run_jobs, train_and_draw, unfinished

EXAMPLE = f"""example:
  python -m t2i_lm.ablate --freeze ffn --freeze norm
  python -m t2i_lm.ablate --tune first_half experiments/uncond_pretrained.yaml --scale demo
  python -m t2i_lm.ablate --all --jobs 2

groups for --freeze (of overlapping groups, the union): {", ".join(FREEZE_GROUPS)};
with modality_experts=true also {", ".join(EXPERT_GROUPS)}
sets for --tune (those of the paper; everything else is frozen): {", ".join(TUNE_SETS)}

with --all, an arm with a finished run of the same config is not trained again, an interrupted one resumes; --freeze and
--tune always train a new run."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser("ablate", "Train an experiment with some of its parameters frozen.", EXAMPLE)
    add_scale(arguments)
    choice = arguments.add_mutually_exclusive_group(required=True)
    choice.add_argument("--freeze", action="append", metavar="GROUP", help="freeze this group; may be repeated")
    choice.add_argument("--tune", metavar="SET", help="tune this set and freeze the rest")
    choice.add_argument("--all", action="store_true", help="train the six arms of Figure 5 and draw it")
    add_jobs(arguments)
    arguments.add_argument("--out", type=out_folder, default="figures", help="with --all: folder of Figure 5")
    add_strict(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="print configs and costs; train nothing")
    arguments.add_argument("rest", nargs="*", metavar="EXPERIMENT.yaml key=value", help=f"default: {DEFAULT}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, with --all the remaining arms, and draws these; returns the exit code of the first failure, or 0."""
    options = parser().parse_intermixed_args(argv)

    def body() -> int:
        def draw() -> int:
            from t2i_lm.plots.catalogue import Request, write_figures

            return write_figures(Request(Path(configs[0].run.dir), strict=options.strict), options.out, ["5"])

        arms = FIGURE5.experiments.values()
        configs = ablated_experiments(options.rest, options.scale, options.freeze, options.tune, arms)
        jobs = [Job(config) for config in configs]
        remaining = unfinished(jobs) if options.all else jobs
        if options.dry_run:
            from t2i_lm.experiment.dry_run import describe

            print(*(describe(job.config) for job in remaining), sep="\n")
            return 0
        return train_and_draw(jobs, remaining, options.jobs, draw) if options.all else run_jobs(jobs, options.jobs)

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
