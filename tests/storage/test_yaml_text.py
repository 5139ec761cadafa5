"""YAML files that would take all memory or time are refused at once."""

import time

import pytest
import yaml

from t2i_lm.storage.yaml_text import MAX_VALUES, read_yaml


def aliases(levels: int, width: int = 9) -> str:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(40), "over 20,000 values, with aliases written out"),
        (merges(60), "over 20,000 values"),
        ("a: &a [*a]", "over 20,000 values"),
        ("[" + "x, " * (MAX_VALUES + 1) + "]", "over 20,000 values"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 10_000, "nested too deeply"),
        ("#" * 300_000, "over 200,000 characters"),
    ],
)
def test_yaml_that_never_ends_is_refused_at_once(text: str, message: str) -> None:
    started = time.thread_time()
    with pytest.raises(yaml.YAMLError, match=message):
        read_yaml(text)
    assert time.thread_time() - started < 5


def test_aliases_and_merges_of_usual_files_are_read() -> None:
    text = "base: &base {lr: 1, steps: 2}\nrun: {<<: *base, steps: 3}\nnames: [&a x, *a]\n"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml("") is None
