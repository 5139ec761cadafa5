from pathlib import Path

import pytest

from t2i_lm.reporting.pdf import write_pdf


def test_without_a_browser_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "report.html").write_text("<p>page</p>")
    line = write_pdf(tmp_path / "report.html")
    assert line.startswith(f"no {tmp_path / 'report.pdf'}: it requires Chromium or Chrome (chromium, ")
    assert "\n" not in line
    assert not (tmp_path / "report.pdf").exists()


def test_a_browser_that_fails_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "report.html").write_text("<p>page</p>")
    (tmp_path / "report.pdf").write_text("an older one")
    assert write_pdf(tmp_path / "report.html") == f"no {tmp_path / 'report.pdf'}: {browser} failed: no display"
    assert not (tmp_path / "report.pdf").exists()
