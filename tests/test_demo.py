"""The web page's frames, and the page itself where gradio is installed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_lm.demo import PIXELS, UNDRAWN, frames, main, page
from t2i_lm.drawing import draw_captions
from t2i_lm.models.generate import Sampling
from t2i_lm.trained import load_trained
from tests.test_sample import PROMPT, run

__all__ = ["run"]


def test_the_grid_fills_in_row_by_row_and_ends_as_the_picture(run: Path) -> None:
    model = load_trained(run)
    seen = list(frames(model, PROMPT, Sampling(), 3))
    assert len(seen) == 8
    for row, (picture, ids) in enumerate(seen, start=1):
        edge = row * PIXELS // 8
        for pixels in (picture, ids):
            assert pixels.shape == (PIXELS, PIXELS, 3)
            assert (pixels[edge:] == UNDRAWN).all()
    drawn = draw_captions(model, [PROMPT], [3], Sampling())[0]
    whole = Image.fromarray(drawn).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
    assert (seen[-1][0] == np.asarray(whole)).all()


def test_an_error_in_the_thread_reaches_the_page(run: Path) -> None:
    model = load_trained(run)
    del model.module.decoder.output.image  # type: ignore[union-attr]
    with pytest.raises(AttributeError, match="image"):
        list(frames(model, PROMPT, Sampling(), 3))


def test_the_page_draws_from_its_sliders(run: Path) -> None:
    pytest.importorskip("gradio")
    blocks = page(load_trained(run))
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
