"""Figure 2: zero-shot COCO FID of published systems against their release date, with our own where they exist."""

import csv
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from matplotlib.figure import Figure

from t2i_lm.plots import captioned_figure

PUBLISHED = Path(__file__).with_name("published_fid.csv")
# Family -> colour and marker.
FAMILIES = {"auto-regressive": ("#0072B2", "o"), "diffusion": ("#D55E00", "s"), "this suite": ("#009E73", "P")}


@dataclass(frozen=True)
class System:
    """A system's number, and where it comes from."""

    name: str
    released: date
    family: str
    fid: float
    source: str
    note: str = ""


def published_systems(path: Path = PUBLISHED) -> list[System]:
    """The systems of a CSV with the columns of `System`.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    systems = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                fid, family = float(row["fid"]), row["family"]
                if family not in FAMILIES or not row["source"]:
                    raise ValueError(f"family {family!r}, source {row['source']!r}")
                released = date.fromisoformat(row["released"])
                systems.append(System(row["name"], released, family, fid, row["source"], row["note"] or ""))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} line {number} cannot be read: {error}") from error
    return systems


def own_systems(runs: Path) -> list[System]:
    """Every evaluation below a folder of runs (`t2i_lm.evaluate --coco`), under the title that its card allows."""
    systems = []
    for path in sorted(runs.glob("*/*/evaluations/*/coco.json")):
        result = json.loads(path.read_text())
        finished = date.fromisoformat(result["environment"]["finished"][:10])
        run = f"{path.parents[3].name}/{result['run']}"
        systems.append(System(f"{path.parents[3].name}: {result['title']}", finished, "this suite", result["fid"], run))
    return systems


def draw_systems(systems: list[System], caption: str) -> Figure:
    """The scatter: one marker a system, its name beside it, one colour a family."""
    with captioned_figure(caption) as figure:
        axes = figure.subplots()
        for family, (colour, marker) in FAMILIES.items():
            own = [system for system in systems if system.family == family]
            if own:
                dates = [_day(system) for system in own]
                values = [system.fid for system in own]
                axes.plot(dates, values, linestyle="none", color=colour, marker=marker, label=family, gid=family)
        for number, system in enumerate(systems):
            crowded = any(_near(system, other) for other in systems[:number])
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
    """Whether two labels on one side of their markers would overlap."""
    return abs(_day(one) - _day(other)) < 90 and abs(one.fid - other.fid) < 1


def _day(system: System) -> float:
    """The date as matplotlib counts: days since 1970."""
    return float((system.released - date(1970, 1, 1)).days)


def system_table(systems: list[System]) -> str:
    """Every number with its source, as text."""
    lines = [f"{'system':<40}{'released':>12}{'FID':>8}  source"]
    for one in systems:
        note = f" ({one.note})" if one.note else ""
        lines.append(f"{one.name:<40}{one.released.isoformat():>12}{one.fid:>8.2f}  {one.source}{note}")
    return "\n".join(lines)
