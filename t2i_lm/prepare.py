"""Token shards of an experiment: `python -m t2i_lm.prepare EXPERIMENT.yaml`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import add_scale, command_parser, exit_code

EXAMPLE = """example:
  python -m t2i_lm.prepare experiments/t2i_pretrained.yaml --scale demo data.train_size=1000
  torchrun --nproc-per-node 8 -m t2i_lm.prepare experiments/t2i_pretrained.yaml --scale paper data.path=...

Processes share the work part by part, on the GPU of their LOCAL_RANK; an interrupted preparation continues."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser(
        "prepare", "Tokenize an experiment's data once; training runs find the shards again.", EXAMPLE
    )
    arguments.add_argument("experiment", type=Path, help="experiment YAML")
    add_scale(arguments)
    arguments.add_argument("--check", action="store_true", help="only measure the share of ids equal in bfloat16")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares an experiment's data and prints its folder and sizes; returns the exit code."""
    options = parser().parse_intermixed_args(argv)

    def write() -> int:
        from t2i_lm.config.load import load_experiment

        config = load_experiment(options.experiment, options.scale, options.overrides)
        if config.task == "image_tokenizer":
            raise ValueError("task=image_tokenizer reads its images directly; there is nothing to prepare")
        config.require_paths()
        if options.check and config.task == "text":
            raise ValueError(f"--check: task={config.task} has no images")
        from t2i_lm.experiment.shards import equality_in_bfloat16, prepared
        from t2i_lm.runtime.launch import global_rank

        text = equality_in_bfloat16(config) if options.check else prepared(config)
        if global_rank() == 0:
            print(text)
        return 0

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
