"""A local web page that draws from a prompt: `python -m t2i_lm.demo --checkpoint RUN` (the extra `demo`)."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from t2i_lm.experiment.build import ImageModel
    from t2i_lm.models.generate import Sampling

    ImageArray = np.ndarray[Any, np.dtype[np.uint8]]

EXAMPLE = "example: python -m t2i_lm.demo --checkpoint runs/t2i_pretrained"
START = "a large red circle to the left of a small blue star on a white background"
PIXELS = 384  # side of the images on the page
UNDRAWN = 127  # grey of what is not drawn yet


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.demo", description="A web page on this machine that draws from a prompt.", epilog=EXAMPLE
    )
    arguments.add_argument(
        "--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or folder of runs"
    )
    arguments.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until it is stopped; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ValueError("the page needs gradio: pip install 't2i_lm[demo]'") from error
        from t2i_lm.experiment.restore import load_trained
        from t2i_lm.storage.run_folder import find_run

        page(load_trained(find_run(options.checkpoint))).launch(server_name="127.0.0.1", server_port=options.port)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def page(model: "ImageModel") -> Any:
    """The page as a gradio `Blocks`."""
    import gradio

    from t2i_lm.generation.images import sampling_of

    usual = sampling_of(model.config.samples)

    def draw(prompt: str, *numbers: float | None) -> "Iterator[tuple[ImageArray, ImageArray]]":
        try:
            yield from answer(model, prompt, *numbers)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="t2i_lm") as blocks:
        prompt = gradio.Textbox(START, label="prompt")
        with gradio.Row():
            seed = gradio.Number(0, label="seed", precision=0)
            temperature = gradio.Slider(0.1, 2.0, usual.temperature, label="temperature")
            top_p = gradio.Slider(0.05, 1.0, usual.top_p or 1.0, label="top-p")
            guidance = gradio.Slider(0.0, 8.0, usual.guidance, label="guidance (1: none)")
        button = gradio.Button("draw", variant="primary")
        with gradio.Row():
            image = gradio.Image(label="picture", height=PIXELS, width=PIXELS)
            tokens = gradio.Image(label="image ids", height=PIXELS, width=PIXELS)
        inputs = [prompt, seed, temperature, top_p, guidance]
        gradio.on([button.click, prompt.submit], draw, inputs, [image, tokens])
    return blocks


def answer(
    model: "ImageModel",
    prompt: str,
    seed: float | None,
    temperature: float | None,
    top_p: float | None,
    guidance: float | None,
) -> "Iterator[tuple[ImageArray, ImageArray]]":
    """The `frames` of what the page's boxes hold; None is a cleared box.

    Raises:
        ValueError: if the prompt is empty or does not fit, a box is cleared, or a number in it is senseless.
    """
    from dataclasses import replace

    from t2i_lm.generation.images import sampling_of
    from t2i_lm.sample import require_fitting

    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if seed is None or temperature is None or top_p is None or guidance is None:
        boxes = {"seed": seed, "temperature": temperature, "top-p": top_p, "guidance": guidance}
        empty = ", ".join(name for name, value in boxes.items() if value is None)
        raise ValueError(f"{empty}: expected a number, the box is empty")
    if not float(seed).is_integer():
        raise ValueError(f"seed={seed}: expected a whole number")
    require_fitting(model, [prompt])
    usual = sampling_of(model.config.samples)
    sampling = replace(usual, temperature=temperature, top_p=top_p, guidance=guidance)
    yield from frames(model, prompt, sampling, int(seed))


def frames(
    model: "ImageModel", prompt: str, sampling: "Sampling", seed: int
) -> "Iterator[tuple[ImageArray, ImageArray]]":
    """The image and its grid of ids after every row of the grid, undrawn parts grey; the last is complete."""
    from t2i_lm.generation.images import caption_prompts, draw_codes

    columns = model.image.grid[1]
    arrived: Queue[Tensor | BaseException | None] = Queue()

    def work() -> None:
        try:
            draw_codes(
                model,
                caption_prompts(model, [prompt]),
                [seed],
                sampling,
                lambda done, _, codes_BN: arrived.put(codes_BN[0].cpu().clone()) if done % columns == 0 else None,
            )
            arrived.put(None)
        except BaseException as error:  # shown by the page, not lost in a thread
            arrived.put(error)

    Thread(target=work, daemon=True).start()
    while (codes_N := arrived.get()) is not None:
        if isinstance(codes_N, BaseException):
            raise codes_N
        yield _frame(model, codes_N)


def _frame(model: "ImageModel", codes_N: "Tensor") -> "tuple[ImageArray, ImageArray]":
    """The image of codes and their ids as colours, (PIXELS, PIXELS, 3) uint8 each; -1 is undrawn."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    from t2i_lm.generation.images import decode

    undrawn_hw = (codes_N < 0).view(model.image.grid).numpy()
    pixels_HWC = decode(model, codes_N.clamp(min=0)[None])[0].copy()
    cell = pixels_HWC.shape[0] // undrawn_hw.shape[0]
    pixels_HWC[np.kron(undrawn_hw, np.ones((cell, cell), bool))] = UNDRAWN
    shades_hw = codes_N.view(model.image.grid).numpy() / max(1, model.image.vocab_size - 1)
    ids_hwC = (colormaps["turbo"](shades_hw)[..., :3] * 255).astype(np.uint8)
    ids_hwC[undrawn_hw] = UNDRAWN
    large = [Image.fromarray(part).resize((PIXELS, PIXELS), Image.Resampling.NEAREST) for part in (pixels_HWC, ids_hwC)]
    return np.asarray(large[0]), np.asarray(large[1])


if __name__ == "__main__":
    sys.exit(main())
