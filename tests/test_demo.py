"""The web page's frames, and the page itself where gradio is installed."""

import subprocess
import sys
import time
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

ROOT = Path(__file__).parents[1]


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
        ({"seed": 1e300}, "seed=1e[+]300: expected a whole number"),
        ({"top_p": 0.0}, r"top_p=0.0: expected a value in \[0.05, 1\]"),
        ({"temperature": float("nan")}, "temperature=nan: expected a value in"),
        ({"temperature": float("inf")}, "temperature=inf: expected a value in"),
        ({"temperature": 1e9}, "temperature=1000000000.0: expected a value in"),
        ({"temperature": "1"}, "temperature='1': expected a number"),
        ({"guidance": float("nan")}, "guidance=nan: expected a value in"),
        ({"guidance": -1}, "guidance=-1: expected a value in"),
        ({"guidance": [1] * 1000}, "guidance=.* expected a number"),
        ({"prompt": "a" * 10_001}, "prompt: expected a text of at most 10,000 characters"),
        ({"prompt": 7}, "prompt: expected a text"),
    ],
)
def test_boxes_out_of_range_are_named(run: Path, change: dict[str, Any], message: str) -> None:
    boxes: dict[str, Any] = {"prompt": PROMPT, "seed": 0, "temperature": 1.0, "top_p": 1.0, "guidance": 1.0}
    with pytest.raises(ValueError, match=message):
        next(answer(load_trained(run), **boxes | change))


class Drawn:
    """Counts the ids of a model, each of which takes some time."""

    def __init__(self, model: Any, seconds: float) -> None:
        self.ids = 0

        def count(*_: Any) -> None:
            self.ids += 1
            time.sleep(seconds)

        model.module.decoder.output.register_forward_hook(count)

    def after(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.ids


def test_a_page_that_is_closed_draws_no_further(run: Path) -> None:
    model = load_trained(run)
    drawn = Drawn(model, 0.01)
    pages: Any = frames(model, PROMPT, Sampling(), 3)
    next(pages)
    pages.close()
    stopped = drawn.after(0.2)
    assert stopped < 64
    assert drawn.after(0.2) == stopped


# Opens the page, reads its events until the first row of the image, and closes the connection, as a tab does.
CLOSED_TAB = """
import sys, time
from pathlib import Path
import httpx
from tests.test_demo import Drawn, PROMPT, load_trained, page
model = load_trained(Path(sys.argv[1]))
drawn = Drawn(model, 0.05)
_, address, _ = page(model).launch(prevent_thread_lock=True, quiet=True)
api, session = f"{address}gradio_api/queue/", {"session_hash": "tab"}
httpx.post(f"{api}join", json={"data": [PROMPT, 3, 1.0, 1.0, 1.0], "fn_index": 0, **session}).raise_for_status()
with httpx.stream("GET", f"{api}data", params=session, timeout=60) as messages:
    assert any("process_generating" in message for message in messages.iter_lines())
print("ids", drawn.after(2), drawn.after(0.5))
"""


def test_a_tab_that_is_closed_stops_the_server(run: Path) -> None:
    pytest.importorskip("gradio")
    done = subprocess.run([sys.executable, "-c", CLOSED_TAB, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stopped, later = done.stdout.split()[-2:]
    assert 0 < int(stopped) < 60
    assert later == stopped


@pytest.mark.filterwarnings("ignore")  # of gradio, which leaves event loops open
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


def test_a_port_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "runs", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "error: --port 70000: expected 1 to 65535\n"
