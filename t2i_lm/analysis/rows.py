"""Geometry of the token rows over training: norms, mean cosine, distance between modalities, effective rank.

Shapes: `R` rows, `D` width.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from callbacks import read_checkpoint
from callbacks.checkpoints import checkpoints, step_of
from callbacks.files.checkpoint_io import CorruptCheckpointError, verify
from t2i_lm.analysis.base import PROBED, NotAvailableError, ProbedRun, ProbeResult, Settings
from t2i_lm.analysis.looks import grey_key
from t2i_lm.plots.panels import captioned_figure, place_legend
from t2i_lm.runtime.progress import progress
from t2i_lm.runtime.tables import compact, upper_first
from t2i_lm.storage.reading import reading
from t2i_lm.storage.run_folder import CHECKPOINTS

MATRICES = {"embedding": "tok_embeddings", "output": "output"}
DASHES: dict[str, Any] = {"text": "solid", "image": (0, (2.2, 1.3))}
MARKERS = {"embedding": "o", "output": "s"}
TITLE = "Geometry of the token rows"
# Measure of a block -> title of its panel.
PANELS = {"mean_norm": "Mean norm", "mean_cosine": "Mean cosine of two rows", "effective_rank": "Effective rank"}


def row_geometry(rows_RD: Tensor) -> dict[str, Any]:
    """Measures of a block of rows.

    Returns:
        `rows`; `mean_norm`; `mean_cosine` over all pairs of distinct rows, the anisotropy; `effective_rank`, the
        exponential of the entropy of the normalized singular values (Roy and Vetterli, 2007), at most min(R, D).
    """
    rows_RD = rows_RD.double()
    count = len(rows_RD)
    norm_R = rows_RD.norm(dim=1)
    unit_RD = rows_RD / norm_R.clamp(min=1e-30)[:, None]
    pairs = float(unit_RD.sum(0).square().sum() - unit_RD.square().sum())
    values = torch.linalg.svdvals(rows_RD) if min(rows_RD.shape) <= 1024 else _singular_values(rows_RD)
    share = values / values.sum()
    share = share[share > 0]
    return {
        "rows": count,
        "mean_norm": float(norm_R.mean()),
        "mean_cosine": pairs / (count * (count - 1)) if count > 1 else math.nan,
        "effective_rank": math.exp(float(-(share * share.log()).sum())),
    }


def _singular_values(rows_RD: Tensor) -> Tensor:
    """From the smaller Gram matrix: faster for wide models, exact enough for an entropy."""
    gram = rows_RD.T @ rows_RD if rows_RD.shape[0] > rows_RD.shape[1] else rows_RD @ rows_RD.T
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return values


def matrix_geometry(blocks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Measures of each block (R, D) and, between text and image rows, the distance of the blocks' means.

    `distance` is in units of the rows, `relative_distance` in mean norms of all rows.
    """
    found: dict[str, Any] = {name: row_geometry(rows_RD) for name, rows_RD in blocks.items()}
    text_D, image_D = (blocks[name].double().mean(0) for name in PROBED)
    norm = torch.cat([blocks[name].double().norm(dim=1) for name in PROBED]).mean()
    distance = (text_D - image_D).norm()
    return found | {"distance": float(distance), "relative_distance": float(distance / norm)}


def probe_rows(runs: Sequence[ProbedRun], settings: Settings) -> ProbeResult:
    """Of the initial weights and of every intact checkpoint that a run has kept."""
    numbers: dict[str, Any] = {}
    kept = {one.label: _intact(one) for one in runs}
    with progress("geometry of rows", sum(len(files) + 1 for files in kept.values()), unit="states") as advance:
        for one in runs:
            decoder = one.model("initial").decoder
            tied = decoder.config.weight_tying
            matrices = {name: value for name, value in MATRICES.items() if not (tied and name == "output")}
            initial = {
                name: {block: getattr(getattr(decoder, module), block).detach().cpu() for block in PROBED}
                for name, module in matrices.items()
            }
            steps = {0: _measures(initial)}
            advance(1)
            for file in kept[one.label]:
                steps[step_of(file)] = _measures(_rows_of(file, matrices))
                advance(1)
            numbers[one.label] = {"tied": tied, "steps": steps}
    example = next(iter(numbers.values()))["steps"][0]["embedding"]
    sizes = " and ".join(f"{example[block]['rows']:,} {block} rows" for block in PROBED)
    shown = "; ".join(f"{one.look.label} {', '.join(f'{s:,}' for s in numbers[one.label]['steps'])}" for one in runs)
    how = (
        f"All {sizes} of the embedding and of the output, in the initial weights (step 0) and in the checkpoints that "
        f"the runs keep ({shown}); lines only join them. Distance: between the means of text and of image rows, in "
        "mean row norms. Effective rank: exponential of the entropy of the normalized singular values, at most "
        f"{min(example['text']['rows'], decoder.config.hidden_dim):,} for text rows."
    )
    return ProbeResult(TITLE, _sentence(runs, numbers), how, numbers, partial(_draw, list(runs), numbers))


def _measures(matrices: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {name: matrix_geometry(blocks) for name, blocks in matrices.items()}


def _intact(one: ProbedRun) -> list[Path]:
    files = []
    for file in checkpoints(one.run.folder / CHECKPOINTS):
        try:
            verify(file)
        except CorruptCheckpointError:
            continue  # `newest_checkpoint` has named the damaged ones
        files.append(file)
    return files


def _rows_of(file: Path, matrices: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The rows alone; the rest of the file is not read."""
    with reading("checkpoint", file):
        state = read_checkpoint(file, mmap=True, only="state_dict")["state_dict"]
    try:
        return {
            name: {block: state[f"decoder.{module}.{block}"] for block in PROBED} for name, module in matrices.items()
        }
    except KeyError as error:
        raise NotAvailableError(f"{file} has no {error.args[0]}") from error


def _sentence(runs: Sequence[ProbedRun], numbers: Mapping[str, Any]) -> str:
    parts = []
    for one in runs:
        steps = numbers[one.label]["steps"]
        matrix = "output" if "output" in steps[0] else "embedding"
        first, last = steps[0][matrix], steps[max(steps)][matrix]
        changes = [
            f"mean norm of {block} rows {first[block]['mean_norm']:.2f} to {last[block]['mean_norm']:.2f}, their mean "
            f"cosine {first[block]['mean_cosine']:z.2f} to {last[block]['mean_cosine']:z.2f}"
            for block in PROBED
        ]
        parts.append(f"{one.look.label} ({matrix}, step 0 to {max(steps):,}): {'; '.join(changes)}")
    parts = [upper_first(part) for part in parts]
    sizes = " and ".join(f"{first[block]['rows']:,} {block}" for block in PROBED)
    return f"{'. '.join(parts)} (all {sizes} rows, one run each)."


def _draw(runs: list[ProbedRun], numbers: dict[str, Any], caption: str) -> Figure:
    with captioned_figure(caption, 5.6) as figure:
        norm, cosine, distance, rank = figure.subplots(2, 2, sharex=True).ravel()
        for one in runs:
            steps = numbers[one.label]["steps"]
            for matrix in MATRICES:
                if matrix not in steps[0]:
                    continue
                for axes, key in ((norm, "mean_norm"), (cosine, "mean_cosine"), (rank, "effective_rank")):
                    for block in PROBED:
                        values = [entry[matrix][block][key] for entry in steps.values()]
                        _line(axes, one, list(steps), values, MARKERS[matrix], DASHES[block], f"{matrix}/{block}")
                values = [entry[matrix]["relative_distance"] for entry in steps.values()]
                _line(distance, one, list(steps), values, MARKERS[matrix], "solid", matrix)
        for axes, key in ((norm, "mean_norm"), (cosine, "mean_cosine"), (rank, "effective_rank")):
            axes.set_title(PANELS[key], loc="left")
        distance.set_title("Distance of modality means / mean norm", loc="left")
        for axes in (distance, rank):
            axes.set_xlabel("optimizer steps")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        keys = [grey_key(f"{block} rows", linestyle=DASHES[block]) for block in PROBED]
        keys += [grey_key(matrix, linestyle="none", marker=MARKERS[matrix]) for matrix in MATRICES]
        colors = [grey_key(one.look.label, color=one.look.color) for one in runs]
        place_legend(figure, [*colors, *keys])
    return figure


def _line(
    axes: Axes, one: ProbedRun, steps: list[int], values: list[float], marker: str, dashes: Any, gid: str
) -> None:
    axes.plot(
        steps,
        values,
        color=one.look.color,
        marker=marker,
        markersize=4.5,
        linestyle=dashes,
        linewidth=1.4,
        gid=f"{one.label}/{gid}",
    )
