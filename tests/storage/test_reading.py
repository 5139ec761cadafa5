"""The boundary at which a user's file is opened."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2i_lm.storage.reading import reading, reason
from t2i_lm.storage.run_folder import ENVIRONMENT, METRICS, REPORT, Run, read_run


@pytest.mark.parametrize(
    "error",
    [
        *(json.JSONDecodeError("Expecting value", "x", 0), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte")),
        *(
            KeyError("model"),
            TypeError("no\nstring"),
            AttributeError("get"),
            IndexError(),
            RuntimeError("shapes\n\tdiffer"),
        ),
        *(EOFError(), OSError("Unable to load"), FileNotFoundError(2, "No such file"), pickle.UnpicklingError("x")),
        *(SafetensorError("header too large"), Exception("bare"), ImportError("No module named x"), RecursionError()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_library_raises_is_one_line_with_key_and_file(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"^x\.path: /a/b cannot be read: .+") as caught, reading("x.path", "/a/b"):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_real_readers_of_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xff\x00garbage")
    for read in (
        lambda: json.loads(file.read_text(encoding="utf-8")),
        lambda: torch.load(file, weights_only=True),
        lambda: load_file(file),
        lambda: tokenizers.Tokenizer.from_file(str(file)),
    ):
        with pytest.raises(ValueError, match=rf"^k: {file} cannot be read: "), reading("k", file):
            read()


@pytest.mark.parametrize("error", [AssertionError(), NameError("x"), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_faults_of_code_and_a_full_memory_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)), reading("x.path", "/a/b"):
        raise error


def test_a_message_of_the_suite_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^.*empty is not a run folder: it has no config\.yaml$"), reading("k", "/a"):
        read_run(tmp_path / "empty")


def test_a_long_message_is_cut() -> None:
    assert len(reason(RuntimeError("x " * 5000))) < 500


@pytest.mark.parametrize("name", [ENVIRONMENT, REPORT, "config.yaml"])
def test_a_damaged_file_of_a_run_folder_is_named(name: str, runs: Path) -> None:
    folder = next(path for path in runs.glob("*/*") if (path / METRICS).is_file())
    assert isinstance(read_run(folder), Run)
    for damage in (b"{", b"\xff\xfe", b"[1]"):
        (folder / name).write_bytes(damage)
        with pytest.raises(ValueError, match=rf"run folder: {folder / name} cannot be read"):
            read_run(folder)
