"""Screenshots of TensorBoard and of the web page, taken in a real browser (extra `screenshots`, and Chromium).

python docs/screenshots.py runs
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without TensorBoard's smoothing, which bends curves of few points.
TENSORBOARD = {
    "tensorboard_curves": "#custom_scalars&_smoothingWeight=0",
    "tensorboard_images": "#images",
}
WAIT_S = 120


def main() -> int:
    """Takes all screenshots; returns the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", type=Path, help="folder of runs")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "images", help="default: docs/images")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        print(f"error: no browser: one of {', '.join(BROWSERS)} is required", file=sys.stderr)
        return 2
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tensorboard(browser, options.runs, options.out)
        web_page(browser, options.runs, options.out)
        browser.close()
    return 0


def tensorboard(browser: Browser, runs: Path, out: Path) -> None:
    """Screenshots of TensorBoard's pages."""
    with served("tensorboard.main", "--logdir", str(runs), "--host", "localhost", "--port") as address:
        for name, part in TENSORBOARD.items():
            page = opened(browser, f"{address}/?darkMode=false{part}", width=1280, height=1400)
            page.wait_for_timeout(5000)  # curves arrive after the page is complete
            save(page, out / f"{name}.png")


def web_page(browser: Browser, runs: Path, out: Path) -> None:
    """Draws the page's own prompt and takes a screenshot of the image."""
    with served("t2i_lm.demo", "--checkpoint", str(runs), "--port") as address:
        page = opened(browser, address, width=1000, height=820)
        page.get_by_role("button", name="generate").click()
        page.wait_for_selector("img[src*='/file=']", timeout=WAIT_S * 1000)
        page.wait_for_timeout(4000)  # until the last ids are drawn
        save(page, out / "web_page.png")


@contextmanager
def served(module: str, *arguments: str) -> Iterator[str]:
    """The address at which `python -m MODULE ARGUMENTS PORT` answers; the process ends with the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", module, *arguments, str(port)])
    address = f"http://localhost:{port}"
    try:
        until = time.monotonic() + WAIT_S
        while not answers(address):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{module} does not answer at {address}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def answers(address: str) -> bool:
    """Whether a page is served at an address."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def opened(browser: Browser, address: str, width: int, height: int) -> Page:
    """A page in a window of that size."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(address)
    page.wait_for_load_state("networkidle")
    return page


def save(page: Page, path: Path) -> None:
    """Writes a screenshot and closes the page."""
    page.screenshot(path=path)
    page.close()
    print(path)


if __name__ == "__main__":
    sys.exit(main())
