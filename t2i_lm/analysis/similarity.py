"""Similarity of states and distance of weights: of a run's initial and trained model, and of two runs, by layer.

Shapes: `S` sequences, `T` positions, `N` chosen positions, `D` width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from t2i_lm.analysis.base import NotAvailableError, ProbedRun, ProbeResult, Settings, State
from t2i_lm.analysis.cka import Estimate, grouped_cka
from t2i_lm.analysis.looks import grey_key, run_keys
from t2i_lm.analysis.states import Positions, groups_of, layer_states, positions_of, require_same_sequences
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.image_adapters import is_restricted
from t2i_lm.models.lora import merge_adapters
from t2i_lm.models.parameter_kinds import parameter_places
from t2i_lm.plots.panels import GREY, captioned_figure, place_legend
from t2i_lm.runtime.progress import progress

GROUPS = 8  # of sequences, for the standard error
STATES: tuple[State, ...] = ("trained", "initial")
TITLE = "Similarity of hidden states and distance of weights by layer"
DRAWN_KINDS = {"attention": "solid", "ffn": "dashed"}


def weight_distances(initial: Backbone, trained: Backbone) -> dict[str, dict[str, float]]:
    """Relative Frobenius distance |W - W0| / |W0| by place: `embedding.text`, `layer 1.attention`, `norm`, ....

    Returns:
        For each place `distance` (NaN where W0 is 0) and `parameters`. Adapters are merged into both models.

    Raises:
        NotAvailableError: if adapters apply to image positions alone, so that no one matrix has both.
    """
    _require_mergeable(trained)
    for model in (initial, trained):
        merge_adapters(model)
    sums: dict[str, list[float]] = {}
    seen: set[int] = set()
    after = dict(trained.named_parameters(remove_duplicate=False))
    for place in parameter_places(initial):
        if id(place.parameter) in seen:  # a tied matrix, under its second name
            continue
        seen.add(id(place.parameter))
        start, end = (value.detach().double().cpu() for value in (place.parameter, after[place.name]))
        kind = place.kind or "other"
        inside = kind if place.layer is None else f"layer {place.layer + 1}.{kind}"
        entry = sums.setdefault(f"{kind}.{place.rows}" if place.rows else inside, [0.0, 0.0, 0])
        entry[0] += float((end - start).square().sum())
        entry[1] += float(start.square().sum())
        entry[2] += start.numel()
    return {
        name: {"distance": math.sqrt(moved / norm) if norm else math.nan, "parameters": int(count)}
        for name, (moved, norm, count) in sums.items()
    }


def _require_mergeable(model: Backbone) -> None:
    if is_restricted(model):
        raise NotAvailableError("adapters that apply to image positions alone (lora.image_only) cannot be merged")


@dataclass(frozen=True)
class Comparison:
    """Two models whose states are compared: initial and trained of one run, or both runs in one state."""

    one: ProbedRun
    one_state: State
    other: ProbedRun
    other_state: State

    @property
    def within(self) -> bool:
        """Whether it is of one run."""
        return self.one is self.other

    @property
    def name(self) -> str:
        """Its key among the numbers."""
        if self.within:
            return f"{self.one.label}: initial and trained"
        return f"{self.one.label} and {self.other.label}: {self.one_state}"


def comparisons(runs: Sequence[ProbedRun]) -> list[Comparison]:
    """Initial and trained of each run; the first run and each other one, both trained and both initial."""
    within = [Comparison(one, "initial", one, "trained") for one in runs]
    between = [Comparison(runs[0], state, other, state) for other in runs[1:] for state in STATES]
    return [*within, *between]


def layer_cka(one: list[Tensor], other: list[Tensor], sequence_N: Tensor, sequences: int) -> list[Estimate]:
    """Debiased CKA of two models' states (N, D) of the same positions by layer; jackknife over groups of sequences."""
    groups = min(GROUPS, sequences)
    group_N = groups_of(sequence_N, sequences, groups)
    return [grouped_cka(x_ND, y_ND, group_N, groups) for x_ND, y_ND in zip(one, other, strict=True)]


def probe_similarity(runs: Sequence[ProbedRun], settings: Settings) -> ProbeResult:
    """Of each run's initial and trained model, and of the first run's models and those of each other run."""
    states: dict[tuple[str, State], dict[str, list[Tensor]]] = {}
    distances: dict[str, Any] = {}
    given: list[Tensor] = []
    places: dict[str, Positions] = {}
    with progress("hidden states", 2 * len(runs) * settings.sequences, unit="sequences") as advance:
        for one in runs:
            models = {state: one.model(state) for state in STATES}
            _require_mergeable(models["trained"].decoder)
            ids_ST = one.sequences(models["initial"].layout, settings.sequences, one.held_out)
            given.append(ids_ST)
            places = positions_of(ids_ST, models["initial"])
            for state, model in models.items():
                states[one.label, state] = layer_states(model.decoder, ids_ST, places, advance)
            distances[one.label] = weight_distances(models["initial"].decoder, models["trained"].decoder)
    require_same_sequences(given)
    sequences = len(given[0])
    pairs = comparisons(runs)
    cka: dict[str, dict[str, list[Estimate]]] = {}
    with progress("CKA", len(pairs) * len(places), unit="curves") as advance:
        for pair in pairs:
            first, second = states[pair.one.label, pair.one_state], states[pair.other.label, pair.other_state]
            cka[pair.name] = {}
            for name, place in places.items():
                cka[pair.name][name] = layer_cka(first[name], second[name], place.sequence_N, sequences)
                advance(1)
    counts = {name: len(place.index_N) for name, place in places.items()}
    numbers = {
        "sequences": sequences,
        "positions": counts,
        "cka": {
            pair: {name: [one._asdict() for one in layers] for name, layers in found.items()}
            for pair, found in cka.items()
        },
        "weight_distance": distances,
    }
    counted = " and ".join(f"{count:,} {name} positions" for name, count in counts.items())
    how = (
        f"Linear CKA, debiased, on {counted} of {sequences:,} held-out sequences, after the embedding (layer 0) and "
        f"after every block; bars: standard error, jackknife over {min(GROUPS, sequences)} groups of sequences. Right: "
        "Frobenius norm of the change from the initial weights over that of the initial weights; E, O: text rows of "
        "embedding and output."
    )
    return ProbeResult(TITLE, _sentence(pairs, cka), how, numbers, partial(_draw, list(runs), pairs, cka, distances))


def _sentence(pairs: Sequence[Comparison], cka: Mapping[str, Mapping[str, list[Estimate]]]) -> str:
    parts = []
    for pair in pairs:
        values = ", ".join(
            f"{name} {layers[-1].value:.2f} ± {layers[-1].se:.2f}" for name, layers in cka[pair.name].items()
        )
        state = "initial and trained" if pair.within else f"both {pair.one_state}"
        labels = dict.fromkeys(one.look.label for one in (pair.one, pair.other))
        parts.append(f"{' and '.join(labels)}, {state}: {values}")
    return f"CKA of the states after the last block: {'; '.join(parts)} (± standard error, one run each)."


def _draw(
    runs: list[ProbedRun],
    pairs: Sequence[Comparison],
    cka: Mapping[str, Mapping[str, list[Estimate]]],
    distances: Mapping[str, Mapping[str, Mapping[str, float]]],
    caption: str,
) -> Figure:
    modalities = list(next(iter(cka.values())))
    with captioned_figure(caption) as figure:
        *panels, weights = figure.subplots(1, len(modalities) + 1)
        for axes, name in zip(panels, modalities, strict=True):
            for pair in pairs:
                layers = cka[pair.name][name]
                axes.errorbar(
                    np.arange(len(layers)),
                    [one.value for one in layers],
                    [one.se for one in layers],
                    markersize=4,
                    linewidth=1.5,
                    capsize=2,
                    gid=f"{name}/{pair.name}",
                    **_look(pair, len(runs)),
                )
            axes.set(ylim=(-0.05, 1.05), xlabel="layer", ylabel="CKA" if axes is panels[0] else "")
            axes.set_title(f"{name.capitalize()} positions", loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for one in runs:
            _draw_distances(weights, one, distances[one.label])
        weights.set_ylim(bottom=0)
        keys = [grey_key("between runs, trained", color="black", marker="D")] if len(runs) > 1 else []
        keys += [grey_key("between runs, initial", marker="D", linestyle=":")] if len(runs) > 1 else []
        own = run_keys(runs)
        for key in own:
            key.set_label(f"{key.get_label()}, initial to trained")
        place_legend(figure, [*own, *keys])
    return figure


def _look(pair: Comparison, runs: int) -> dict[str, Any]:
    """Within a run the run's own; between two runs black for trained and grey for initial, or the other's color."""
    if pair.within:
        return {"color": pair.one.look.color, "marker": pair.one.look.marker, "linestyle": pair.one.look.dashes}
    trained = pair.one_state == "trained"
    color = pair.other.look.color if runs > 2 else "black" if trained else GREY
    return {"color": color, "marker": "D", "linestyle": "-" if trained else ":"}


def _draw_distances(axes: Axes, one: ProbedRun, found: Mapping[str, Mapping[str, float]]) -> None:
    layers = 0
    for kind, dashes in DRAWN_KINDS.items():
        of_kind = [entry["distance"] for name, entry in found.items() if name.endswith(f".{kind}")]
        layers = max(layers, len(of_kind))
        label = kind.replace("ffn", "feed-forward")
        axes.plot(
            range(1, len(of_kind) + 1),
            of_kind,
            color=one.look.color,
            marker=one.look.marker,
            markersize=4,
            linestyle=dashes,
            linewidth=1.5,
            label=label,
            gid=f"{one.label}/{kind}",
        )
    for place, matrix in ((0, "embedding"), (layers + 1, "output")):
        if f"{matrix}.text" in found:
            axes.plot(place, found[f"{matrix}.text"]["distance"], one.look.marker, color=one.look.color, markersize=6)
    axes.set_xticks(range(layers + 2), ["E", *map(str, range(1, layers + 1)), "O"])
    axes.set_xlabel("layer")
    axes.set_title("Change of weights", loc="left")
    handles = [grey_key(kind.replace("ffn", "feed-forward"), linestyle=dashes) for kind, dashes in DRAWN_KINDS.items()]
    axes.legend(handles=handles, fontsize=8)
