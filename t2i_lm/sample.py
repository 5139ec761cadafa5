"""Draws images of prompts with a trained run: `python -m t2i_lm.sample --checkpoint RUN "a prompt"`."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i_lm.experiment.build import ImageModel
    from t2i_lm.models.generate import Sampling

EXAMPLE = """example:
  python -m t2i_lm.sample --checkpoint runs/t2i_pretrained "a large red circle on a white background" --each 4
  python -m t2i_lm.sample --checkpoint runs/t2i_pretrained --prompts prompts.txt --temperature 0.7 --out drawn

RUN is a run folder, or a folder of runs, whose newest is taken. An image depends on its prompt, the seed and its
number, not on what is drawn beside it; but sums over another number of images may be rounded differently, above all
on a GPU or with --compile, and an id of two nearly equally likely ones is then another. --cfg needs a run trained with
data.caption_dropout above 0."""
SLUG = 40  # characters of a prompt in its file's name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.sample",
        description="Draw images of prompts with a trained text-to-image run.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("prompt", nargs="*", help="what to draw")
    arguments.add_argument(
        "--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or folder of runs"
    )
    arguments.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, after those given")
    arguments.add_argument("--each", type=int, default=1, help="images of each prompt (default: %(default)s)")
    arguments.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments.add_argument("--cfg", type=float, metavar="S", help="scale of classifier-free guidance; 1: none")
    arguments.add_argument("--temperature", type=float, help="divides the logits (default: the run's)")
    arguments.add_argument("--top-k", type=int, help="codes kept at each step (default: the run's)")
    arguments.add_argument("--top-p", type=float, help="probability kept at each step (default: the run's)")
    arguments.add_argument("--compile", action="store_true", help="compile the drawing step: pays for many images")
    arguments.add_argument("--bf16", action="store_true", help="weights in bfloat16: faster, above all on a GPU")
    arguments.add_argument("--out", type=Path, help="folder to write (default: RUN/drawn/DATE-TIME)")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Draws, writes one PNG an image and a captioned grid; returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    try:
        prompts = read_prompts(options.prompt, options.prompts)
        if options.each < 1:
            raise ValueError(f"--each {options.each}: expected at least 1")
        from t2i_lm.experiment.restore import load_trained
        from t2i_lm.generation.images import prepare_drawing
        from t2i_lm.storage.run_folder import find_run

        run = find_run(options.checkpoint)
        out = options.out or run / "drawn" / time.strftime("%Y%m%d-%H%M%S")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: exists and is not an empty folder; nothing is overwritten")
        model = load_trained(run)
        prepare_drawing(model, bf16=options.bf16, compiled=options.compile)
        files = sample(model, prompts, options.each, options.seed, chosen_sampling(model, options), out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*files, sep="\n")
    return 0


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of a file; empty lines of it are skipped.

    Raises:
        ValueError: if there are none, or one given is empty.
    """
    prompts = list(given)
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--prompts {file}: no such file")
        prompts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError('nothing to draw: give a prompt, for example "a small green star", or --prompts FILE')
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    return prompts


def chosen_sampling(model: "ImageModel", options: argparse.Namespace) -> "Sampling":
    """The run's sampling with what the command line changes.

    Raises:
        ValueError: on a senseless value.
    """
    from dataclasses import replace

    from t2i_lm.generation.images import sampling_of

    named = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "guidance": options.cfg,
    }
    sampling = replace(sampling_of(model.config.samples), **{k: v for k, v in named.items() if v is not None})
    if sampling.guidance != 1 and not model.config.data.caption_dropout:
        print(
            "note: this run was trained with data.caption_dropout=0, so guidance leads away from an empty caption that "
            "the model has never seen",
            file=sys.stderr,
        )
    return sampling


def require_fitting(model: "ImageModel", prompts: Sequence[str]) -> None:
    """Checks that every prompt is whole in the sequence.

    Raises:
        ValueError: if the model takes no captions, or naming the first prompt that is too long.
    """
    from t2i_lm.generation.images import caption_layout

    layout, text = caption_layout(model)
    for prompt in prompts:
        ids = len(text.encode(prompt))
        if ids > layout.text_budget:
            raise ValueError(f"prompt {prompt[:SLUG]!r}...: {ids} ids, but at most {layout.text_budget} fit")


def sample(
    model: "ImageModel", prompts: Sequence[str], each: int, seed: int, sampling: "Sampling", out: Path
) -> list[Path]:
    """Draws `each` images of every prompt and writes them into `out`, all or none.

    Returns:
        The files: one PNG an image, then the grid.

    Raises:
        ValueError: if a prompt does not fit.
        OSError: if the files cannot be written.
    """
    from PIL import Image
    from rich.progress import Progress

    from t2i_lm.generation.grid import captioned_grid
    from t2i_lm.generation.images import draw_captions, seeds_of
    from t2i_lm.storage.resumable import atomic_folder

    require_fitting(model, prompts)
    captions = [prompt for prompt in prompts for _ in range(each)]
    with Progress() as progress:
        task = progress.add_task(f"drawing {len(captions)} images", total=None)
        images_HW3 = draw_captions(
            model,
            captions,
            seeds_of(seed, len(captions)),
            sampling,
            lambda done, total, _: progress.update(task, completed=done, total=total),
        )
    names = []
    with atomic_folder(out) as folder:
        for number, (image, caption) in enumerate(zip(images_HW3, captions, strict=True)):
            slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:SLUG]
            names.append(f"{number:03d}-{slug}.png")
            Image.fromarray(image).save(folder / names[-1])
        names.append("grid.png")
        captioned_grid(images_HW3, captions).save(folder / names[-1])
    return [out / name for name in names]


if __name__ == "__main__":
    sys.exit(main())
