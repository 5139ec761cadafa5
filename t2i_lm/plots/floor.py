"""The lower bound of a modality's loss in a panel."""

import math
from collections.abc import Iterable
from dataclasses import replace

from t2i_lm.plots.curves import floor_nll
from t2i_lm.plots.panels import Panel
from t2i_lm.storage.run_folder import Run

# What the floor of a modality's loss is.
FLOORS = {"text": "the captions' entropy", "image": "the images' entropy given their captions"}
UNCAPTIONED = "the images' entropy"


def with_floor(panel: Panel, runs: Iterable[Run], modality: str, unit: str) -> Panel:
    """The panel with the floor of a modality's loss, where a report has it."""
    arms = [*runs]
    nll = floor_nll(arms, modality)
    if nll is None:
        return panel
    floor = math.exp(nll) if unit == "ppl" else nll
    words = UNCAPTIONED if arms[0].config["task"] == "unconditional" else FLOORS[modality]
    return replace(panel, floor=floor, floor_label=f"floor, {words}: {floor:.3g}")
