"""Writes an experiment's token shards: `python -m t2i_lm.prepare`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.config.load import load_experiment
from t2i_lm.runtime.command_line import add_scale

EXAMPLE = """example:
  python -m t2i_lm.prepare experiments/t2i_pretrained.yaml --scale demo data.train_size=1000
  torchrun --nproc-per-node 8 -m t2i_lm.prepare experiments/t2i_pretrained.yaml --scale paper data.path=...

Processes share the work part by part, on the GPU that LOCAL_RANK names; what was interrupted goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares an experiment's data and says where it lies; returns the exit code."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.prepare",
        description="Tokenize an experiment's data once; training runs find the shards again.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("experiment", type=Path, help="experiment YAML")
    add_scale(arguments)
    arguments.add_argument("--check", action="store_true", help="only measure how many ids bfloat16 would leave equal")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    options = arguments.parse_intermixed_args(argv)
    try:
        config = load_experiment(options.experiment, options.scale, options.overrides)
        if config.task == "image_tokenizer":
            raise ValueError("task=image_tokenizer reads its images directly; there is nothing to prepare")
        config.require_paths()
        if options.check and config.task == "text":
            raise ValueError(f"--check: task={config.task} has no images")
        from t2i_lm.data.shards.format import read_index
        from t2i_lm.data.shards.prepare import equal_ids
        from t2i_lm.experiment.build import open_image, prepare
        from t2i_lm.runtime.devices import local_rank

        rank = local_rank()
        if options.check:
            share, ids = equal_ids(config, open_image(config, rank))
            print(f"{share:.4%} of {ids:,} ids are equal in bfloat16 and float32")
            return 0
        folder = prepare(config, rank)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    index = read_index(folder)
    assert index is not None
    print(f"{folder}  data hash {index['data_hash']}")
    for split, entry in index["splits"].items():
        print(f"  {split}: {entry['rows']:,} rows; rejected: {entry.get('rejects') or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
