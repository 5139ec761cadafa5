"""A YAML file of another kind than a command takes is refused with the command that takes it."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from t2i_lm import ablate, compare, remedies, report, study, train
from t2i_lm.comparison.plan import Plan
from t2i_lm.comparison.study_plan import Study
from t2i_lm.config.file_kinds import COMPARISON, EXPERIMENT, KEYS, STRENGTHS, STUDY, require_kind
from tests.runs import EXPERIMENTS, PRETRAINED

FILES = {
    EXPERIMENT: (PRETRAINED, f"python -m t2i_lm.train {PRETRAINED}"),
    STUDY: (f"{EXPERIMENTS}/study.yaml", f"python -m t2i_lm.study {EXPERIMENTS}/study.yaml"),
    COMPARISON: (
        f"{EXPERIMENTS}/plans/pretraining.yaml",
        f"python -m t2i_lm.compare --plan {EXPERIMENTS}/plans/pretraining.yaml",
    ),
    STRENGTHS: (
        f"{EXPERIMENTS}/plans/remedies.yaml",
        f"python -m t2i_lm.remedies --plan {EXPERIMENTS}/plans/remedies.yaml",
    ),
}
Command = Callable[[list[str]], int]


COMMANDS: list[tuple[Command, tuple[str, ...], str]] = [
    (train.main, ("FILE", "--dry-run"), EXPERIMENT),
    (ablate.main, ("--freeze", "ffn", "FILE", "--dry-run"), EXPERIMENT),
    (study.main, ("FILE", "--dry-run"), STUDY),
    (report.main, ("--runs", ".", "--plan", "FILE"), STUDY),
    (compare.main, ("--runs", ".", "--plan", "FILE"), COMPARISON),
    (remedies.main, ("--plan", "FILE", "--dry-run"), STRENGTHS),
]


@pytest.mark.parametrize(
    ("command", "words", "kind", "found"),
    [(*one, found) for one in COMMANDS for found in FILES if found != one[-1]],
)
def test_another_kind_is_refused_with_its_command(
    command: Command, words: tuple[str, ...], kind: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, its_command = FILES[found]
    assert command([file if word == "FILE" else word for word in words]) == 2
    assert capsys.readouterr().err == f"error: {file}: expected {kind}, found {found}; its command: {its_command}\n"


def test_the_keys_of_plans_are_those_of_their_classes() -> None:
    for kind, schema in ((STUDY, Study), (COMPARISON, Plan)):
        assert {key.name for key in fields(schema)} == KEYS[kind]


@pytest.mark.parametrize(
    "content", [{"scale": "demo"}, {"seed": [0, 1], "primary": "x"}, {"name": "x", "arms": []}, {}]
)
def test_a_file_of_mixed_or_few_keys_is_left_to_its_reader(content: dict[str, object]) -> None:
    for kind in KEYS:
        require_kind(Path("x.yaml"), content, kind)


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_file_is_of_one_kind(file: Path) -> None:
    content, accepted = yaml.safe_load(file.read_text()), []
    for kind in FILES:
        try:
            require_kind(file, content, kind)
            accepted.append(kind)
        except ValueError:
            pass
    assert len(accepted) == 1
