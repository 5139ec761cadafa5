"""Images of prompts from a trained run: `python -m t2i_lm.sample --checkpoint RUN "a prompt"`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.generation.prompts import read_prompts
from t2i_lm.runtime.command_line import command_parser, exit_code, out_folder

EXAMPLE = """example:
  python -m t2i_lm.sample --checkpoint runs/t2i_pretrained "a large red circle on a white background" --each 4
  python -m t2i_lm.sample --checkpoint runs/t2i_pretrained --prompts prompts.txt --temperature 0.7 --out images

RUN is a run folder, or a folder of runs, whose newest is used. An image depends on its prompt, the seed and its number,
not on its batch; but a batch of another size may be rounded differently, above all on a GPU or with --compile, and
where two ids are nearly equally likely the other may be sampled. --cfg is meant for runs with data.caption_dropout."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser("sample", "Generate images of prompts with a trained text-to-image run.", EXAMPLE)
    add = arguments.add_argument
    add("prompt", nargs="*", help="caption of an image")
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or folder of runs")
    add("--prompts", type=Path, metavar="FILE", help="one prompt per line, after those of the command line")
    add("--each", type=int, default=1, help="images per prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--cfg", type=float, metavar="S", help="scale of classifier-free guidance; 1: none")
    add("--temperature", type=float, help="divides the logits (default: the run's)")
    add("--top-k", type=int, help="number of most likely codes to sample from (default: the run's)")
    add("--top-p", type=float, help="probability of the most likely codes to sample from (default: the run's)")
    add("--compile", action="store_true", help="compile the generation step: pays off over many images")
    add("--bf16", action="store_true", help="weights in bfloat16: faster, above all on a GPU")
    add("--out", type=out_folder, help="folder to write (default: RUN/drawn/DATE-TIME)")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one PNG per image and a captioned grid; returns the exit code."""
    options = parser().parse_intermixed_args(argv)

    def write() -> int:
        prompts = read_prompts(options.prompt, options.prompts)
        if options.each < 1:
            raise ValueError(f"--each {options.each}: expected at least 1")
        from t2i_lm.generation.image_folder import sample_run

        values = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        sampling = values | {"guidance": options.cfg}
        images = (options.checkpoint, prompts, options.each, options.seed, sampling, options.out)
        print(*sample_run(*images, bf16=options.bf16, compiled=options.compile), sep="\n")
        return 0

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
