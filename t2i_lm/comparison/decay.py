"""Fits of a gap that decays with training tokens: to zero, a t^-b, or to a constant, a t^-b + c.

Least squares over all runs, each length a run of its own; AICc over eight lengths or more chooses. Intervals are over
seeds, where every length has all of them: the fit's linear response to each seed's differences gives a value of every
parameter per seed, whose mean is the fit (the cluster-robust "sandwich"), and these values have the t-interval and the
studentized bootstrap of `statistics.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import curve_fit

from t2i_lm.comparison.statistics import PairedStatistics, paired_statistics

Array = npt.NDArray[np.float64]
ZERO, CONSTANT = "zero", "constant"
PARAMETERS = {ZERO: ("a", "b"), CONSTANT: ("a", "b", "c")}
# Least number of lengths beyond the parameters, the variance among them: AICc requires it.
SPARE = 2
# Least number of lengths of a choice between the fits: with fewer, the penalty of AICc decides.
CHOICE = 8
# Difference of AICc below which two fits are not told apart (Burnham and Anderson, 2002).
TOLD_APART = 2.0
EXPONENTS = (1e-3, 6.0)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a fit, with its interval over seeds; None where there are too few."""

    value: float
    t_interval: tuple[float, float] | None
    bootstrap_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Fit:
    """A fitted curve.

    Attributes:
        kind: ZERO or CONSTANT.
        parameters: by name: `a` is the decaying part at `scale` tokens.
        scale: tokens at which t is 1.
        aicc: of the means of the lengths; lower is better.
        n: seeds; a length may have fewer.
        least: fewest seeds of a length.
        lengths: number of lengths.
        problem: why the numbers mean nothing, such as an exponent at its bound; empty otherwise.
    """

    kind: str
    parameters: Mapping[str, Parameter]
    scale: float
    aicc: float
    n: int
    least: int
    lengths: int
    problem: str = ""

    def __call__(self, tokens: Sequence[float]) -> list[float]:
        """The curve at some tokens."""
        values = [one.value for one in self.parameters.values()]
        return [float(value) for value in _curve(np.asarray(tokens, dtype=np.float64) / self.scale, *values)]


@dataclass(frozen=True)
class Decay:
    """Both fits of a gap, those that the points allow, and which one AICc prefers.

    Attributes:
        fits: by kind.
        chosen: the kind with the lower AICc; None where it is not told apart, both are not sound, or lengths are few.
        refusals: a sentence for each fit that was not made.
    """

    fits: Mapping[str, Fit]
    chosen: str | None
    refusals: tuple[str, ...]


def fit_decay(points: Mapping[float, Mapping[int, float]], alpha: float = 0.05) -> Decay:
    """Fits of a gap.

    Args:
        points: by tokens and seed, the difference of two arms.
        alpha: level of the intervals.
    """
    fits, refusals = {}, []
    for kind, names in PARAMETERS.items():
        required = len(names) + 1 + SPARE
        if len(points) < required:
            refusals.append(
                f"no fit to {_target(kind)}: {len(points)} lengths, {required} required (parameters + {SPARE})"
            )
            continue
        fits[kind] = _fit(kind, points, alpha)
    chosen = None
    both = [fit for fit in fits.values() if not fit.problem]
    if len(both) == 2 and len(points) >= CHOICE and abs(both[0].aicc - both[1].aicc) >= TOLD_APART:
        chosen = min(fits, key=lambda kind: fits[kind].aicc)
    return Decay(fits, chosen, tuple(refusals))


def decay_sentences(decay: Decay, alpha: float = 0.05) -> list[str]:
    """What the fits say, in words."""
    lines = list(decay.refusals)
    for kind, fit in decay.fits.items():
        values = ", ".join(f"{name} {_words(one, alpha)}" for name, one in fit.parameters.items())
        form = "a t^-b" + (" + c" if kind == CONSTANT else "")
        doubt = f"; NOT SOUND: {fit.problem}" if fit.problem else ""
        lines.append(
            f"fit to {_target(kind)}, {form}, t in units of {fit.scale:,.0f} tokens: {values}; AICc {fit.aicc:.1f}; "
            f"{fit.lengths} lengths, n = {f'{fit.least} to ' * (fit.least < fit.n)}{fit.n} seeds each{doubt}"
        )
    fits = list(decay.fits.values())
    if any(fit.least < fit.n for fit in fits):
        lines.append("no intervals: they require every seed at every length")
    sound = [fit for fit in fits if not fit.problem]
    if fits and not sound:
        lines.append("no sound fit")
    elif len(fits) == 2 and len(sound) == 1:
        lines.append(f"only the fit to {_target(sound[0].kind)} is sound")
    elif decay.chosen is not None:
        lines.append(f"AICc prefers the fit to {_target(decay.chosen)}, within these lengths")
    elif len(fits) == 2 and fits[0].lengths < CHOICE:
        lines.append(f"undecided between the fits, {fits[0].lengths} lengths ({CHOICE} required for a choice)")
    elif len(fits) == 2:
        lines.append("undecided between the fits: AICc does not tell them apart")
    return lines


def _target(kind: str) -> str:
    return "zero" if kind == ZERO else "a constant"


def _words(one: Parameter, alpha: float) -> str:
    interval = one.bootstrap_interval or one.t_interval
    if interval is None:
        return f"{one.value:.4g} (no interval)"
    how = "bootstrap" if one.bootstrap_interval else "t"
    return f"{one.value:.4g} ({100 * (1 - alpha):g} % {how} interval {interval[0]:.4g} to {interval[1]:.4g})"


def _curve(t: Array, a: float, b: float, c: float = 0.0) -> Array:
    return np.asarray(a * t**-b + c, dtype=np.float64)


def _fit(kind: str, points: Mapping[float, Mapping[int, float]], alpha: float) -> Fit:
    seeds = sorted({seed for by_seed in points.values() for seed in by_seed})
    rows = [(tokens, seed, gap) for tokens, by_seed in sorted(points.items()) for seed, gap in by_seed.items()]
    tokens, gaps = np.array([row[0] for row in rows]), np.array([row[2] for row in rows])
    scale = float(np.exp(np.log(np.array(sorted(points))).mean()))
    t = tokens / scale
    values = _least_squares(kind, t, gaps)
    residuals = gaps - _curve(t, *values)
    per_seed = _per_seed(values, t, residuals, [row[1] for row in rows], seeds)
    balanced = len(seeds) > 1 and all(len(by_seed) == len(seeds) for by_seed in points.values())
    statistics: list[PairedStatistics | None] = [
        paired_statistics(per_seed[:, number].tolist(), alpha=alpha) if balanced else None
        for number in range(len(values))
    ]
    parameters = {
        name: Parameter(float(value), one.t_interval if one else None, one.bootstrap_interval if one else None)
        for name, value, one in zip(PARAMETERS[kind], values, statistics, strict=True)
    }
    least = min(map(len, points.values()))
    problem = ""
    if values[1] <= 2 * EXPONENTS[0] or values[1] >= 0.99 * EXPONENTS[1]:
        problem = f"the exponent is at its bound, {values[1]:.3g}: the gap is no power of the tokens"
    return Fit(kind, parameters, scale, _aicc(values, t, residuals), len(seeds), least, len(points), problem)


def _least_squares(kind: str, t: Array, gaps: Array) -> Array:
    """Parameters with the least squares: the exponent over a grid, with the others linear, then all of them."""
    free = len(PARAMETERS[kind])
    best, least = np.zeros(free), math.inf
    for exponent in np.geomspace(*EXPONENTS, 40):
        columns = np.stack([t**-exponent, np.ones_like(t)], axis=1)[:, : free - 1]
        linear = np.linalg.lstsq(columns, gaps, rcond=None)[0]
        error = float(((gaps - columns @ linear) ** 2).sum())
        if error < least:
            best, least = np.array([linear[0], exponent, *linear[1:]]), error
    bounds = ([-np.inf, EXPONENTS[0], -np.inf][:free], [np.inf, EXPONENTS[1], np.inf][:free])
    try:
        values, _ = curve_fit(_curve, t, gaps, p0=best, bounds=bounds, x_scale=np.maximum(np.abs(best), 1e-3))
    except RuntimeError:  # no convergence: the grid's best is near enough to say so
        return best
    return np.asarray(values, dtype=np.float64)


def _per_seed(values: Array, t: Array, residuals: Array, of_seed: Sequence[int], seeds: Sequence[int]) -> Array:
    """Parameters by seed, to first order: the fit plus n times its response to the residuals of the seed's runs."""
    a, b = values[:2]
    slopes = np.stack([t**-b, -a * np.log(t) * t**-b, np.ones_like(t)], axis=1)[:, : len(values)]
    inverse = np.linalg.pinv(slopes.T @ slopes)
    own = np.array(of_seed)
    responses = [inverse @ slopes[own == seed].T @ residuals[own == seed] for seed in seeds]
    return np.asarray(values + len(seeds) * np.stack(responses), dtype=np.float64)


def _aicc(values: Array, t: Array, residuals: Array) -> float:
    """AICc with the mean of each length as one observation, which weighs as many runs as it has."""
    lengths = np.unique(t)
    means = np.array([residuals[t == one].mean() for one in lengths])
    counts = np.array([(t == one).sum() for one in lengths], dtype=np.float64)
    size, free = len(lengths), len(values) + 1
    error = float((counts / counts.mean() * means**2).sum())
    spread = size * math.log(max(error / size, 1e-300))
    return spread + 2 * free + 2 * free * (free + 1) / (size - free - 1)
