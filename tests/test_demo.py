"""The web page's frames, and the page itself where gradio is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_lm.demo import main
from t2i_lm.experiment.restore import load_trained
from t2i_lm.generation.images import generate_images
from t2i_lm.generation.web_page import PIXELS, UNSAMPLED, answer, frames, page
from t2i_lm.models.generate import Sampling
from t2i_lm.storage.run_folder import Run
from tests.runs import PROMPT


@pytest.fixture
def run(guided: Run) -> Path:
    return guided.folder


def test_the_grid_fills_in_row_by_row_and_ends_as_the_image(run: Path) -> None:
    model = load_trained(run)
    seen = list(frames(model, PROMPT, Sampling(), 3))
    assert len(seen) == 8
    for row, pair in enumerate(seen, start=1):
        edge = row * PIXELS // 8
        for pixels in pair:
            assert pixels.shape == (PIXELS, PIXELS, 3)
            assert (pixels[edge:] == UNSAMPLED).all()
    image = generate_images(model, [PROMPT], [3], Sampling())[0]
    whole = Image.fromarray(image).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
    assert (seen[-1][0] == np.asarray(whole)).all()


def test_an_error_in_the_thread_reaches_the_page(run: Path) -> None:
    model = load_trained(run)
    del model.module.decoder.output.image
    with pytest.raises(AttributeError, match="image"):
        list(frames(model, PROMPT, Sampling(), 3))


def test_the_values_in_the_boxes_are_used(run: Path) -> None:
    model = load_trained(run)
    seen = list(answer(model, PROMPT, 3.0, 0.5, 0.9, 1.0))
    expected = list(frames(model, PROMPT, Sampling(temperature=0.5, top_p=0.9), 3))
    assert all((a == b).all() for pair in zip(seen, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "word " * 200}, r"prompt 'word word.* ids, but at most 42 fit"),
        ({"seed": None}, "seed: expected a number, the box is empty"),
        ({"temperature": None, "guidance": None}, "temperature, guidance: expected a number"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"seed": float("nan")}, "seed=nan: expected a whole number"),
        ({"top_p": 0.0}, "top_p=0"),
    ],
)
def test_boxes_out_of_range_are_named(run: Path, change: dict[str, Any], message: str) -> None:
    boxes: dict[str, Any] = {"prompt": PROMPT, "seed": 0, "temperature": 1.0, "top_p": 1.0, "guidance": 1.0}
    with pytest.raises(ValueError, match=message):
        next(answer(load_trained(run), **boxes | change))


def test_the_page_generates_from_its_sliders(run: Path) -> None:
    gradio = pytest.importorskip("gradio")
    blocks = page(load_trained(run))
    (handler,) = {function.fn for function in blocks.fns.values()}
    assert len(list(handler(PROMPT, 3, 1.0, 1.0, 1.0))) == 8
    with pytest.raises(gradio.Error, match="seed: expected a number"):
        next(handler(PROMPT, None, 1.0, 1.0, 1.0))
    assert {"prompt", "seed", "temperature", "top-p", "guidance (1: none)"} <= {
        getattr(block, "label", None) for block in blocks.blocks.values()
    }


def test_without_gradio_the_extra_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        assert main(["--checkpoint", str(run)]) == 2
        assert "t2i_lm[demo]" in capsys.readouterr().err
    else:
        pytest.skip("gradio is installed")
