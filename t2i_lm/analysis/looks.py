"""Looks of the modalities, the same in every figure of a probe; runs have those of their arms."""

from collections.abc import Sequence
from typing import Any

from matplotlib.lines import Line2D

from t2i_lm.analysis.base import ProbedRun
from t2i_lm.plots.panels import GREY, ArmStyle

MODALITY_LOOKS = {
    "text": ArmStyle("text tokens", "#009E73", "o"),
    "image": ArmStyle("image tokens", "#CC79A7", "s"),
}


def run_keys(runs: Sequence[ProbedRun]) -> list[Line2D]:
    """Legend entries of runs, by color and marker."""
    return [
        Line2D([], [], color=one.look.color, marker=one.look.marker, linewidth=2, label=one.look.label) for one in runs
    ]


def grey_key(label: str, **look: Any) -> Line2D:
    """A legend entry of a line style or marker that all runs share."""
    return Line2D([], [], **{"color": GREY, "linewidth": 1.6, "label": label, **look})
