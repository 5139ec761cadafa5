"""Thinned training lines of a run's metrics: the curves look the same, everything else is equal.

Kept as they are: every validation, measurement of forgetting and other line; every training line without a loss by
modality (of an alignment, a sentence says when its temperature reaches the bound); and the last line of each kind,
which endpoints read. Of the other training lines those stay that the curves and tables need, without clocks, and with
`DIGITS` digits but for the sums and counts, of which tables form means.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from t2i_lm.storage.run_folder import Run

TRAIN, MODALITIES = "train", ("text", "image")
EXACT = ("nll_sum", "count")
CLOCKS = ("throughput", "time")
DIGITS = 6
EVENLY = 40  # lines at equal distances
# Final share of the steps of which all lines are kept: `plots/sweep.py` forms the mean training loss of it.
LATE = 0.1
# Largest error of a smoothed curve between kept lines, in heights of its panel: less than half the width of the line.
TOLERANCE = 0.005


def thinned_records(run: Run) -> list[dict[str, Any]]:
    """The lines of a run without those that its figures and tables can do without."""
    last = {key: number for number, record in enumerate(run.metrics) for key in record}
    whole = {last[key] for key in last if isinstance(run.metrics[last[key]][key], Mapping)}
    train = [number for number, record in enumerate(run.metrics) if _is_split_loss(record)]
    kept = {train[place] for place in kept_places([run.metrics[number] for number in train])}
    records = []
    for number, record in enumerate(run.metrics):
        if number in kept and number not in whole:
            short = {key: value for key, value in record.items() if key not in CLOCKS}
            records.append(short | {TRAIN: {name: _rounded(entry) for name, entry in record[TRAIN].items()}})
        elif number in whole or number not in train:
            records.append(record)
    return records


def _is_split_loss(record: Mapping[str, Any]) -> bool:
    """Whether a training line has a loss by modality."""
    return any(isinstance(record.get(TRAIN, {}).get(name), Mapping) for name in MODALITIES)


def kept_places(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the training lines that are kept, of those of a run in order."""
    if not lines:
        return []
    late = (1 - LATE) * lines[-1]["step"]
    kept = {int(place) for place in np.linspace(0, len(lines) - 1, min(len(lines), EVENLY)).round()}
    kept |= {place for place, line in enumerate(lines) if line["step"] > late}
    for modality in {name for line in lines for name in line[TRAIN]}:
        entries = [(place, line[TRAIN].get(modality, {})) for place, line in enumerate(lines)]
        own = [
            (place, entry["nll"], entry["nll_ema"]) for place, entry in entries if {"nll", "nll_ema"} <= entry.keys()
        ]
        if own:
            places, raw, smooth = (np.array(column) for column in zip(*own, strict=True))
            kept |= {int(places[one]) for curve in (raw, smooth) for one in (curve.argmin(), curve.argmax())}
            height = max(raw.max(), smooth.max()) - min(raw.min(), smooth.min())
            kept |= _needed(places, smooth, kept, TOLERANCE * height)
    return sorted(kept)


def _needed(places: "np.ndarray[Any, Any]", curve: "np.ndarray[Any, Any]", kept: set[int], error: float) -> set[int]:
    """Places to keep, beside `kept`, so that the curve between them is at most `error` away from a straight line."""
    chosen = sorted({0, len(places) - 1, *(number for number, place in enumerate(places) if int(place) in kept)})
    gaps = list(pairwise(chosen))
    added = {chosen[0], chosen[-1]}
    while gaps:
        start, end = gaps.pop()
        line = np.interp(places[start : end + 1], places[[start, end]], curve[[start, end]])
        distances = np.abs(curve[start : end + 1] - line)
        if distances.max() > error:
            middle = start + int(distances.argmax())
            added.add(middle)
            gaps += [(start, middle), (middle, end)]
    return {int(places[number]) for number in added}


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if key in EXACT else float(f"{value:.{DIGITS}g}") for key, value in entry.items()}
