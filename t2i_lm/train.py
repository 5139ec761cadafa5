"""Trains one experiment: `python -m t2i_lm.train EXPERIMENT.yaml`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import add_scale, command_parser, exit_code
from t2i_lm.runtime.launch import require_launched
from t2i_lm.training.resume import chosen_experiment, resumed_run

EXAMPLE = """example:
  python -m t2i_lm.train experiments/t2i_pretrained.yaml --scale demo trainer.max_steps=50
  python -m t2i_lm.train experiments/t2i_pretrained.yaml --scale demo --resume latest

keys are those of t2i_lm/config; `--dry-run` prints all of them resolved, and the run's cost. The config.yaml of a run
trains a new one of its values and scale."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser("train", "Train one experiment; every run gets its own folder.", EXAMPLE)
    arguments.add_argument("experiment", type=Path, help="experiment YAML; base.yaml and scale/ lie beside it")
    add_scale(arguments)
    arguments.add_argument("--resume", metavar="RUN", help="run folder to continue, or `latest`")
    arguments.add_argument(
        "--allow-mismatch",
        metavar="KEY",
        action="append",
        default=[],
        help="with --resume: a config key, or a hash of env.json, that may differ from the run's; may be repeated",
    )
    arguments.add_argument("--dry-run", action="store_true", help="print config, parameters and cost; train nothing")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares, trains and reports; returns the exit code."""
    options = parser().parse_intermixed_args(argv)

    def body() -> int:
        arguments, folder = (options.experiment, options.scale, options.overrides), None
        allowed = tuple(options.allow_mismatch)
        if options.resume is not None:
            config, folder = resumed_run(options.resume, *arguments, allowed)
        elif allowed:
            raise ValueError(f"--allow-mismatch {allowed[0]}: is for --resume; a new run has nothing to differ from")
        else:
            config = chosen_experiment(*arguments)
        if options.dry_run:
            from t2i_lm.experiment.dry_run import describe

            print(describe(config))
            return 0
        require_launched(config.trainer)
        config.require_paths()
        from t2i_lm.training.run import run  # imports torch and Lightning, after the config is checked

        return run(config, folder, allowed)

    return exit_code(body)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
