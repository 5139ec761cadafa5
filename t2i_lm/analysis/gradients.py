"""Cosine between the gradients of text and of image loss, by kind of parameter and by layer.

Shapes: `B` sequences, `T` positions, `P` parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from t2i_lm.analysis.base import PROBED, NotAvailableError, ProbedRun, ProbeResult, Settings, State
from t2i_lm.analysis.cka import Estimate
from t2i_lm.analysis.looks import grey_key
from t2i_lm.experiment.build import ImageModel
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.packing import TargetIndex
from t2i_lm.models.parameter_kinds import parameter_places
from t2i_lm.plots.panels import captioned_figure, place_legend
from t2i_lm.runtime.progress import progress
from t2i_lm.tokenizers.layout import MODALITIES, modality_of_target

STATES: tuple[State, ...] = ("initial", "trained")
ALL = "all"
TITLE = "Agreement of the gradients of text and of image loss"


@dataclass
class Products:
    """Inner products of the two gradients over a group of parameters, of one batch."""

    text: float = 0.0
    image: float = 0.0
    both: float = 0.0

    def add(self, other: "Products") -> None:
        """Those of a larger group."""
        self.text, self.image, self.both = self.text + other.text, self.image + other.image, self.both + other.both

    @property
    def cosine(self) -> float:
        """NaN where a gradient is zero."""
        norms = math.sqrt(self.text * self.image)
        return self.both / norms if norms else math.nan

    @property
    def ratio(self) -> float:
        """Norm of the text gradient over that of the image gradient; NaN where the latter is zero."""
        return math.sqrt(self.text / self.image) if self.image else math.nan


@dataclass
class Agreement:
    """Cosine and ratio of norms of one group of parameters.

    Attributes:
        batches: per batch.
        of_mean: of the mean gradients over all batches, in which there is less noise of batches.
        parameters: number of parameters.
    """

    parameters: int = 0
    batches: list[Products] = field(default_factory=list)
    of_mean: Products = field(default_factory=Products)

    @property
    def cosine(self) -> Estimate:
        """Mean over batches with its standard error."""
        return _mean([one.cosine for one in self.batches])

    @property
    def ratio(self) -> Estimate:
        """Mean over batches with its standard error."""
        return _mean([one.ratio for one in self.batches])

    def numbers(self) -> dict[str, Any]:
        """All values by name."""
        return {
            "parameters": self.parameters,
            "cosine": self.cosine._asdict(),
            "norm_ratio": self.ratio._asdict(),
            "cosine_of_mean_gradients": self.of_mean.cosine,
            "norm_ratio_of_mean_gradients": self.of_mean.ratio,
        }


def _mean(values: list[float]) -> Estimate:
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(known):
        return Estimate(math.nan, math.nan, 0)
    se = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(float(known.mean()), se, len(known))


def trainable_groups(decoder: Backbone) -> dict[str, tuple[str, ...]]:
    """Groups of each trainable parameter by name: `all`, its kind, and `layer N.KIND` in a block.

    A tied matrix is of the kind `embedding`.
    """
    found: dict[str, tuple[str, ...]] = {}
    seen: set[int] = set()
    for place in parameter_places(decoder):
        if not place.parameter.requires_grad or id(place.parameter) in seen:
            continue
        seen.add(id(place.parameter))
        kind = place.kind or "other"
        inside = () if place.layer is None else (f"layer {place.layer + 1}.{kind}",)
        found[place.name] = (ALL, kind, *inside)
    return found


def modality_gradients(
    decoder: Backbone, ids_BT: Tensor, modality_BT: Tensor, names: Sequence[str]
) -> list[list[Tensor]]:
    """Gradients of the mean text loss and of the mean image loss (nats/token) by parameter, zero where it has none.

    Args:
        decoder: in evaluation mode.
        ids_BT: joint ids.
        modality_BT: of the targets, which are `ids_BT` from the second on, (B, T - 1).
        names: parameters.

    Raises:
        NotAvailableError: if there are no targets of a modality.
    """
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    chosen = [parameters[name] for name in names]
    hidden_BTD = decoder.hidden(ids_BT[:, :-1])
    gradients = []
    for number, modality in enumerate(PROBED):
        index = TargetIndex.from_mask(modality_BT == MODALITIES.index(modality))
        if not len(index.index_M):
            raise NotAvailableError(f"there are no {modality} targets, so there is no {modality} loss")
        loss = decoder.output.loss(index.select(hidden_BTD), index.select(ids_BT[:, 1:])).total / len(index.index_M)
        found = torch.autograd.grad(loss, chosen, retain_graph=number == 0, allow_unused=True)
        gradients.append(
            [torch.zeros_like(value) if one is None else one for one, value in zip(found, chosen, strict=True)]
        )
    return gradients


def gradient_agreement(
    decoder: Backbone, batches: Sequence[tuple[Tensor, Tensor]], advance: Any = lambda count: None
) -> dict[str, Agreement]:
    """Agreement by group over batches of ids (B, T) and modalities of their targets (B, T - 1)."""
    groups = trainable_groups(decoder)
    names = list(groups)
    found: dict[str, Agreement] = {}
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    for name in names:
        for group in groups[name]:
            found.setdefault(group, Agreement()).parameters += parameters[name].numel()
    sums: list[list[Tensor]] = []
    for ids_BT, modality_BT in batches:
        gradients = modality_gradients(decoder, ids_BT, modality_BT, names)
        for agreement in found.values():
            agreement.batches.append(Products())
        for place, name in enumerate(names):
            own = _products(gradients[0][place], gradients[1][place])
            for group in groups[name]:
                found[group].batches[-1].add(own)
        if sums:
            for total, gradient in zip(sums, gradients, strict=True):
                torch._foreach_add_(total, gradient)
        else:
            sums = gradients
        advance(1)
    for place, name in enumerate(names):
        own = _products(sums[0][place], sums[1][place])
        for group in groups[name]:
            found[group].of_mean.add(own)
    return found


def _products(text: Tensor, image: Tensor) -> Products:
    text, image = text.flatten().double(), image.flatten().double()
    return Products(float(text @ text), float(image @ image), float(text @ image))


def probe_gradients(runs: Sequence[ProbedRun], settings: Settings) -> ProbeResult:
    """Of each run's initial and trained model on the same training batches."""
    found: dict[str, dict[State, dict[str, Agreement]]] = {}
    targets = dict.fromkeys(PROBED, 0)
    size = min(settings.batch, runs[0].config.data.batch_size)
    with progress("gradients", len(STATES) * len(runs) * settings.batches, unit="batches") as advance:
        for one in runs:
            found[one.label] = {}
            for state in STATES:
                batches = _batches(one, model := one.model(state), settings.batches, size)
                for name in PROBED:
                    targets[name] = sum(int((modality == MODALITIES.index(name)).sum()) for _, modality in batches)
                found[one.label][state] = gradient_agreement(model.decoder, batches, advance)
    used = len(batches)
    numbers = {
        "batches": used,
        "sequences_per_batch": size,
        "targets": targets,
        "runs": {
            label: {
                state: {group: one.numbers() for group, one in of_state.items()} for state, of_state in states.items()
            }
            for label, states in found.items()
        },
    }
    how = (
        f"{used} batches of {size} training sequences ({targets['text']:,} text and {targets['image']:,} image targets "
        "in all), without dropout; gradients of the mean text and of the mean image loss with respect to the trained "
        "parameters. Bars: standard error over batches. The noise of a batch draws cosines toward 0: crosses show the "
        "cosine of the mean gradients of all batches."
    )
    return ProbeResult(TITLE, _sentence(runs, found), how, numbers, partial(_draw, list(runs), found))


def _batches(one: ProbedRun, model: ImageModel, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of evenly spaced training sequences, without a smaller last one."""
    device = model.decoder.output.text.device
    ids_ST = one.sequences(model.layout, count * size, "train").to(device)
    modality_ST = modality_of_target(ids_ST[:, 1:], model.layout.vocab)
    whole = max(1, len(ids_ST) // size)
    return [(ids_ST[n * size : (n + 1) * size], modality_ST[n * size : (n + 1) * size]) for n in range(whole)]


def _sentence(runs: Sequence[ProbedRun], found: Mapping[str, Mapping[State, Mapping[str, Agreement]]]) -> str:
    parts = []
    for one in runs:
        values = []
        for state in STATES:
            cosine, ratio = found[one.label][state][ALL].cosine, found[one.label][state][ALL].ratio
            values.append(f"{state} {cosine.value:+z.3f} ± {cosine.se:.3f} (|text| / |image| {ratio.value:.2g})")
        parts.append(f"{one.look.label} {', '.join(values)}")
    count = found[runs[0].label]["trained"][ALL].cosine.n
    return (
        f"Cosine of text and image gradients over all parameters: {'; '.join(parts)}; ± standard error of {count} "
        "batches, one run each."
    )


def _layer(group: str) -> int:
    """The number in `layer N.KIND`."""
    return int(group.partition(".")[0].removeprefix("layer "))


def _draw(runs: list[ProbedRun], found: Mapping[str, Mapping[State, Mapping[str, Agreement]]], caption: str) -> Figure:
    groups_of_runs = dict.fromkeys(group for states in found.values() for group in states["trained"])
    kinds = [ALL, *(group for group in groups_of_runs if group != ALL and not group.startswith("layer "))]
    layered = {}  # groups of the layers in which a kind is trained: of frozen ones there are none
    for kind in ("attention", "ffn"):
        groups = [group for group in groups_of_runs if group.startswith("layer ") and group.endswith(f".{kind}")]
        if groups:
            layered[kind] = sorted(groups, key=_layer)
    columns = [*kinds, *(group for groups in layered.values() for group in groups)]
    labels = {"ffn": "feed-fwd", "embedding": "embed."}
    with captioned_figure(caption, 5.2) as figure:
        cosines, ratios = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
        curves = [(one, state) for one in runs for state in STATES]
        for number, (one, state) in enumerate(curves):
            shift = 0.7 / len(curves) * (number - (len(curves) - 1) / 2)
            inside = one.look.color if state == "trained" else "white"
            for axes, value in ((cosines, "cosine"), (ratios, "ratio")):
                shown = [(place, group) for place, group in enumerate(columns) if group in found[one.label][state]]
                estimates = [getattr(found[one.label][state][group], value) for _, group in shown]
                axes.errorbar(
                    [place + shift for place, _ in shown],
                    [estimate.value for estimate in estimates],
                    [0 if math.isnan(estimate.se) else estimate.se for estimate in estimates],
                    linestyle="none",
                    marker=one.look.marker,
                    color=one.look.color,
                    markerfacecolor=inside,
                    markersize=4.5,
                    capsize=2,
                    linewidth=1,
                    gid=f"{value}/{one.label}/{state}",
                )
                if value == "cosine":
                    means = [found[one.label][state][group].of_mean.cosine for _, group in shown]
                    axes.plot([place + shift for place, _ in shown], means, "x", color=one.look.color, markersize=4)
        cosines.axhline(0, color="black", linewidth=0.8)
        ratios.axhline(1, color="black", linewidth=0.8)
        cosines.set(ylabel="cosine")
        ratios.set(ylabel="|text| / |image|", yscale="log")
        ratios.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ratios.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ratios.yaxis.set_minor_formatter(NullFormatter())
        cosines.set_title("Cosine of text and image gradients", loc="left")
        ratios.set_title("Ratio of their norms", loc="left")
        ticks = [str(_layer(group)) if "." in group else labels.get(group, group) for group in columns]
        ratios.set_xticks(range(len(columns)), ticks)
        for tick in ratios.get_xticklabels()[: len(kinds)]:
            tick.set_rotation(30)
        first = len(kinds)
        for kind, groups in layered.items():
            for axes in (cosines, ratios):
                axes.axvline(first - 0.5, color="#bbbbbb", linewidth=0.8)
            name = {"ffn": "feed-forward"}.get(kind, kind)
            ratios.annotate(
                f"{name}, by layer",
                (first + (len(groups) - 1) / 2, -0.22),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=9,
            )
            first += len(groups)
        keys = [
            Line2D([], [], linestyle="none", marker=one.look.marker, color=one.look.color, label=one.look.label)
            for one in runs
        ]
        filled = grey_key("trained", linestyle="none", marker="o")
        hollow = grey_key("initial", linestyle="none", marker="o", markerfacecolor="white")
        place_legend(figure, [*keys, filled, hollow, grey_key("of mean gradients", linestyle="none", marker="x")])
    return figure
