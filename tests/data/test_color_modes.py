"""A known color comes back from every mode of Pillow."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from t2i_lm.data.color_modes import to_rgb
from t2i_lm.data.pairs import RejectedPairError, decode_image

channel = st.integers(0, 255)
color = st.tuples(channel, channel, channel)
SIZE = (3, 2)


def pixel(image: Image.Image) -> np.ndarray:
    """The color of an image of one color."""
    assert image.mode == "RGB"
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return pixels[0].astype(int)


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


# By mode: how an RGB image is made one, and the largest error of the way back.
COLOR_MODES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "RGB": (lambda image: image, 0),
    "RGBA": (lambda image: image.convert("RGBA"), 0),
    "RGBX": (lambda image: image.convert("RGBX"), 0),
    "RGBa": (lambda image: image.convert("RGBA").convert("RGBa"), 0),
    "CMYK": (lambda image: image.convert("CMYK"), 0),
    "P": (lambda image: image.quantize(2), 0),
    "PA": (lambda image: image.quantize(2).convert("PA"), 0),
    "YCbCr": (lambda image: image.convert("YCbCr"), 3),
    "HSV": (lambda image: image.convert("HSV"), 8),
    "LAB": (lab, 40),  # eight bits of LAB are coarse at the edge of sRGB
}
GRAY_MODES: dict[str, tuple[Callable[[int], Image.Image], int]] = {
    "L": (lambda value: Image.new("L", SIZE, value), 0),
    "LA": (lambda value: Image.new("LA", SIZE, (value, 255)), 0),
    "La": (lambda value: Image.new("LA", SIZE, (value, 255)).convert("La"), 0),
    "1": (lambda value: Image.new("1", SIZE, value), 255),
    "F": (lambda value: Image.fromarray(np.full((2, 3), value / 255, np.float32)), 0),
    "I;16": (lambda value: sixteen_bit("I;16", "<u2", value), 0),
    "I;16L": (lambda value: sixteen_bit("I;16L", "<u2", value), 0),
    "I;16B": (lambda value: sixteen_bit("I;16B", ">u2", value), 0),
    "I;16N": (lambda value: sixteen_bit("I;16N", "=u2", value), 0),
    "I": (lambda value: Image.fromarray(np.full((2, 3), 257 * value, np.int32)), 0),
}


def sixteen_bit(mode: str, kind: str, value: int) -> Image.Image:
    return Image.frombytes(mode, SIZE, np.full((2, 3), 257 * value, kind).tobytes())


def test_every_mode_is_tested() -> None:
    assert {*COLOR_MODES, *GRAY_MODES} == set(Image.MODES)


@pytest.mark.parametrize("mode", COLOR_MODES)
@settings(deadline=None)
@given(value=color)
def test_a_color_comes_back(mode: str, value: tuple[int, int, int]) -> None:
    make, error = COLOR_MODES[mode]
    image = make(Image.new("RGB", SIZE, value))
    assert image.mode == mode
    assert np.abs(pixel(to_rgb(image)) - value).max() <= error


@pytest.mark.parametrize("mode", GRAY_MODES)
@settings(deadline=None)
@given(value=channel)
def test_a_gray_value_comes_back(mode: str, value: int) -> None:
    make, error = GRAY_MODES[mode]
    image = make(value)
    assert image.mode == mode
    assert np.abs(pixel(to_rgb(image, "PNG")) - value).max() <= error


@settings(deadline=None)
@given(value=color, alpha=channel)
def test_transparent_pixels_are_over_white(value: tuple[int, int, int], alpha: int) -> None:
    expected = (np.array(value) * alpha + 255 * (255 - alpha)) / 255
    assert np.abs(pixel(to_rgb(Image.new("RGBA", SIZE, (*value, alpha)))) - expected).max() <= 1
    gray = value[0]
    assert np.abs(pixel(to_rgb(Image.new("LA", SIZE, (gray, alpha)))) - expected[0]).max() <= 1


@pytest.mark.parametrize(("mode", "value"), [("L", 7), ("RGB", (1, 2, 3)), ("1", 0), ("P", 4), ("I;16", 1000)])
def test_a_transparent_color_of_a_png_is_white(mode: str, value: int | tuple[int, int, int]) -> None:
    image = Image.new(mode, SIZE, value)
    if mode == "P":
        image.putpalette(list(range(30)))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=value)
    assert pixel(decode_image(file, "x")).tolist() == [255, 255, 255]


def test_opaque_pixels_are_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBA")):
        assert (np.asarray(to_rgb(image)) == pixels).all()
    gray = Image.fromarray(pixels[..., 0])
    assert (np.asarray(to_rgb(gray)) == np.asarray(gray.convert("RGB"))).all()


@pytest.mark.parametrize("value", [-0.1, 1.5, 255.0, float("nan"), float("inf")])
def test_float_images_of_unknown_range_are_rejected(value: float) -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(file, "TIFF")
    with pytest.raises(RejectedPairError, match=r"x: float image with values outside \[0, 1\]"):
        decode_image(file, "x")


def test_integers_of_unknown_range_are_rejected_and_those_of_pnm_files_are_scaled() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[1, 70_000]], np.int32)).save(file, "TIFF")
    with pytest.raises(RejectedPairError, match="x: 32-bit integer image"):
        decode_image(file, "x")
    pgm = io.BytesIO(b"P5 2 1 1023\n" + np.array([512, 512], ">u2").tobytes())
    assert pixel(decode_image(pgm, "x")).tolist() == [128, 128, 128]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), value) for value in ((255, 0, 0), (0, 255, 0))]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(decode_image(file, "x")).tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_rotation_of_the_camera_is_applied_in_every_mode(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new(mode, (8, 4)).save(file, "JPEG", exif=exif)
    assert decode_image(file, "x").size == (4, 8)
