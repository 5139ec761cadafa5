"""A folder of generated images: one PNG per image and a captioned grid."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from t2i_lm.experiment.build import ImageModel
from t2i_lm.experiment.restore import load_trained
from t2i_lm.generation.grid import captioned_grid
from t2i_lm.generation.images import (
    CAPTION_START,
    chosen_sampling,
    generate_images,
    prepare_generation,
    require_fitting,
    seeds_of,
)
from t2i_lm.models.generate import Sampling
from t2i_lm.storage.resumable import atomic_folder, require_new_folder
from t2i_lm.storage.run_folder import find_run, new_dated_folder, require_no_links


def sample_run(
    checkpoint: Path,
    prompts: Sequence[str],
    each: int,
    seed: int,
    sampling: Mapping[str, Any],
    out: Path | None,
    bf16: bool = False,
    compiled: bool = False,
) -> list[Path]:
    """Images of prompts from a trained run, in a folder.

    Args:
        checkpoint: a run folder, or a folder of runs, whose newest is used.
        prompts: one caption per image.
        each: images per prompt.
        seed: of the first image; the others follow from it.
        sampling: fields of `Sampling` that replace the run's; None keeps it.
        out: the folder, new or empty; None is `RUN/drawn/DATE-TIME`.
        bf16: rounds the weights to bfloat16.
        compiled: compiles the generation step.

    Returns:
        The PNG files in order, then the grid.

    Raises:
        ValueError: naming the run, the folder, the prompt or the sampling value that cannot be used.
        OSError: if the files cannot be written.
    """
    run = find_run(checkpoint)
    require_no_links(run)
    folder = out or new_dated_folder(run / "drawn")
    require_new_folder(folder)
    try:
        model = load_trained(run)
        prepare_generation(model, bf16=bf16, compiled=compiled, images=len(prompts) * each)
        return write_images(model, prompts, each, seed, chosen_sampling(model, **sampling), folder)
    finally:
        if not out:
            with suppress(OSError):  # it holds images, unless there was an error
                folder.rmdir()


def write_images(
    model: ImageModel, prompts: Sequence[str], each: int, seed: int, sampling: Sampling, out: Path
) -> list[Path]:
    """Generates `each` images per prompt and writes them into `out`, all or none.

    Returns:
        The PNG files in order, then the grid.

    Raises:
        ValueError: if a prompt does not fit.
        OSError: if the files cannot be written.
    """
    require_fitting(model, prompts)
    captions = [prompt for prompt in prompts for _ in range(each)]
    with Progress() as progress:
        task = progress.add_task(f"generating {len(captions)} images", total=None)
        images_HW3 = generate_images(
            model,
            captions,
            seeds_of(seed, len(captions)),
            sampling,
            lambda done, total, _: progress.update(task, completed=done, total=total),
        )
    names = []
    with atomic_folder(out) as folder:
        for number, (image, caption) in enumerate(zip(images_HW3, captions, strict=True)):
            slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:CAPTION_START]
            names.append(f"{number:03d}-{slug}.png" if slug else f"{number:03d}.png")
            Image.fromarray(image).save(folder / names[-1])
        names.append("grid.png")
        captioned_grid(images_HW3, captions).save(folder / names[-1])
    return [out / name for name in names]
