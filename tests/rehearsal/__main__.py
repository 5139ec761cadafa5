"""`make rehearsal`: the paper's run at its exact shapes with small made-up parts, or with the user's own.

Every stage runs the commands of the README: parts, dry run, preparation, training that is killed and resumed, a Slurm
job that is requeued, samples, COCO evaluation, export, figures, report. Complete stages are not repeated.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.rehearsal.plan import ROOT, Rehearsal
from tests.rehearsal.stages import Record, StageError, minutes_left, run_stages, table

EXAMPLE = """example:
  make rehearsal
  make rehearsal ARGS="backbone.path=open_lm_1b.pt data.source=webdataset data.path=00000.tar --out runs/rehearsal_real"

keys are those of t2i_lm/config. A part whose path is not given (backbone.path, text_tokenizer.path,
image_tokenizer.path, data.path, --coco and --weights) is made up: real formats, 66,823 rows, 1,152 positions and 1,024
ids per image, but few channels and random weights."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="make rehearsal",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("--quick", action="store_true", help="12 steps and tiny parts")
    add("--out", type=Path, default=Path("runs/rehearsal"), help="folder (default: %(default)s)")
    add("--processes", type=int, help="default: one per GPU, or two on the CPU")
    add("--coco", type=Path, help="folder of COCO's val2014")
    add("--weights", type=Path, help="weights of torch-fidelity's Inception")
    add("overrides", nargs="*", metavar="key=value", help="for example backbone.path=FILE; replaces a made-up part")
    return arguments


def gpu_count() -> int:
    """GPUs that torch sees, counted by another process, so that this one stays small."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    try:
        return rehearse(options)
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def rehearse(options: argparse.Namespace) -> int:
    """Runs the stages and writes their table.

    Raises:
        StageError: naming the stage that failed.
        ValueError: if an option is wrong, or the folder is that of another rehearsal.
    """
    for value in options.overrides:
        if "=" not in value:
            raise ValueError(f"{value}: expected key=value")
    for name in ("coco", "weights"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise ValueError(f"--{name} {path}: no such file or folder")
    gpus = gpu_count()
    processes = (gpus or 2) if options.processes is None else options.processes
    if processes < 1 or (gpus and processes > gpus):
        most = f"1 to {gpus}, the GPUs of this machine" if gpus else "1 or more"
        raise ValueError(f"--processes {processes}: expected {most}")
    coco, weights = (None if path is None else path.resolve() for path in (options.coco, options.weights))
    rehearsal = Rehearsal(
        out=options.out.resolve(),
        given=tuple(options.overrides),
        quick=options.quick,
        gpus=gpus > 0,
        processes=processes,
        coco=coco,
        weights=weights,
    )
    rehearsal.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(rehearsal).items()}
    record, stages = Record.open(rehearsal.out / "rehearsal.json", settings), rehearsal.stages()
    made_up = rehearsal.parts
    device = f"{gpus} GPU(s)" if gpus else f"{os.cpu_count()} CPU cores"
    estimate = not options.quick and len(made_up) == 5 and not gpus
    cost = f"; about {minutes_left(stages, record.done)} minutes in all" if estimate else ""
    print(f"made up: {', '.join(made_up) or 'nothing'}; {processes} process(es), {device}, {platform.machine()}{cost}")
    run_stages(stages, record, ROOT, estimate)
    content = f"{table(stages, record.done)}\n\n{processes} process(es), {device}, {time.strftime('%Y-%m-%d')}\n"
    (rehearsal.out / "table.md").write_text(content, encoding="utf-8")
    print(f"\n{content}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends its command, too
    sys.exit(main())
