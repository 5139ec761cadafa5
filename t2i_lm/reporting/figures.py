"""The catalogue's figures for the page, drawn from finished runs alone, with the runs that each compares."""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from t2i_lm.comparison.comparability import IncomparableError, differences, following, revision_note
from t2i_lm.plots.catalogue import FIGURES, OF_PAIR, Request
from t2i_lm.plots.panels import remove_caption
from t2i_lm.reporting.images import PageImage, figure_image
from t2i_lm.storage.run_folder import Run

SHOWN = 60  # characters of a value in a note


@dataclass(frozen=True)
class FigureBlock:
    """A figure of the page, or why there is none.

    Attributes:
        name: in the catalogue.
        title, caption, table: of the rendered figure; the caption without its title.
        image: the figure without its caption.
        arms: the runs that it compares, by arm.
        notes: differences between them, and their code revisions where there are several.
        problem: why it could not be drawn, in the figure's own words.
    """

    name: str
    title: str = ""
    caption: str = ""
    table: str = ""
    image: PageImage | None = None
    arms: Mapping[str, Run] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problem: str = ""

    @classmethod
    def drawn(cls, name: str, title: str, figure: Figure, caption: str, **fields: Any) -> "FigureBlock":
        """The block of a figure, which loses its own caption; `fields` are further attributes."""
        remove_caption(figure)
        return cls(name, title, without_title(caption, title), image=figure_image(figure), **fields)


def without_title(caption: str, title: str) -> str:
    """A caption without the title that it begins with."""
    return caption.removeprefix(title).lstrip(".: ").rstrip()


@dataclass(frozen=True)
class RecordingRequest(Request):
    """A request that keeps the runs that a figure compares, and the keys in which they may differ.

    Attributes:
        folders: folder of each run by the one where figures find it.
        arms: runs by arm, as `check` is given them.
        differing: values of the runs by key in which they differ against the rules.
    """

    folders: Mapping[Path, Path] = field(default_factory=dict)
    arms: dict[str, Run] = field(default_factory=dict)
    differing: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def check(self, arms: Mapping[str, Run], varied: tuple[str, ...] = ()) -> None:
        """Records the runs, then checks them as every figure does."""
        self.arms.update({arm: replace(run, folder=self.folders[run.folder]) for arm, run in arms.items()})
        self.differing.update(differences(list(arms.values()), varied, self.by_design(arms), paired=True))
        super().check(arms, varied)


def draw_figures(
    runs: Sequence[Run],
    root: Path,
    strict: bool,
    pair: tuple[Run, Run] | None,
    varied: tuple[str, ...] = (),
    own: Collection[str] = (),
) -> list[FigureBlock]:
    """Every figure of the catalogue.

    Args:
        runs: the finished runs, oldest first.
        root: their folder, for messages.
        strict: whether incomparable runs are refused.
        pair: the runs of figures of a pair, from pre-trained and from random weights; None to search.
        varied: config keys in which arms differ by design.
        own: those of which each arm of the pair has its own value, such as its best learning rate.

    Raises:
        IncomparableError: if `strict`, naming the figure and the keys.
    """
    pair_keys = (*own, *following(own))
    # The pair may lie in the folder of a sweep or of a setting: no run to compare others with.
    with view(runs) as alone, view([*(pair or ()), *runs]) as together:
        links = {folder: link for link, folder in together[1].items()}
        one, two = (None, None) if pair is None else (links[run.folder] for run in pair)
        names = {str(link): str(folder) for _, folders in (alone, together) for link, folder in folders.items()}
        names |= {str(top): str(root) for top, _ in (alone, together)}
        blocks = []
        for name, render in FIGURES.items():
            top, folders = together if name in OF_PAIR else alone
            request = RecordingRequest(
                top, one, two, strict=strict, varied=varied, folders=folders, pair_keys=pair_keys
            )
            try:
                rendered = render(request)
            except ValueError as error:
                problem = named(str(error), names)
                if strict and isinstance(error, IncomparableError):
                    raise IncomparableError(f"figure {name}: {problem}") from error
                blocks.append(FigureBlock(name, problem=problem))
                continue
            blocks.append(
                FigureBlock.drawn(
                    name,
                    rendered.title,
                    rendered.figure,
                    rendered.caption,
                    table=rendered.table,
                    arms=dict(request.arms),
                    notes=tuple(_notes(request)),
                )
            )
    return blocks


@contextmanager
def view(runs: Sequence[Run]) -> Iterator[tuple[Path, dict[Path, Path]]]:
    """A folder of links to finished runs, where figures search: a run still being written is not among them."""
    with tempfile.TemporaryDirectory(prefix="t2i_lm-report-") as name:
        top, folders = Path(name), dict[Path, Path]()
        for run in runs:
            link = top / run.folder.parent.name / run.folder.name
            if link not in folders:
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(run.folder.resolve(), target_is_directory=True)
                folders[link] = run.folder
        yield top, folders


def named(message: str, names: Mapping[str, str]) -> str:
    """A message with the runs' own folders."""
    for link, folder in names.items():
        message = message.replace(link, folder)
    return message


def _notes(request: RecordingRequest) -> Iterator[str]:
    arms = list(request.arms)
    for key, values in request.differing.items():
        words = ", ".join(f"{arm} {str(value)[:SHOWN]}" for arm, value in zip(arms, values, strict=False))
        yield f"NOT CONTROLLED: {key}: {words}"
    yield from revision_note(request.arms.values())
