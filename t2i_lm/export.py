"""Weights of a trained run as files that load without Lightning: `python -m t2i_lm.export RUN --out FOLDER`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import command_parser, exit_code, out_folder

EXAMPLE = """example:
  python -m t2i_lm.export runs/text_lm/20260102-030405-demo --out my_lm
  python -m t2i_lm.export runs/text_lm --out lm_400 --step 400
  python -m t2i_lm.export runs/t2i_pretrained --out my_model --format transformers --dtype float32

A run keeps the checkpoints of trainer.keep_steps beside its newest two.
A transformers folder is for AutoModelForCausalLM.from_pretrained (extra hf). It exists for rotary decoders whose norms
and feed-forward layers a class of that library has; its logits are compared with the run's before it is written."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser(
        "export", "Export a checkpoint of a run as safetensors with a card of measured numbers.", EXAMPLE
    )
    add = arguments.add_argument
    add("run", type=Path, help="run folder, or a folder of runs, whose newest is used")
    add("--out", type=out_folder, required=True, help="folder to write")
    add("--step", type=int, metavar="N", help="the checkpoint after N optimizer steps (default: the newest)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    add("--format", choices=("native", "transformers"), default="native", help="native: as t2i_lm reads it (default)")
    add("--other-text", type=Path, metavar="TEXT", help="of a language model: measure on text of another domain too")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, measures the exported weights and writes a card; returns the exit code."""
    options = parser().parse_args(argv)

    def write() -> int:
        from t2i_lm.experiment.export import export

        card = export(options.run, options.out, options.dtype, options.format, options.other_text, options.step)
        print(json.dumps(card, indent=2))
        return 0

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
