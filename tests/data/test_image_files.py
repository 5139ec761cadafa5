"""The memory of an image is bounded by its header; other formats and special files are refused."""

import errno
import io
import os
import resource
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_lm.data import image_files
from t2i_lm.data.digests import file_digest, image_digest, image_digests, store_path
from t2i_lm.data.identity import content_of
from t2i_lm.data.pairs import RejectedPairError, decode_image
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.reading import SpecialFileError


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int, bits: int, color: int) -> io.BytesIO:
    """A PNG that consists of its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in (header, data)]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("width", "height", "bits", "color", "reason"),
    [
        (6000, 10_000, 16, 0, r"\(6000 x 10000 I;16 PNG\): over 300 MB when decoded"),
        (6000, 10_000, 8, 0, "over 300 MB when decoded"),
        (6000, 10_000, 1, 0, "over 300 MB when decoded"),
        (6000, 10_000, 8, 6, "over 300 MB when decoded"),
        (8001, 8000, 8, 2, "over 64,000,000 pixels"),
        (65_535, 65_535, 8, 2, "over 64,000,000 pixels"),
        (6000, 10_000, 8, 2, "truncated or corrupt"),  # would fit
    ],
)
def test_a_large_image_is_rejected_by_its_header(width: int, height: int, bits: int, color: int, reason: str) -> None:
    with pytest.raises(RejectedPairError, match=reason):
        decode_image(png_header(width, height, bits, color), "x")


@pytest.mark.parametrize("turned", [False, True])
def test_a_jpeg_that_is_too_large_is_decoded_at_a_fraction(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.linspace(0, 255, 400).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.tile(columns, (200, 1))[..., None], 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    content = encoded(image, "JPEG", exif=exif, quality=95)
    whole = decode_image(io.BytesIO(content), "x")
    assert whole.size == ((200, 400) if turned else (400, 200))
    limit = image_files.RESERVE + 200_000  # 400 x 200 x 4 bytes are more, a quarter of it fits
    monkeypatch.setattr(image_files, "MAX_BYTES", limit)
    small = decode_image(io.BytesIO(content), "x")
    assert small.size == (whole.width // 2, whole.height // 2)
    reduced = np.asarray(whole.resize(small.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(small).astype(int) - reduced).max() <= 4


def test_formats_beside_the_listed_ones_are_no_images(tmp_path: Path) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for content in (postscript, encoded(Image.new("RGB", (9, 9)), "ICO"), encoded(Image.new("RGB", (9, 9)), "PCX")):
        with pytest.raises(RejectedPairError, match=r"x\.jpg: not an image"):
            decode_image(io.BytesIO(content), "x.jpg")
        assert image_digest(content) is None


def test_a_fifo_a_socket_and_a_device_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        for name, kind in (("fifo.jpg", "a FIFO"), ("socket.jpg", "a socket"), ("/dev/zero", "a device")):
            with pytest.raises(RejectedPairError, match=f"{name}: {kind}, not a regular file"):
                decode_image(name, name)
            assert file_digest(Path(name)) is None
            with pytest.raises(SpecialFileError, match=kind):
                file_sha256(Path(name))


def test_conversion_in_tiles_equals_conversion_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (37, 41, 4), np.uint8)
    images = [Image.fromarray(values), Image.fromarray(values).convert("LA"), Image.fromarray(values[..., 0])]
    images += [Image.fromarray(values[..., :2].copy().view(np.uint16)[..., 0]), images[0].quantize(9)]
    contents = [encoded(image, "PNG") for image in images]
    whole = [np.asarray(decode_image(io.BytesIO(content), "x")) for content in contents]
    monkeypatch.setattr("t2i_lm.data.color_modes.TILE", 64)
    tiled = [np.asarray(decode_image(io.BytesIO(content), "x")) for content in contents]
    for first, second in zip(whole, tiled, strict=True):
        assert np.array_equal(first, second)


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process cannot open a further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_and_no_memory_are_no_fault_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    for read in (lambda: decode_image(file, str(file)), lambda: file_digest(file), lambda: content_of(str(file))):
        with pytest.raises(ValueError, match=r"x\.png cannot be read now: Too many open files; start again"):  # noqa: SIM117
            with no_more_files():
                read()
    monkeypatch.setattr(Image, "open", lambda *_, **__: bytes(2**62))
    with pytest.raises(MemoryError, match=r"x\.png: the memory is exhausted"):
        decode_image(file, str(file))
    with pytest.raises(MemoryError):
        file_digest(file)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_no_digest_is_kept_of_a_file_that_could_not_be_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, store = [tmp_path / "a.png", tmp_path / "b.png"], store_path(str(tmp_path / "cache"), "image", tmp_path)
    for color, file in enumerate(files):
        file.write_bytes(encoded(Image.new("RGB", (4, 4), (color, 0, 0)), "PNG"))
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path == files[1]:
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        if number == errno.EACCES:
            assert image_digests(files, store)[1] is None
        else:
            with pytest.raises(ValueError, match=r"b\.png cannot be read now: Stale file handle"):
                image_digests(files, store)
    assert image_digests(files, store) == [file_digest(file) for file in files]
    assert None not in image_digests(files, store)
