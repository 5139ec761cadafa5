"""Samples for the page: grids of a run cut into rows, beside the originals and reconstructions of the same captions."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from t2i_lm.comparison.endpoints import SETTINGS
from t2i_lm.comparison.measurement import unequal_settings
from t2i_lm.plots.captions import SPLITS
from t2i_lm.reporting.findings import arm_label
from t2i_lm.reporting.images import CaptionedImage, PageImage, captioned_images, whole_image
from t2i_lm.storage.run_folder import SAMPLES, Run

SHOWN = 8  # captions of a grid
GRID, REFERENCES = "grid", ("originals", "reconstructions")
SUFFIXES = (".png", ".webp")
# Validation splits in words, by their name in a grid's file and in a report; `familiar` is that of earlier versions.
CAPTIONS = {**SPLITS, "familiar": SPLITS["iid"]}
HELD_OUT = "held-out captions"
MEASURES = ("samples", "ceiling", "preference")
CEILING = "reconstructions"


@dataclass(frozen=True)
class SampleBlock:
    """Images of the same captions in columns.

    Attributes:
        title: what the captions are.
        columns: headings.
        rows: an image per column; every row has one caption.
        whole: images of files that are no grids, by heading.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[CaptionedImage, ...], ...]
    whole: Mapping[str, PageImage]


def sample_blocks(arms: Mapping[str, Run]) -> tuple[list[SampleBlock], list[str]]:
    """A block for each kind of grid, and notes on files that cannot be read.

    Args:
        arms: run by arm.
    """
    notes: list[str] = []
    grids = (file for run in arms.values() for file in (run.folder / SAMPLES).glob(f"{GRID}*"))
    names = {file.stem for file in grids if file.suffix in SUFFIXES}
    blocks = [_block(name, arms, notes) for name in sorted(names)]
    return [block for block in blocks if block is not None], notes


def _block(name: str, arms: Mapping[str, Run], notes: list[str]) -> SampleBlock | None:
    rest = name.removeprefix(GRID)
    columns, whole = dict[str, list[CaptionedImage]](), dict[str, PageImage]()
    for heading, file in _files(name, rest, arms):
        try:
            cells = captioned_images(file, SHOWN)
            if cells:
                columns[heading] = cells
            else:
                whole[heading] = whole_image(file)
        except OSError as error:
            notes.append(f"left out, unreadable: {file}: {error}")
    if not columns and not whole:
        return None
    captions = [[cell.caption for cell in cells] for cells in columns.values()]
    notes += [
        f"{heading} has other captions than {next(iter(columns))} in {name}"
        for heading, own in zip(columns, captions, strict=True)
        if None not in own + captions[0] and own != captions[0][: len(own)]
    ]
    rows = tuple(zip(*columns.values(), strict=False))
    words = rest.strip("_")
    if not words:  # the primary of two splits
        words = next((split for run in arms.values() for split in run.validation_splits[:1]), "")
    return SampleBlock(CAPTIONS.get(words, words.replace("_", " ") or HELD_OUT), tuple(columns), rows, whole)


def _files(name: str, rest: str, arms: Mapping[str, Run]) -> list[tuple[str, Path]]:
    """Heading and file of each column: what the first run has of the captions' own images, then each arm's samples."""
    folder = next(iter(arms.values())).folder / SAMPLES
    references = {kind: _image(folder, f"{kind}{rest}") for kind in REFERENCES}
    there = {kind: file for kind, file in references.items() if file.is_file()}
    headings = {"originals": "original", "reconstructions": "reconstruction"}
    if "reconstructions" not in there:  # earlier versions reconstruct the originals in their file
        headings["originals"] = "reconstruction"
    found = [(headings[kind], file) for kind, file in there.items()]
    own = [(arm_label(arm), _image(run.folder / SAMPLES, name)) for arm, run in arms.items()]
    return found + [(label, file) for label, file in own if file.is_file()]


def _image(folder: Path, stem: str) -> Path:
    """The image of a name: a run's PNG, or the smaller WebP of collected results."""
    files = [folder / f"{stem}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def sampling_notes(arms: Mapping[str, Run]) -> list[str]:
    """Settings in which the arms were sampled or scored differently."""
    notes = []
    for key, values in unequal_settings([*arms.values()], chain(*SETTINGS.values())).items():
        words = ", ".join(f"{arm_label(arm)} {value}" for arm, value in zip(arms, values, strict=True))
        notes.append(f"NOT CONTROLLED: {key}: {words}")
    return notes


def score_rows(arms: Mapping[str, Run]) -> list[tuple[str, ...]]:
    """Rows of a table: captions, what is measured, each arm's share, and the score of the images' reconstructions."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for arm, run in arms.items():
        for split, report in _reports(run.report or {}).items():
            for what, part, key, column in (
                ("sample shows", report.get("samples", {}).get("accuracy", {}), "right", arm),
                ("sample shows", report.get("ceiling", {}).get("accuracy", {}), "right", CEILING),
                ("true caption preferred", report.get("preference", {}), "preferred", arm),
            ):
                for attribute, entry in part.items():
                    if isinstance(entry, dict) and key in entry:
                        cell = f"{100 * entry[key]:.1f} ± {100 * entry['se']:.1f} % of {entry['of']:,}"
                        rows.setdefault((split, f"{what}: {attribute.replace('_', ' ')}"), {})[column] = cell
    return [(*names, *(cells.get(column, "") for column in (*arms, CEILING))) for names, cells in rows.items()]


def _reports(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The scene measures of a report by split; those of earlier versions, without one, at its top."""
    split = {words: report[name] for name, words in CAPTIONS.items() if isinstance(report.get(name), dict)}
    top = {key: value for key in MEASURES if isinstance(value := report.get(key), dict)}
    return {HELD_OUT: top, **split} if top else split
