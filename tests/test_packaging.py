import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "-w", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_one_version_is_packaged_cited_and_in_the_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "t2i_lm/models/decoder.py" in names
    assert "callbacks/perplexity.py" in names
    assert "t2i_lm/py.typed" in names
    assert {"t2i_lm/reporting/page.html", "t2i_lm/reporting/style.css"} <= set(names)
    assert {name.split("/")[0] for name in names if not name.startswith("t2i_lm-")} == {"t2i_lm", "callbacks"}


@pytest.mark.slow
def test_every_shipped_asset_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "t2i_lm" / "assets").rglob("*"):
        if path.is_file() and "__pycache__" not in str(path):
            assert path.relative_to(ROOT).as_posix() in names


@pytest.mark.slow
def test_both_packages_import_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import callbacks, t2i_lm.train, t2i_lm.models.decoder as d;"
        f"print(callbacks.__file__, t2i_lm.train.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(site)) for path in done.stdout.split())


def test_lower_bounds_are_pinned_for_their_own_run_of_the_tests() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "lower_bounds.py"), "--list"]
    pins = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [requirement.replace(">=", "==") for requirement in project["dependencies"]]
    assert set(bounds) <= set(pins)
    assert "pytest==" in " ".join(pins), "CI's version of a tool without a bound"
