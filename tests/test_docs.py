"""Documents: every command parses, every key exists, every link leads somewhere."""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2i_lm.config.load import load_experiment
from tests.test_layers import COMMANDS

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    EXPERIMENTS / "README.md",
    ROOT / "t2i_lm" / "assets" / "README.md",
    ROOT / "benchmarks" / "RESULTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
YAMLS = sorted(EXPERIMENTS.rglob("*.yaml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
# Values that a reader replaces.
PLACEHOLDER = re.compile(r"[A-Z_]{3,}|\.\.\.")


def is_command(line: str) -> bool:
    return line.startswith("make ") or "-m t2i_lm." in line


def fenced_commands(text: str) -> Iterator[str]:
    """Commands in fenced shell blocks, without prompts and comments."""
    for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command = line.removeprefix("$ ").split(" #")[0].strip()
            if is_command(command):
                yield command


def inline_commands(text: str) -> Iterator[str]:
    """Commands in inline code, which may be abbreviated."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from filter(is_command, re.findall(r"`([^`\n]+)`", outside))


def header_commands(text: str) -> Iterator[str]:
    """Commands in a YAML file's header, which are indented."""
    header = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#   "))
    for match in re.finditer(r"(?:make|python -m) [^()\n]*", header):
        if match.group().startswith(("make exp-", "make demo-assets", "python -m t2i_lm.")):
            yield match.group().strip().rstrip(".,;:")


def help_commands(command: str) -> Iterator[str]:
    """Example lines of a command's help."""
    epilog = parser_of(command).epilog or ""
    yield from (line.strip().removeprefix("example: ") for line in epilog.splitlines() if "-m t2i_lm." in line)


def parser_of(command: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(f"t2i_lm.{command}").parser()
    return parser


def check_command(line: str) -> None:
    """Parses a command line: make's targets and variables, or a command's options, experiment and keys."""
    words = shlex.split(line.split(" with NAME ")[0])
    if words[0] == "make":
        for word in words[1:]:
            assert "=" in word or word.startswith("-") or word in TARGETS, f"{line}: no make target {word}"
            if word.startswith("ARGS="):
                overrides = word.removeprefix("ARGS=").split()
                scale = next((w.removeprefix("SCALE=") for w in words if w.startswith("SCALE=")), "demo")
                if any(w.startswith("exp-") for w in words) and not any(PLACEHOLDER.search(o) for o in overrides):
                    load_experiment(EXPERIMENTS / "t2i_pretrained.yaml", scale, overrides)
        return
    start = next(number for number, word in enumerate(words) if word.startswith("t2i_lm."))
    command, arguments = words[start].removeprefix("t2i_lm."), words[start + 1 :]
    assert command in COMMANDS, f"{line}: no command {command}"
    if "..." in arguments or not arguments:
        return
    parser = parser_of(command)
    parser.exit_on_error = False
    positional = [action for action in parser._actions if not action.option_strings]
    options = parser.parse_intermixed_args(arguments) if positional else parser.parse_args(arguments)
    experiment = getattr(options, "experiment", None)
    if experiment is not None and not PLACEHOLDER.search(str(experiment)):
        overrides = [item for item in options.overrides if not PLACEHOLDER.search(item)]
        load_experiment(ROOT / experiment, options.scale, overrides)


def check_names(line: str) -> None:
    """Checks make's targets, or the name and the options of a command, which may be abbreviated."""
    if line.startswith("make "):
        check_command(line)
        return
    words = shlex.split(line)
    command = next(word for word in words if word.startswith("t2i_lm.")).removeprefix("t2i_lm.")
    if PLACEHOLDER.fullmatch(command):
        return
    assert command in COMMANDS, f"{line}: no command {command}"
    known = {name for action in parser_of(command)._actions for name in action.option_strings}
    options = {word for word in words[words.index(f"t2i_lm.{command}") :] if word.startswith("--")}
    assert options <= known, f"{line}: no option {', '.join(options - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_documents_parse(page: Path) -> None:
    text = page.read_text()
    for line in fenced_commands(text):
        check_command(line)
    for line in inline_commands(text):
        check_names(line)


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: str(file.relative_to(EXPERIMENTS)))
def test_commands_in_headers_of_experiments_parse(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("#"), "an experiment opens with its command and what to expect"
    for line in header_commands(text):
        check_command(line)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_help_parse(command: str) -> None:
    examples = list(help_commands(command))
    assert examples, f"python -m t2i_lm.{command} --help shows no example"
    for line in examples:
        check_command(line)


def test_the_checks_find_wrong_commands() -> None:
    for wrong in ("make exp-nothing", "python -m t2i_lm.paint x", "python -m t2i_lm.figures --figures 4"):
        with pytest.raises((AssertionError, SystemExit, argparse.ArgumentError)):
            check_command(wrong)
    with pytest.raises(ValueError, match="unknown key"):
        check_command("python -m t2i_lm.train experiments/t2i_pretrained.yaml optim.rate=1")
    with pytest.raises(ValueError, match="unknown key"):
        check_command('make exp-pretrained ARGS="optim.rate=1"')
    with pytest.raises(AssertionError, match="no option"):
        check_names("python -m t2i_lm.figures --figures")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_documents_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_every_experiment_is_in_the_index() -> None:
    index = (EXPERIMENTS / "README.md").read_text()
    listed: set[str] = set()
    for name in re.findall(r"`([\w/{},]+\.yaml)`", index):
        head, _, rest = name.partition("{")
        choices, _, tail = rest.partition("}")
        listed |= {f"{head}{choice}{tail}" for choice in choices.split(",")} if rest else {name}
    files = {str(file.relative_to(EXPERIMENTS)) for file in YAMLS if "scale" not in file.parts and file.stem != "base"}
    assert listed - {"base.yaml", "scale/SCALE.yaml"} == files


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150


def test_every_test_that_a_page_names_exists() -> None:
    named = 0
    for page in PAGES:
        file = ""
        for path, name in re.findall(r"`((?:tests/[\w/]+\.py)?)::(\w+)`", page.read_text(encoding="utf-8")):
            file = path or file
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name}: {file}::{name}"
            named += 1
    assert named > 20
