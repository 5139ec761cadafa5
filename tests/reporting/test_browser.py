"""The page in a real browser: fits a phone and a desktop, light and dark, without an error; its PDF."""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from t2i_lm import report
from t2i_lm.reporting.pdf import BROWSERS, browser_command, find_browser
from tests.plots.synthetic_runs import write_run

BROWSER = find_browser()
WIDTHS = (360, 1200)
# Measures the page in frames of each width: a frame's media queries see its own size.
MEASURE = """
<script>
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const broken = [...page.images].filter(image => !image.naturalWidth).length;
    return {client: root.clientWidth, scroll: root.scrollWidth, images: page.images.length, broken,
            background: frame.contentWindow.getComputedStyle(page.body).backgroundColor};
  });
  document.body.innerHTML = "<pre>" + JSON.stringify(measured) + "</pre>";
});
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"requires one of {', '.join(BROWSERS)}"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    for name in ("t2i_pretrained", "t2i_scratch"):
        run = write_run(folder / "runs", name, "20260301-100000")
        (run / "samples").mkdir()
    out = folder / "report.html"
    assert report.main(["--runs", str(folder / "runs"), "--out", str(out)]) == 0
    return out


def browse(page: Path, tmp_path: Path, *options: str) -> tuple[str, str]:
    """The document after loading, and what the browser prints."""
    assert BROWSER is not None
    command = [*browser_command(BROWSER, str(tmp_path / "profile")), "--enable-logging=stderr", *options]
    done = subprocess.run(
        [*command, "--window-size=1300,900", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_a_phone_and_a_desktop(page: Path, tmp_path: Path, dark: bool) -> None:
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(page.read_text())}"></iframe>'
        for width in WIDTHS
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!DOCTYPE html><meta charset=utf-8><link rel=icon href=data:,><body>{frames}{MEASURE}</body>")
    document, printed = browse(wrapper, tmp_path, *["--blink-settings=preferredColorScheme=0"] * dark)
    found = re.search(r"<pre>(\[.*\])</pre>", document)
    assert found, document[-2000:]
    measured = json.loads(html.unescape(found[1]))
    assert [one["client"] for one in measured] == pytest.approx(WIDTHS, abs=20)  # without the scroll bar
    for one in measured:
        assert one["scroll"] <= one["client"]
        assert one["images"] >= 3
        assert one["broken"] == 0
        assert one["background"] == ("rgb(21, 23, 26)" if dark else "rgb(253, 252, 250)")
    assert "CONSOLE" not in printed


def test_the_page_is_printed_as_pdf(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--runs", str(page.parent / "runs"), "--out", str(page), "--pdf"]) == 0
    file = page.with_suffix(".pdf")
    assert capsys.readouterr().out.splitlines() == [str(page), str(file)]
    assert file.read_bytes().startswith(b"%PDF")
