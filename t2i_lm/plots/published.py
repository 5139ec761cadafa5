"""Figure 2: zero-shot COCO FID of published systems by release date, and of our own runs."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from t2i_lm.evaluation.base import of_last_checkpoint, read_result
from t2i_lm.evaluation.protocol_card import CANONICAL, HEADLINE
from t2i_lm.plots.panels import captioned_figure
from t2i_lm.runtime.tables import text_table

PUBLISHED = Path(__file__).with_name("published_fid.csv")
# Source of a published number: the system's authors, or others who read it off the authors' plot.
STATED_BY = ("authors", "others")
# Family -> color and marker.
FAMILIES = {"auto-regressive": ("#0072B2", "o"), "diffusion": ("#D55E00", "s"), "this suite": ("#009E73", "P")}


@dataclass(frozen=True)
class System:
    """A system's FID and its source.

    Attributes:
        stated_by: one of `STATED_BY`.
        canonical: of our own numbers, whether it may be called COCO FID-30k (`t2i_lm.evaluation.protocol_card`).
        features: width of the compared Inception layer; another width is another scale.
    """

    name: str
    released: date
    family: str
    fid: float
    source: str
    note: str = ""
    stated_by: str = "authors"
    canonical: bool = True
    features: int = CANONICAL["features"]

    @property
    def plotted(self) -> bool:
        """Whether it is on the scale of the published numbers."""
        return bool(self.features == CANONICAL["features"])


def published_systems(path: Path = PUBLISHED) -> list[System]:
    """The systems of a CSV that has the columns of `System` except `canonical` and `features`.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    systems = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                fid, family, by = float(row["fid"]), row["family"], row["stated_by"]
                if family not in FAMILIES or by not in STATED_BY or not row["source"]:
                    raise ValueError(f"family {family!r}, stated_by {by!r}, source {row['source']!r}")
                released = date.fromisoformat(row["released"])
                systems.append(System(row["name"], released, family, fid, row["source"], row["note"] or "", by))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} line {number} cannot be read: {error}") from error
    return systems


def own_systems(folders: Iterable[Path]) -> list[System]:
    """Every `t2i_lm.evaluate --coco` result in some run folders, under the title that its card allows.

    Raises:
        ValueError: naming the file that cannot be read.
    """
    systems = []
    for path in sorted(path for folder in folders for path in folder.glob("evaluations/*/coco.json")):
        result = read_result(path)
        try:
            experiment, differs, folder = path.parents[3].name, result["differs"], path.parents[2]
            last = of_last_checkpoint(folder, result.get("checkpoint_sha256", ""))
            earlier = "" if last else f" ({Path(result['checkpoint']).stem}, an earlier checkpoint)"
            systems.append(
                System(
                    name=f"{experiment}{earlier}: {result['title']}",
                    released=date.fromisoformat(result["environment"]["finished"][:10]),
                    family="this suite",
                    fid=result["fid"],
                    source=f"{experiment}/{result['run']}",
                    note="; ".join(differs),
                    canonical=not differs,
                    features=result["card"]["features"],
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error!r}") from error
    return systems


def systems_caption(systems: list[System]) -> str:
    """Sentences on the origin of the numbers and on those that are not comparable."""
    others = ", ".join(f"{system.name}'s" for system in systems if system.stated_by == "others")
    read_off = f" ({others} is what others read off its authors' plot)" if others else ""
    sentences = [
        f"Published values are the authors' own{read_off}, each under its own protocol: differences of resizer, "
        "network or captions move FID by several points.",
        "Sources are in t2i_lm/plots/published_fid.csv.",
    ]
    if any(system.plotted and not system.canonical for system in systems):
        sentences.append(
            f"Hollow markers are no {HEADLINE} and not comparable: fewer images, for example, give a higher value."
        )
    if missing := sum(not system.plotted for system in systems):
        sentences.append(f"Not drawn: {missing} of ours, whose features are not {CANONICAL['features']:,} wide.")
    return " ".join(sentences)


def draw_systems(systems: list[System], caption: str) -> Figure:
    """Scatter of FID by date: one labeled marker per system, one color per family, hollow where not comparable."""
    shown = [system for system in systems if system.plotted]
    with captioned_figure(caption) as figure:
        axes = figure.subplots()
        for (family, (color, marker)), canonical in product(FAMILIES.items(), (True, False)):
            own = [system for system in shown if (system.family, system.canonical) == (family, canonical)]
            if own:
                axes.plot(
                    [_day(system) for system in own],
                    [system.fid for system in own],
                    linestyle="none",
                    color=color,
                    marker=marker,
                    markerfacecolor=color if canonical else "none",
                    label=family if canonical else f"{family}, no {HEADLINE}",
                    gid=family if canonical else f"{family}/hollow",
                )
        for number, system in enumerate(shown):
            crowded = any(_near(system, other) for other in shown[:number])
            axes.annotate(
                system.name,
                (_day(system), system.fid),
                xytext=(5, -11 if crowded else 4),
                textcoords="offset points",
                fontsize=8,
                color=FAMILIES[system.family][0],
            )
        axes.xaxis_date()
        axes.margins(0.12)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("zero-shot FID on COCO")
        axes.set_xlabel("released")
        axes.legend(loc="upper right")
    return figure


def _near(one: System, other: System) -> bool:
    """Whether the labels of two systems would overlap."""
    return abs(_day(one) - _day(other)) < 90 and abs(one.fid - other.fid) < 1


def _day(system: System) -> float:
    """The date as matplotlib counts: days since 1970."""
    return float((system.released - date(1970, 1, 1)).days)


def system_table(systems: list[System]) -> str:
    """Every number with its source."""
    rows = []
    for one in systems:
        notes = [*([one.note] if one.note else []), *([] if one.plotted else ["not drawn"])]
        source = one.source + (f" ({'; '.join(notes)})" if notes else "")
        rows.append((one.name, one.released.isoformat(), f"{one.fid:.2f}", source))
    return text_table(("system", "released", "FID", "source"), rows, left=(0, 3))
