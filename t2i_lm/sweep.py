"""The same arms at several values of a key, such as a learning rate for each arm: `python -m t2i_lm.sweep`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from t2i_lm.config.load import flatten, load_experiment
from t2i_lm.config.sections import RunConfig
from t2i_lm.runtime.command_line import FAILURES, NO_SAMPLES, add_jobs, add_scale
from t2i_lm.training.jobs import Job, find_equal_run, run_jobs, unfinished

EXAMPLE = """example:
  python -m t2i_lm.sweep optim.lr=1.5e-3,3e-3,6e-3 --jobs 2
  python -m t2i_lm.sweep seed=0,1,2 --jobs 2
  python -m t2i_lm.sweep optim.lr=3e-3,6e-3 seed=0,1,2 --arm t2i_pretrained --arm t2i_scratch --arm t2i_shuffled

Values of a key are separated by commas. One key is swept; several values of `seed` beside it give a range, and alone
means and standard deviations. What is finished with an equal config is not trained again, what was stopped goes on.
The runs are kept in RUN.DIR/sweep."""
FOLDER = Path("experiments")
ARMS = ("t2i_pretrained", "t2i_scratch")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.sweep",
        description="Train arms at several values of a key, and draw their held-out losses against it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "--arm", action="append", metavar="NAME", help=f"experiment; may be repeated (default: {', '.join(ARMS)})"
    )
    add_scale(arguments)
    add_jobs(arguments)
    arguments.add_argument("--out", type=Path, default=Path("figures"), help="where to draw (default: %(default)s)")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be trained; train nothing")
    arguments.add_argument("keys", nargs="*", metavar="key=value[,value...]", help="swept, or for every run")
    return arguments


def split_keys(keys: Sequence[str]) -> tuple[str, dict[str, list[str]], list[str]]:
    """The swept key, the values of all keys that have several, and what every run has.

    Raises:
        ValueError: if not one key beside `seed` has several values.
    """
    several, fixed = dict[str, list[str]](), list[str]()
    for item in keys:
        key, _, text = item.partition("=")
        values = [value for value in text.split(",") if value]
        if len(values) > 1 and not text.startswith(("[", "{", '"', "'")):
            several[key] = list(dict.fromkeys(values))
        else:
            fixed.append(item)
    swept = [key for key in several if key != "seed"] or list(several)
    if len(swept) != 1:
        given = f"{' and '.join(swept)} have several values" if swept else "no key has several values"
        raise ValueError(f"{given}: expected one that has, such as optim.lr=3e-3,6e-3, and seed beside it")
    return swept[0], several, fixed


def planned(options: argparse.Namespace, folder: Path = FOLDER) -> tuple[str, dict[tuple[str, ...], Job]]:
    """The swept key, and a run for each (arm, value, other values ...).

    Raises:
        ValueError: on an unknown arm, key or value.
    """
    key, several, fixed = split_keys(options.keys)
    order = [key, *(other for other in several if other != key)]
    jobs: dict[tuple[str, ...], Job] = {}
    seen: list[dict[str, object]] = []
    for arm, *values in product(dict.fromkeys(options.arm or ARMS), *(several[name] for name in order)):
        file = folder / f"{arm}.yaml"
        if not file.is_file():
            known = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "base")
            raise ValueError(f"--arm {arm}: expected one of {', '.join(known)}")
        chosen = [f"{name}={value}" for name, value in zip(order, values, strict=True)]
        config = load_experiment(file, options.scale, [*NO_SAMPLES, *fixed, *chosen])
        config = replace(config, run=RunConfig(str(Path(config.run.dir) / "sweep")))
        config.require_paths()
        if config.task not in ("text_to_image", "unconditional", "text"):
            raise ValueError(f"--arm {arm}: task={config.task} has no loss of text or image tokens")
        if (settings := flatten(config)) in seen:
            raise ValueError(f"{' '.join(chosen)}: two of the values given are the same")
        seen.append(settings)
        jobs[arm, *values] = Job(config, label=" ".join(chosen))
    return key, jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and draws; returns the exit code of the first that failed, or 0."""
    options = parser().parse_intermixed_args(argv)
    try:
        key, jobs = planned(options)
        missing = unfinished(list(jobs.values()))
        if options.dry_run:
            print(*(f"== {job.name}" for job in missing), sep="\n")
            return 0
        failed = run_jobs(missing, options.jobs, keep_going=True)
        if failed > 128:  # stopped by a signal
            return failed
        from t2i_lm.plots.panels import save_figure
        from t2i_lm.plots.sweep import Outcome, draw_sweep, sweep_caption, sweep_table
        from t2i_lm.storage.run_folder import read_run

        outcomes = []
        for (arm, value, *_), job in jobs.items():
            found, finished = find_equal_run(job.config)
            if found is None or not finished:
                print(f"not drawn: {job.name} has not finished", file=sys.stderr)
                continue
            outcomes.append(Outcome(arm.removeprefix("t2i_"), value, read_run(found)))
        if not outcomes:
            return failed
        caption = sweep_caption(key, outcomes)
        stem = options.out / f"figure_sweep_{key.replace('.', '_')}"
        for path in save_figure(draw_sweep(key, outcomes, caption), stem, f"Sweep of {key}", caption):
            print(path)
        print(f"\n{sweep_table(key, outcomes)}")
        return failed
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
