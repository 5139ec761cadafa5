"""Runs the tests in a new environment with every dependency at its lower bound in pyproject.toml.

An hour or more, and some GB: not part of CI. `python .ci/lower_bounds.py FOLDER [pytest options]`; with --list it
prints the versions and does nothing.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# No test uses them, and type stubs require newer numpy and scipy.
CHECKERS = {"codespell", "mypy", "pre-commit", "ruff", "scipy-stubs", "types-PyYAML"}
BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\w.]+)")


def pins() -> list[str]:
    """`name==version`: of what has a bound the bound, of development tools without one CI's version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    exact = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    found: dict[str, str] = {}
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        if requirement in CHECKERS:
            continue
        bound = BOUND.fullmatch(requirement)
        name, version = bound.group("name", "version") if bound else (requirement, exact.get(requirement, ""))
        found[name] = f"{name}=={version}" if version else name
    return list(found.values())


def main(arguments: list[str]) -> int:
    """Makes the environment, installs, tests; the exit code of what failed."""
    if arguments == ["--list"]:
        print("\n".join(pins()))
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    folder, *options = arguments
    venv.create(folder, with_pip=True)
    python = str(Path(folder) / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", *pins()]
    own = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)]
    tests = [python, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder", *options]
    for command in (install, own, tests):
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
