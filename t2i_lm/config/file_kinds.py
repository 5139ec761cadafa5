"""Kinds of YAML files, told from each other by their keys: a command that is given another kind names its command."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig

EXPERIMENT, STUDY, COMPARISON, STRENGTHS = (
    "an experiment",
    "the plan of a study",
    "the plan of a comparison",
    "the strengths of remedies",
)
COMMANDS = {
    EXPERIMENT: "python -m t2i_lm.train {}",
    STUDY: "python -m t2i_lm.study {}",
    COMPARISON: "python -m t2i_lm.compare --plan {}",
    STRENGTHS: "python -m t2i_lm.remedies --plan {}",
}
_SHARED = {"scale", "seeds", "primary", "margin", "secondary", "alpha"}
KEYS = {
    EXPERIMENT: {key.name for key in fields(ExperimentConfig)},
    STUDY: {*_SHARED, "comparisons", "runs", "measure", "rounding"},
    COMPARISON: {*_SHARED, "arms", "where", "varied"},
    STRENGTHS: {"strengths"},
}


def require_kind(path: Path, content: Mapping[str, Any], kind: str) -> None:
    """Refuses a file all of whose keys are those of one other kind.

    Args:
        path: the file.
        content: its keys and values.
        kind: what the command takes, one of COMMANDS.

    Raises:
        ValueError: with the command that takes the file.
    """
    keys = {str(key).partition(".")[0] for key in content}
    found = [name for name, own in KEYS.items() if keys <= own]
    if len(found) == 1 and found != [kind]:
        raise ValueError(f"{path}: expected {kind}, found {found[0]}; its command: {COMMANDS[found[0]].format(path)}")
