"""Distance of attention by layer and head, and the share of it that image positions pay to the caption.

Attention weights are computed again from queries and keys for open_lm's decoder, and asked of a model of transformers,
whose attention is then its own `eager` form.

Shapes: `S` sequences, `B` of a batch, `T` positions, `H` heads, `L` layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from t2i_lm.analysis.base import PROBED, NotAvailableError, ProbedRun, ProbeResult, Settings, State
from t2i_lm.analysis.cka import Estimate
from t2i_lm.analysis.looks import grey_key, run_keys
from t2i_lm.analysis.states import BATCH
from t2i_lm.experiment.build import ImageModel
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Attention, Decoder
from t2i_lm.models.huggingface import HuggingFaceDecoder
from t2i_lm.plots.panels import GREY, captioned_figure, place_legend
from t2i_lm.runtime.progress import progress
from t2i_lm.tokenizers.layout import IMAGE, MODALITIES, TEXT, modality_of_target

STATES: tuple[State, ...] = ("initial", "trained")
TITLE = "Distance and target of attention by layer"
SHARE = "caption_share"


@torch.no_grad()
def attention_weights(decoder: Backbone, ids_BT: Tensor) -> list[Tensor]:
    """Attention weights (B, H, T, T) of every layer: query position, then key position.

    Raises:
        NotAvailableError: if the backbone's weights cannot be had.
    """
    if type(decoder) is Decoder:
        return _recomputed(decoder, ids_BT)
    if isinstance(decoder, HuggingFaceDecoder):
        return _returned(decoder, ids_BT)
    raise NotAvailableError(f"{type(decoder).__name__} does not give its attention weights")


def _recomputed(decoder: Decoder, ids_BT: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(module: Attention, arguments: tuple[Any, ...]) -> None:
        q_BHTK, k_BHTK, _ = module.project(*arguments[:2])
        scores_BHTT = (q_BHTK @ k_BHTK.transpose(2, 3)).float() / math.sqrt(q_BHTK.shape[-1])
        later_TT = torch.ones_like(scores_BHTT[0, 0], dtype=torch.bool).triu(1)
        found.append(scores_BHTT.masked_fill(later_TT, -math.inf).softmax(-1))

    hooks = [module.register_forward_pre_hook(keep) for module in decoder.modules() if isinstance(module, Attention)]
    try:
        decoder.hidden(ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _returned(decoder: HuggingFaceDecoder, ids_BT: Tensor) -> list[Tensor]:
    model: Any = decoder._causal_lm
    name = type(model).__name__
    before = model.config._attn_implementation
    found: list[Any] = []
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, named: (args, {**named, "output_attentions": True}), with_kwargs=True
        ),
        model.register_forward_hook(lambda _, args, output: found.extend(output.get("attentions") or ())),
    ]
    try:
        model.set_attn_implementation("eager")
        decoder.hidden(ids_BT)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise NotAvailableError(f"{name} does not give its attention weights") from error
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    shape = (len(ids_BT), ids_BT.shape[1], ids_BT.shape[1])
    weights = [one.float() for one in found if isinstance(one, Tensor)]
    if not weights or any((one.shape[0], *one.shape[2:]) != shape for one in weights):
        raise NotAvailableError(f"{name} does not give its attention weights")
    return weights


def attention_of_sequences(weights_BHTT: Tensor, modality_BT: Tensor) -> dict[str, Tensor]:
    """Means over the queries of each sequence, by the modality of the query's own token (B, H); NaN without queries.

    Returns:
        `text` and `image`: mean distance, in positions, between a query and the keys it attends to, by weight;
        `caption_share`: share of the weight of image queries that is on text keys.
    """
    positions_T = torch.arange(weights_BHTT.shape[-1], device=weights_BHTT.device, dtype=weights_BHTT.dtype)
    distance_TT = (positions_T[:, None] - positions_T).clamp(min=0)
    distance_BHT = (weights_BHTT * distance_TT).sum(-1)
    share_BHT = weights_BHTT @ (modality_BT == TEXT).to(weights_BHTT)[:, None, :, None]

    def mean(value_BHT: Tensor, modality: int) -> Tensor:
        chosen_B1T = (modality_BT == modality)[:, None]
        return (value_BHT * chosen_B1T).sum(-1) / chosen_B1T.sum(-1)

    found = {name: mean(distance_BHT, MODALITIES.index(name)) for name in PROBED}
    return found | {SHARE: mean(share_BHT.squeeze(-1), IMAGE)}


def uniform_attention(modality_BT: Tensor) -> dict[str, float]:
    """The same measures, over all sequences, of attention that is uniform over all positions up to the query's."""
    T = modality_BT.shape[1]
    weights_11TT = (torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None])[None, None]
    found = attention_of_sequences(weights_11TT.expand(len(modality_BT), 1, T, T), modality_BT)
    return {name: float(value_BH.nanmean()) for name, value_BH in found.items()}


def measure(model: ImageModel, ids_ST: Tensor, advance: Callable[[int], object]) -> dict[str, list[list[Estimate]]]:
    """Each measure by layer and head, with its standard error over sequences; without those that have no query."""
    collected: dict[str, list[Tensor]] = {}
    for start in range(0, len(ids_ST), BATCH):
        ids_BT = ids_ST[start : start + BATCH].to(model.decoder.output.text.device)
        modality_BT = modality_of_target(ids_BT, model.layout.vocab)
        layers = [attention_of_sequences(one, modality_BT) for one in attention_weights(model.decoder, ids_BT)]
        for name in layers[0]:
            collected.setdefault(name, []).append(torch.stack([layer[name] for layer in layers], dim=1).cpu())
        advance(len(ids_BT))
    found = {}
    for name, parts in collected.items():
        value_SLH = torch.cat(parts).double()
        value_SLH = value_SLH[~value_SLH.isnan().any(dim=(1, 2))]
        if len(value_SLH):
            found[name] = _estimates(value_SLH)
    return found


def _estimates(value_SLH: Tensor) -> list[list[Estimate]]:
    count = len(value_SLH)
    se_LH = value_SLH.std(0) / math.sqrt(count) if count > 1 else torch.full_like(value_SLH[0], math.nan)
    return [
        [Estimate(float(mean), float(se), count) for mean, se in zip(means, errors, strict=True)]
        for means, errors in zip(value_SLH.mean(0), se_LH, strict=True)
    ]


def probe_attention(runs: Sequence[ProbedRun], settings: Settings) -> ProbeResult:
    """Of each run's initial and trained model on held-out sequences."""
    found: dict[str, dict[str, dict[str, list[list[Estimate]]]]] = {}
    reference: dict[str, float] = {}
    sequences = 0
    with progress("attention", len(STATES) * len(runs) * settings.sequences, unit="sequences") as advance:
        for one in runs:
            found[one.label] = {}
            for state in STATES:
                model = one.model(state)
                ids_ST = one.sequences(model.layout, settings.sequences, one.held_out)
                sequences = len(ids_ST)
                found[one.label][state] = measure(model, ids_ST, advance)
                reference = uniform_attention(modality_of_target(ids_ST, model.layout.vocab))
    names = list(next(iter(found.values()))["trained"])
    if SHARE in names and "text" not in names:  # no captions
        names.remove(SHARE)
    numbers = {
        "sequences": sequences,
        "uniform": {name: reference[name] for name in names},
        "runs": {
            label: {
                state: {name: [[one._asdict() for one in heads] for heads in measures[name]] for name in names}
                for state, measures in states.items()
            }
            for label, states in found.items()
        },
    }
    how = (
        f"{sequences:,} held-out sequences. Points: heads of the trained model; lines: mean over heads, trained and "
        "initial. Distance: positions between a query and the keys it attends to, weighted by attention, by the "
        "query's own token. Share on the caption: of the attention of image positions, on the caption's tokens. Grey: "
        "uniform attention to all positions up to the query's."
    )
    sentence = _sentence(runs, found, reference, names, sequences)
    return ProbeResult(TITLE, sentence, how, numbers, partial(_draw, list(runs), found, reference, names))


def _mean(layers: list[list[Estimate]]) -> float:
    return float(np.mean([one.value for heads in layers for one in heads]))


def _sentence(
    runs: Sequence[ProbedRun],
    found: Mapping[str, Any],
    reference: Mapping[str, float],
    names: Sequence[str],
    sequences: int,
) -> str:
    parts = []
    for one in runs:
        first, last = found[one.label]["initial"], found[one.label]["trained"]
        words = f"{one.look.label} {_mean(first['image']):.1f} to {_mean(last['image']):.1f} positions"
        if SHARE in names:
            words += f", {_mean(first[SHARE]):.0%} to {_mean(last[SHARE]):.0%} on the caption"
        parts.append(words)
    uniform = f"{reference['image']:.1f}" + (f" and {reference[SHARE]:.0%}" if SHARE in names else "")
    return (
        "Image positions attend from the initial to the trained model at a mean distance of "
        f"{'; '.join(parts)}; uniform attention {uniform} (all heads, {sequences:,} sequences, one run each)."
    )


def _draw(
    runs: list[ProbedRun],
    found: Mapping[str, Mapping[str, Mapping[str, list[list[Estimate]]]]],
    reference: Mapping[str, float],
    names: Sequence[str],
    caption: str,
) -> Figure:
    titles = {"text": "Text queries", "image": "Image queries", SHARE: "Share on the caption"}
    with captioned_figure(caption) as figure:
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for number, one in enumerate(runs):
                shift = 0.12 * (number - (len(runs) - 1) / 2)
                for state, dashes in (("initial", ":"), ("trained", "-")):
                    layers = found[one.label][state][name]
                    x = np.arange(1, len(layers) + 1) + shift
                    means = [float(np.mean([head.value for head in heads])) for heads in layers]
                    axes.plot(x, means, dashes, color=one.look.color, linewidth=1.6, gid=f"{name}/{one.label}/{state}")
                for layer, heads in enumerate(found[one.label]["trained"][name], start=1):
                    values = [head.value for head in heads]
                    axes.plot(
                        [layer + shift] * len(values),
                        values,
                        one.look.marker,
                        color=one.look.color,
                        alpha=0.55,
                        markersize=4,
                    )
            axes.axhline(reference[name], color=GREY, linestyle="--", linewidth=1)
            axes.set_title(titles[name], loc="left")
            axes.set(xlabel="layer", ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if name == SHARE:
                axes.set_ylabel("share of attention")
            elif name == names[0]:
                axes.set_ylabel("distance (positions)")
        states = [grey_key("trained"), grey_key("initial", linestyle=":"), grey_key("uniform", linestyle="--")]
        place_legend(figure, [*run_keys(runs), *states])
    return figure
