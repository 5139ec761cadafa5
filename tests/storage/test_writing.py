"""Files that are written whole or not at all, and what a full disk is told as."""

import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from callbacks.files import disk
from callbacks.files.atomic import write_atomic as write_durable
from t2i_lm.runtime.command_line import exit_code
from t2i_lm.storage.owner import own
from t2i_lm.storage.reading import reading
from t2i_lm.storage.resumable import atomic_folder
from t2i_lm.storage.writing import DISK_ERRORS, DiskError, atomic_file, problem, write_atomic, writing
from tests.disks import file_limit

NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)


def draw(file: Path) -> None:
    figure = Figure()
    figure.subplots().imshow(NOISE)
    figure.savefig(file)


# Every library that writes files here, at 20 kB or more.
LIBRARIES: dict[str, Callable[[Path], object]] = {
    "text.txt": lambda file: file.write_text("x" * 50_000),
    "image.png": lambda file: Image.fromarray(NOISE).save(file),
    "figure.png": draw,
    "figure.pdf": draw,
    "arrays.npz": lambda file: np.savez_compressed(file, noise=NOISE),
    "weights.safetensors": lambda file: save_file({"a": torch.zeros(20_000)}, file),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_file_that_does_not_fit_leaves_the_former_one_and_is_named(name: str, tmp_path: Path) -> None:
    file, write = tmp_path / name, LIBRARIES[name]
    for former in (None, b"former"):
        if former:
            file.write_bytes(former)
        with (
            pytest.raises(OSError, match=rf"{re.escape(str(file))}: File too large \([\d,.]+ MB free\)$"),
            file_limit(8192),
            atomic_file(file) as own_file,
        ):
            write(own_file)
        assert [entry.name for entry in tmp_path.iterdir()] == ([name] if former else [])
        assert former is None or file.read_bytes() == former
    with atomic_file(file) as own_file:
        write(own_file)
    assert file.stat().st_size > 20_000


def test_a_folder_that_does_not_fit_is_not_there_and_names_the_file_in_it(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=f"{tmp_path}/out: File too large"),
        file_limit(4096),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "large").write_text("x" * 9000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_of_two_that_write_one_folder_the_second_changes_nothing(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def write(content: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        with atomic_folder(out) as folder:
            (folder / "image").write_text(content)
            meanwhile()

    with pytest.raises(ValueError, match="out: exists and is not an empty folder"):
        write("second", lambda: write("first"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_text() for path in out.iterdir()} == {"image": "first"}


def test_links_are_replaced_and_devices_written(tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("other")
    link.symlink_to(other)
    write_atomic(link, "new")
    assert other.read_text() == "other"
    assert link.read_text() == "new"
    write_atomic(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match=r"^/dev/full: No space left on device \(0.0 MB free\)$|^/dev/full: No space"):
        write_atomic(Path("/dev/full"), "x")


@pytest.mark.parametrize("number", DISK_ERRORS)
def test_both_halves_of_the_suite_tell_an_error_alike(number: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(DiskError) as caught, writing(file):
        raise OSError(number, os.strerror(number))
    text = str(caught.value)
    assert text == str(disk.named(OSError(number, os.strerror(number)), file)) == problem(caught.value)
    assert text.startswith(f"{file}: {os.strerror(number)}")
    assert ("MB free" in text) == (number in disk.FULL)
    assert str(pickle.loads(pickle.dumps(caught.value))) == text  # as ranks exchange it


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "no", "other"), OSError("no number")):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "file"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("write", [write_atomic, lambda path, content: write_durable(path, content.encode())])
def test_a_missing_folder_and_a_read_only_one_are_named(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"^{tmp_path}/absent/file: No such file or directory$"):
        write(tmp_path / "absent" / "file", "x")


def test_a_command_ends_with_one_line_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def unnamed() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def too_large() -> int:
        write_atomic(tmp_path / "file", "x" * 100)
        return 0

    with file_limit(10):
        assert exit_code(too_large) == 2
    assert exit_code(unnamed) == 2
    named, unknown = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: {tmp_path}/file: File too large \([\d,.]+ MB free\)", named)
    assert unknown.startswith("error: No space left on device")


def test_a_full_disk_behind_a_librarys_error_is_not_a_fault_of_the_file_that_is_read(tmp_path: Path) -> None:
    behind = RuntimeError("the data set cannot be generated")
    behind.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught, reading("data.path", tmp_path):
        raise behind
    assert problem(caught.value).startswith("No space left on device")


def test_an_owner_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}/owner.json: File too large"), file_limit(5):
        own(tmp_path / "owner.json")
    assert not list(tmp_path.iterdir())
    own(tmp_path / "owner.json").release()
