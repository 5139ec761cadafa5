"""The page as PDF, printed by an installed browser."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from t2i_lm.storage.reading import reason
from t2i_lm.storage.writing import atomic_file

# Programs that print a page without a window, in the order in which they are tried.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
TIMEOUT_S = 120


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome; None without one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def browser_command(browser: str, profile: str) -> list[str]:
    """A browser without a window, and with a profile of its own."""
    command = [browser, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # its sandbox refuses the superuser, as in containers
        command.append("--no-sandbox")
    return command


def write_pdf(page: Path) -> str:
    """Writes PAGE.pdf beside a page; returns its path, or a line on why there is none."""
    browser, file = find_browser(), page.with_suffix(".pdf")
    if browser is None:
        return f"no {file}: it requires Chromium or Chrome ({', '.join(BROWSERS)})"
    file.unlink(missing_ok=True)  # it would be that of an older page
    with tempfile.TemporaryDirectory(prefix="t2i_lm-pdf-", ignore_cleanup_errors=True) as profile:
        printed = Path(profile, "page.pdf")
        options = [f"--print-to-pdf={printed}", "--no-pdf-header-footer", page.resolve().as_uri()]
        try:
            done = subprocess.run(
                [*browser_command(browser, profile), *options], capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no {file}: {browser} failed: {reason(error)}"
        if not printed.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return f"no {file}: {browser} failed: {last}"
        with atomic_file(file) as own:
            shutil.copyfile(printed, own)
    return str(file)
