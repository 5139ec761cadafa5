"""Prompts in any script, and their captions on a grid."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_lm.generation.grid import captioned_grid
from t2i_lm.generation.prompts import read_prompts

BLACK = np.zeros((8, 8, 3), dtype=np.uint8)


def test_a_prompt_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n图片\u2028no new prompt\x85nor here\x0b\n 🐈 ".encode())
    assert read_prompts(["first"], file) == ["first", "a cat", "图片\u2028no new prompt\x85nor here", "🐈"]


@pytest.mark.parametrize("content", ["é".encode("latin-1"), "a cat".encode("utf-16"), b"\x80"])
def test_a_file_that_is_not_utf8_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--prompts: {file} cannot be read: .*utf-8.*"):
        read_prompts([], file)


def test_a_pipe_is_named_as_one() -> None:
    end, other = os.pipe()
    with pytest.raises(ValueError, match=rf"/dev/fd/{end} is a FIFO, not a regular file"):
        read_prompts([], Path(f"/dev/fd/{end}"))
    os.close(end)
    os.close(other)


@settings(deadline=None, max_examples=60)
@given(caption=st.text())
def test_any_caption_is_drawn(caption: str) -> None:
    assert captioned_grid([BLACK], [caption]).size[0] > 0


SCRIPTS = ("قطة على سجادة حمراء", "นกอยู่บนต้นไม้", "👩🏽‍🚀🐈‍⬛")


@pytest.mark.parametrize("caption", [*SCRIPTS, "\ud800", "\0", "\x1b[3m", "\u202e", "x" * 999])
def test_captions_without_glyphs_are_drawn(caption: str) -> None:
    assert captioned_grid([BLACK] * 2, [caption] * 2).size[0] > 0
