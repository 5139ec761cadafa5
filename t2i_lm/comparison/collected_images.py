"""Images of a run for collected results, smaller than its own: samples of the first captions, and figures of probes."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from t2i_lm.comparison.portable import portable
from t2i_lm.data.image_files import open_image, read_rgb
from t2i_lm.evaluation.base import read_result
from t2i_lm.generation.grid import first_rows
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import PROBES, SAMPLES, TOKENS, Run
from t2i_lm.storage.sealed import sealed

GRIDS = ("grid*.png", "originals*.png", "reconstructions*.png")
ROWS, QUALITY = 2, 75  # of a grid: as many as the report shows


def image_files(run: Run, starts: Sequence[Path]) -> dict[str, bytes]:
    """Files by name: the first rows of grids of samples, the images of Figure 1, and probes with their figures.

    Raises:
        ValueError: naming a probe that is damaged, or an image that cannot be read.
    """
    files = {}
    for pattern in GRIDS:
        for file in sorted((run.folder / SAMPLES).glob(pattern)):
            with _named(file):
                content = first_rows(file, ROWS, QUALITY)
            if content is not None:
                files[f"{SAMPLES}/{file.stem}.webp"] = content
    if (run.folder / TOKENS).is_file():
        files[TOKENS] = (run.folder / TOKENS).read_bytes()
    for file in sorted((run.folder / PROBES).glob("*/*.json")):
        image, name = file.with_suffix(".png"), file.relative_to(run.folder).with_suffix("").as_posix()
        if image.is_file():
            record = sealed(portable(read_result(file), starts))
            files[f"{name}.json"] = json.dumps(record, separators=(",", ":")).encode() + b"\n"
            files[f"{name}.webp"] = _webp(image)
    return files


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from error


def _webp(file: Path) -> bytes:
    with _named(file), open_image(file) as image:
        content = io.BytesIO()
        read_rgb(image).save(content, format="webp", lossless=True, method=6, quality=100)
    return content.getvalue()
