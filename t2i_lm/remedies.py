"""Trains the pre-trained arm and every remedy against forgetting, and draws them: `python -m t2i_lm.remedies`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.runtime.command_line import FAILURES, NO_SAMPLES, add_jobs, add_scale
from t2i_lm.training.jobs import Job, run_jobs, unfinished

EXAMPLE = """example:
  python -m t2i_lm.remedies --text heldout.txt.gz --replay books.txt.gz --jobs 2 trainer.max_steps=1000
  python -m t2i_lm.remedies --text heldout.txt.gz --only l2_sp --only distil trainer.max_steps=200

an arm that is finished with an equal config is not trained again, one that was stopped goes on. No images are drawn,
unless asked for (samples.prompts=64)."""
BASE = Path("experiments/t2i_pretrained.yaml")
FOLDER = "remedies"  # beside the base experiment


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.remedies",
        description="Train text-to-image from the language model, untouched and with each remedy; draw what it kept.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--text", required=True, metavar="PATH", help="held-out text that forgetting is measured on")
    arguments.add_argument("--replay", metavar="PATH", help="text to replay; without it those remedies are left out")
    arguments.add_argument("--tasks", metavar="FOLDER", help="questions, NAME.jsonl[.gz], that are asked too")
    arguments.add_argument("--only", action="append", metavar="NAME", help="only this remedy; may be repeated")
    add_scale(arguments)
    add_jobs(arguments)
    arguments.add_argument("--out", type=Path, default=Path("figures"), help="where to draw (default: %(default)s)")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be trained; train nothing")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="for every arm")
    return arguments


def experiments(options: argparse.Namespace, base: Path = BASE) -> list[ExperimentConfig]:
    """The arms to train, checked, the untouched one first.

    Raises:
        ValueError: on an unknown remedy, key or value.
    """
    files = {file.stem: file for file in sorted((base.parent / FOLDER).glob("*.yaml"))}
    if not files:
        raise ValueError(f"no remedies in {base.parent / FOLDER}")
    if options.replay is not None and Path(options.replay).resolve() == Path(options.text).resolve():
        raise ValueError(f"--replay {options.replay}: this is the text that --text measures on; give another one")
    for name in options.only or ():
        if name not in files:
            raise ValueError(f"--only {name}: expected one of {', '.join(files)}")
    chosen = [base, *(file for name, file in files.items() if not options.only or name in options.only)]
    overrides = [*NO_SAMPLES, f"forgetting.text={options.text}"]
    overrides += [f"forgetting.tasks={options.tasks}"] if options.tasks else []
    overrides += [f"data.replay_path={options.replay}"] if options.replay else []
    # As often as the run is validated, unless it says otherwise.
    often = load_experiment(base, options.scale, [*overrides, *options.overrides])
    overrides.append(f"forgetting.interval={often.forgetting.interval or often.trainer.val_check_interval}")
    configs = [load_experiment(file, options.scale, [*overrides, *options.overrides]) for file in chosen]
    for config in list(configs):
        if config.data.replayed and config.data.replay_path is None:
            missing = "it replays text: --replay PATH"
        elif config.lora.rank and find_spec("peft") is None:
            missing = "it needs peft: pip install 't2i_lm[lora]'"
        else:
            continue
        print(f"left out: {config.name} ({missing})")
        configs.remove(config)
    return configs


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and draws; returns the exit code of the first that failed, or 0."""
    options = parser().parse_intermixed_args(argv)
    try:
        configs = experiments(options)
        for config in configs:
            config.require_paths()
        jobs = unfinished([Job(config) for config in configs])
        if options.dry_run:
            print(*(f"== {job.name}" for job in jobs), sep="\n")
            return 0
        if code := run_jobs(jobs, options.jobs):
            return code
        from t2i_lm.figures import main as draw

        figures = ["--figure", "remedies", "--figure", "forgetting"]
        return draw([*figures, "--runs", configs[0].run.dir, "--out", str(options.out)])
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
