"""The demo's web page: a prompt and sliders, an image that fills in while its ids are sampled (the extra `demo`)."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from t2i_lm.experiment.build import ImageModel
from t2i_lm.experiment.restore import load_trained
from t2i_lm.generation.images import (
    ImageArray,
    caption_prompts,
    decode,
    generate_codes,
    require_fitting,
    sampling_of,
)
from t2i_lm.models.generate import Sampling
from t2i_lm.storage.run_folder import find_run

START = "a large red circle to the left of a small blue star on a white background"
PIXELS = 384  # side of the images on the page
UNSAMPLED = 127  # gray of the cells without an id yet
# Ranges of the sliders, which the server checks too: a request may come without the page.
RANGES = {"temperature": (0.1, 2.0), "top_p": (0.05, 1.0), "guidance": (0.0, 8.0)}
MAX_SEED, MAX_CHARACTERS = 2**53, 10_000
# Requests that may wait for the model.
MAX_WAITING = 16


def serve(checkpoint: Path, port: int) -> int:
    """Serves the page on this machine until it is stopped.

    Raises:
        ValueError: if there is no such port, gradio is not installed, or there is no trained image run.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: expected 1 to 65535")
    _gradio()
    page(load_trained(find_run(checkpoint))).launch(server_name="127.0.0.1", server_port=port)
    return 0


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install 't2i_lm[demo]'") from error
    return gradio


def page(model: ImageModel) -> Any:
    """The page as a gradio `Blocks`."""
    gradio = _gradio()
    defaults = sampling_of(model.config.samples)

    def show(prompt: str, *numbers: float | None) -> Iterator[tuple[ImageArray, ImageArray]]:
        try:
            yield from answer(model, prompt, *numbers)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    ranges = _ranges(defaults)
    # The page sends nothing to other machines.
    with gradio.Blocks(title="t2i_lm", analytics_enabled=False) as blocks:
        prompt = gradio.Textbox(START, label="prompt")
        with gradio.Row():
            seed = gradio.Number(0, label="seed", precision=0)
            temperature = gradio.Slider(*ranges["temperature"], defaults.temperature, label="temperature")
            top_p = gradio.Slider(*ranges["top_p"], defaults.top_p or 1.0, label="top-p")
            guidance = gradio.Slider(*ranges["guidance"], defaults.guidance, label="guidance (1: none)")
        button = gradio.Button("generate", variant="primary")
        with gradio.Row():
            image = gradio.Image(label="image", height=PIXELS, width=PIXELS)
            tokens = gradio.Image(label="image ids", height=PIXELS, width=PIXELS)
        inputs = [prompt, seed, temperature, top_p, guidance]
        gradio.on([button.click, prompt.submit], show, inputs, [image, tokens])
    return blocks.queue(max_size=MAX_WAITING)


def _ranges(defaults: Sampling) -> dict[str, tuple[float, float]]:
    """`RANGES`, wide enough for the run's own values."""
    own = {"temperature": defaults.temperature, "top_p": defaults.top_p or 1.0, "guidance": defaults.guidance}
    return {name: (min(least, own[name]), max(most, own[name])) for name, (least, most) in RANGES.items()}


def answer(
    model: ImageModel,
    prompt: str,
    seed: float | None,
    temperature: float | None,
    top_p: float | None,
    guidance: float | None,
) -> Iterator[tuple[ImageArray, ImageArray]]:
    """The `frames` for the values in the page's boxes; None is a cleared box.

    Raises:
        ValueError: if the prompt is empty or does not fit, a box is cleared, or its number is out of range.
    """
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"prompt: expected a text of at most {MAX_CHARACTERS:,} characters")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if seed is None or temperature is None or top_p is None or guidance is None:
        boxes = {"seed": seed, "temperature": temperature, "top-p": top_p, "guidance": guidance}
        empty = ", ".join(name for name, value in boxes.items() if value is None)
        raise ValueError(f"{empty}: expected a number, the box is empty")
    defaults = sampling_of(model.config.samples)
    for name, value in (("seed", seed), ("temperature", temperature), ("top_p", top_p), ("guidance", guidance)):
        if not isinstance(value, int | float):
            raise ValueError(f"{name}={str(value)[:40]!r}: expected a number")
        if name == "seed" and not (float(value).is_integer() and abs(value) <= MAX_SEED):
            raise ValueError(f"seed={value}: expected a whole number")
        least, most = _ranges(defaults).get(name, (-math.inf, math.inf))
        if not least <= value <= most:
            raise ValueError(f"{name}={value}: expected a value in [{least:g}, {most:g}]")
    require_fitting(model, [prompt])
    sampling = replace(defaults, temperature=temperature, top_p=top_p, guidance=guidance)
    yield from frames(model, prompt, sampling, int(seed))


def frames(model: ImageModel, prompt: str, sampling: Sampling, seed: int) -> Iterator[tuple[ImageArray, ImageArray]]:
    """The image and its grid of ids after each row of the grid, missing cells gray; the last pair is complete.

    Closed before its end, as for a tab that is gone, it stops drawing after the next id.
    """
    columns = model.image.grid[1]
    arrived: Queue[Tensor | BaseException | None] = Queue()
    closed = Event()

    def report(done: int, _: int, codes_BN: Tensor) -> None:
        if closed.is_set():
            raise InterruptedError("the page is gone")
        if done % columns == 0:
            arrived.put(codes_BN[0].cpu().clone())

    def work() -> None:
        try:
            generate_codes(
                model,
                caption_prompts(model, [prompt]),
                [seed],
                sampling,
                report,
            )
            arrived.put(None)
        except BaseException as error:  # shown by the page, not lost in a thread
            arrived.put(error)

    Thread(target=work, daemon=True).start()
    try:
        while (codes_N := arrived.get()) is not None:
            if isinstance(codes_N, BaseException):
                raise codes_N
            yield _frame(model, codes_N)
    finally:
        closed.set()


def _frame(model: ImageModel, codes_N: Tensor) -> tuple[ImageArray, ImageArray]:
    """The image of codes and their ids as colors, (PIXELS, PIXELS, 3) uint8 each; code -1 is a missing cell."""
    unsampled_hw = (codes_N < 0).view(model.image.grid).numpy()
    pixels_HWC = decode(model, codes_N.clamp(min=0)[None])[0].copy()
    cell = pixels_HWC.shape[0] // unsampled_hw.shape[0]
    pixels_HWC[np.kron(unsampled_hw, np.ones((cell, cell), bool))] = UNSAMPLED
    shades_hw = codes_N.view(model.image.grid).numpy() / max(1, model.image.vocab_size - 1)
    ids_hwC = (colormaps["turbo"](shades_hw)[..., :3] * 255).astype(np.uint8)
    ids_hwC[unsampled_hw] = UNSAMPLED
    large = [Image.fromarray(part).resize((PIXELS, PIXELS), Image.Resampling.NEAREST) for part in (pixels_HWC, ids_hwC)]
    return np.asarray(large[0]), np.asarray(large[1])
