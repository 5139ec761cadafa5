"""Runs one experiment: `python -m t2i_lm.train EXPERIMENT.yaml`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.config.experiment import RESUMABLE, ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.runtime.command_line import FAILURES, add_scale

EXAMPLE = """example:
  python -m t2i_lm.train experiments/t2i_pretrained.yaml --scale demo trainer.max_steps=50
  python -m t2i_lm.train experiments/t2i_pretrained.yaml --scale demo --resume latest

keys are those of t2i_lm/config.py; `--dry-run` prints all of them resolved, and what the run would cost."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.train",
        description="Train one experiment; every run gets a folder of its own.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("experiment", type=Path, help="experiment YAML; base.yaml and scale/ lie beside it")
    add_scale(arguments)
    arguments.add_argument("--resume", metavar="RUN", help="run folder to continue, or `latest`")
    arguments.add_argument("--dry-run", action="store_true", help="print config, parameters and cost; train nothing")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Loads, prepares, trains and reports; returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    try:
        config, folder = _configure(options)
        if options.dry_run:
            from t2i_lm.experiment.dry_run import describe

            print(describe(config))
            return 0
        config.require_paths()
        from t2i_lm.training.run import run  # torch and Lightning, only once the config is known to be right

        return run(config, folder, resume=options.resume is not None)
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _configure(options: argparse.Namespace) -> tuple[ExperimentConfig, Path | None]:
    """The resolved config and the run folder: an existing one when resuming, else None."""
    if options.resume is None:
        return load_experiment(options.experiment, options.scale, options.overrides), None
    from t2i_lm.storage.run_folder import CONFIG, REPORT, run_folders

    if options.resume == "latest":
        config = load_experiment(options.experiment, options.scale, options.overrides)
        found = run_folders(Path(config.run.dir), config.name, options.scale)
        unfinished = [path for path in found if not (path / REPORT).is_file()]
        if not unfinished:
            raise ValueError(
                f"--resume latest: no unfinished run of {config.name} at scale {options.scale} in {config.run.dir}; "
                "leave --resume out to start one"
            )
        folder = unfinished[-1]
    else:
        folder = Path(options.resume)
        if (folder / REPORT).is_file():
            raise ValueError(f"--resume {folder}: this run is finished, and a finished run is never overwritten")
    saved = load_experiment(folder / CONFIG)
    resumed = load_experiment(folder / CONFIG, None, options.overrides)
    if differing := _mismatch(saved, resumed):
        raise ValueError(f"--resume {folder}: {differing} differs from the run's config.yaml; start a new run instead")
    return resumed, folder


def _mismatch(saved: ExperimentConfig, resumed: ExperimentConfig) -> str | None:
    from t2i_lm.config.load import flatten

    before, after = flatten(saved), flatten(resumed)
    for key, value in before.items():
        if after[key] != value and key not in RESUMABLE:
            return f"{key}={after[key]!r} (was {value!r})"
    return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
