"""The temperature at which a model's loss is least, over the text rows and over all rows.

A model that was trained on images is overconfident on text, so that its loss exceeds a uniform guess. At the best
temperature only what it knows counts: a uniform guess is the upper bound.

Shapes: `N` targets, `S` targets of the fit, `V` vocabulary; `C` targets of one chunk.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.evaluation.probes.scores import TargetFeatures

# Evenly spaced targets that the temperature is fitted on: fitting on more changes the loss by about 1e-3 nats.
FITTED = 1024
# Inverse temperatures between which the best one is sought.
LOWEST, HIGHEST = 2.0**-10, 2.0**10
# Relative change of the inverse temperature at which the search ends, and steps at most.
TOLERANCE, STEPS = 1e-4, 60


class BestTemperature(NamedTuple):
    """The best temperature of a softmax.

    Attributes:
        temperature: divisor of the logits.
        nll_N: negative log-likelihood of every target at this temperature, nats, float64.
    """

    temperature: float
    nll_N: Tensor


@torch.no_grad()
def best_temperatures(features: TargetFeatures) -> dict[str, BestTemperature]:
    """The best temperature of the softmax over `all_rows` and of that over `text_rows`."""
    chosen_S = torch.tensor(evenly_spaced_indices(len(features.target_N), FITTED), device=features.target_N.device)
    fitted = features._replace(x_ND=features.x_ND[chosen_S], target_N=features.target_N[chosen_S])
    logits_SV = torch.cat([logits_CV for logits_CV, _ in fitted.chunks()])
    sizes = {"all_rows": logits_SV.shape[1], "text_rows": features.text_size}
    inverse = {name: _best_inverse(logits_SV[:, :size], fitted.target_N) for name, size in sizes.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in sizes}
    for logits_CV, target_C in features.chunks():
        for name, size in sizes.items():
            scaled_CV = logits_CV[:, :size] * inverse[name]
            own_C = scaled_CV.gather(1, target_C[:, None])[:, 0]
            parts[name].append((scaled_CV.logsumexp(dim=1).double() - own_C.double()).cpu())
    return {name: BestTemperature(1 / inverse[name], torch.cat(parts[name])) for name in sizes}


def _best_inverse(logits_SV: Tensor, target_S: Tensor) -> float:
    """The inverse temperature b of least loss, by Newton's method in a bracket.

    The loss, mean(logsumexp(b x) - b x_target), is convex in b: its slope is the mean of E[x] - x_target, its curvature
    the mean of Var[x], under the softmax at b.
    """
    own_S = logits_SV.gather(1, target_S[:, None])[:, 0]
    low, high, b = LOWEST, HIGHEST, 1.0
    for _ in range(STEPS):
        p_SV = torch.softmax(logits_SV * b, dim=1)
        mean_S = (p_SV * logits_SV).sum(dim=1)
        slope = float((mean_S - own_S).double().mean())
        curvature = float((p_SV * (logits_SV - mean_S[:, None]).square()).sum(dim=1).double().mean())
        low, high = (low, b) if slope > 0 else (b, high)
        step = b - slope / curvature if curvature > 0 else math.nan
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after - b) <= TOLERANCE * b:
            return after
        b = after
    return b
