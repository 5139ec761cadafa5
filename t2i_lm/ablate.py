"""Trains with parts frozen, or all arms of Figure 5: `python -m t2i_lm.ablate --freeze ffn`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.models.freeze import FREEZE_GROUPS, TUNE_SETS
from t2i_lm.plots.groups import FIGURE5
from t2i_lm.runtime.command_line import FAILURES, add_jobs, add_scale
from t2i_lm.training.jobs import Job, run_jobs

EXAMPLE = f"""example:
  python -m t2i_lm.ablate --freeze ffn --freeze norm
  python -m t2i_lm.ablate --tune first_half experiments/uncond_pretrained.yaml --scale demo
  python -m t2i_lm.ablate --all --jobs 2

groups to freeze (exactly those named; of groups that overlap, the union): {", ".join(FREEZE_GROUPS)}
sets to tune (the paper's; everything else is frozen): {", ".join(TUNE_SETS)}"""
DEFAULT = Path("experiments/uncond_pretrained.yaml")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.ablate",
        description="Train an experiment with some of its parameters frozen.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_scale(arguments)
    what = arguments.add_mutually_exclusive_group(required=True)
    what.add_argument("--freeze", action="append", metavar="GROUP", help="freeze this group; may be repeated")
    what.add_argument("--tune", metavar="SET", help="tune this set and freeze the rest")
    what.add_argument("--all", action="store_true", help="run the six arms of Figure 5 and draw it")
    add_jobs(arguments)
    arguments.add_argument("--out", type=Path, default=Path("figures"), help="of --all: where Figure 5 is written")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be trained; train nothing")
    arguments.add_argument(
        "rest",
        nargs="*",
        metavar="EXPERIMENT.yaml key=value",
        help=f"default: {DEFAULT}; for example trainer.max_steps=99",
    )
    return arguments


def experiments(options: argparse.Namespace) -> list[ExperimentConfig]:
    """The experiments to run, checked.

    Raises:
        ValueError: on an unknown group, set, key or value.
    """
    files = [item for item in options.rest if "=" not in item]
    overrides = [item for item in options.rest if "=" in item]
    if len(files) > 1:
        raise ValueError(f"one experiment at a time, got {' and '.join(files)}")
    path = Path(files[0]) if files else DEFAULT
    if options.all:
        arms = [path.with_name(f"{name}.yaml") for name in FIGURE5.experiments.values()]
        return [load_experiment(arm, options.scale, overrides) for arm in arms]
    if options.freeze:
        for group in options.freeze:
            if group not in FREEZE_GROUPS:
                raise ValueError(f"--freeze {group}: expected one of {', '.join(FREEZE_GROUPS)}")
        groups = list(dict.fromkeys(options.freeze))
        chosen = [f"freeze=[{','.join(groups)}]", "tune=all"]
        suffix = f"freeze_{'_'.join(groups)}"
    else:
        if options.tune not in TUNE_SETS:
            raise ValueError(f"--tune {options.tune}: expected one of {', '.join(TUNE_SETS)}")
        chosen, suffix = [f"tune={options.tune}", "freeze=[]"], f"tune_{options.tune}"
    name = load_experiment(path, options.scale, overrides).name
    return [load_experiment(path, options.scale, [*overrides, *chosen, f"name={name}_{suffix}"])]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for; returns the exit code of the first that failed, or 0."""
    options = parser().parse_intermixed_args(argv)
    try:
        configs = experiments(options)
        if options.dry_run:
            from t2i_lm.experiment.dry_run import describe

            for config in configs:
                print(describe(config))
            return 0
        for config in configs:
            config.require_paths()
        if code := run_jobs([Job(config) for config in configs], options.jobs):
            return code
        if options.all:
            from t2i_lm.figures import main as draw

            return draw(["--figure", "5", "--runs", configs[0].run.dir, "--out", str(options.out)])
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
