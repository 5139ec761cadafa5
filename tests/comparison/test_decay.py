"""Fits of a decaying gap: parameters, coverage of intervals over seeds, choice between the fits, and refusals."""

import numpy as np
import pytest

from t2i_lm.comparison.decay import CONSTANT, ZERO, decay_sentences, fit_decay

TOKENS = [358_400 * 2**number for number in range(8)]
CENTER = float(np.exp(np.log(TOKENS).mean()))
Points = dict[float, dict[int, float]]
TRUE = {"a": -0.1, "b": 0.5, "c": -0.05}


def draw(seed: int, seeds: int = 3, c: float = TRUE["c"], sd: float = 0.01, of_seed: float = 0.0) -> Points:
    """Gaps of several seeds at every length, with noise of each run and of each seed over all lengths."""
    generator = np.random.default_rng(seed)
    shift = generator.normal(0, of_seed, seeds)
    curve = {tokens: TRUE["a"] * (tokens / CENTER) ** -TRUE["b"] + c for tokens in TOKENS}
    return {
        tokens: {number: gap + shift[number] + generator.normal(0, sd) for number in range(seeds)}
        for tokens, gap in curve.items()
    }


def test_a_curve_without_noise_is_recovered() -> None:
    decay = fit_decay(draw(0, sd=1e-9))
    fit = decay.fits[CONSTANT]
    assert {name: one.value for name, one in fit.parameters.items()} == pytest.approx(TRUE, rel=1e-4)
    assert fit.scale == pytest.approx(CENTER)
    assert fit(TOKENS) == pytest.approx([gap[0] for gap in draw(0, sd=0).values()], rel=1e-4)
    assert decay.chosen == CONSTANT


@pytest.mark.parametrize("of_seed", [0.0, 0.01])
def test_intervals_cover_the_parameters(of_seed: float) -> None:
    draws = 30
    covered = dict.fromkeys(TRUE, 0)
    for number in range(draws):
        for name, one in fit_decay(draw(number, of_seed=of_seed)).fits[CONSTANT].parameters.items():
            assert one.t_interval is not None
            assert one.bootstrap_interval is None, "a bootstrap requires four seeds"
            covered[name] += one.t_interval[0] <= TRUE[name] <= one.t_interval[1]
    assert min(covered.values()) >= 0.83 * draws  # of 0.95; 30 draws have a standard error of 0.04


def test_the_bootstrap_covers_from_four_seeds_on() -> None:
    draws, covered = 20, 0
    for number in range(draws):
        interval = fit_decay(draw(number, seeds=5)).fits[CONSTANT].parameters["c"].bootstrap_interval
        assert interval is not None
        covered += interval[0] <= TRUE["c"] <= interval[1]
    assert covered >= 0.8 * draws


def test_aicc_chooses_the_fit_to_zero_where_the_gap_vanishes() -> None:
    chosen = [fit_decay(draw(number, c=0.0)).chosen for number in range(15)]
    assert chosen.count(ZERO) >= 12
    assert chosen.count(CONSTANT) <= 1
    apart = [fit_decay(draw(number)).chosen for number in range(15)]
    assert apart.count(CONSTANT) > apart.count(ZERO)


@pytest.mark.parametrize(("lengths", "fits"), [(4, set()), (5, {ZERO}), (6, {ZERO, CONSTANT})])
def test_a_fit_requires_two_lengths_more_than_parameters(lengths: int, fits: set[str]) -> None:
    decay = fit_decay(dict(list(draw(0).items())[:lengths]))
    assert set(decay.fits) == fits
    assert len(decay.refusals) == 2 - len(fits)
    assert all(f"{lengths} lengths, " in line and "required" in line for line in decay.refusals)
    assert decay.chosen is None or len(fits) == 2


def test_one_seed_has_no_interval_and_says_so() -> None:
    decay = fit_decay(draw(0, seeds=1))
    assert {one.t_interval for one in decay.fits[ZERO].parameters.values()} == {None}
    assert "(no interval)" in "\n".join(decay_sentences(decay))
    assert "n = 1 seeds" in "\n".join(decay_sentences(decay))


def test_lengths_with_fewer_seeds_count_and_leave_the_fits_without_intervals() -> None:
    points = draw(0)
    for tokens in TOKENS[-2:]:
        points[tokens] = {0: points[tokens][0]}
    fit = fit_decay(points).fits[CONSTANT]
    assert (fit.n, fit.least) == (3, 1)
    assert {one.t_interval for one in fit.parameters.values()} == {None}
    words = "\n".join(decay_sentences(fit_decay(points)))
    assert "n = 1 to 3 seeds each" in words
    assert "no intervals: they require every seed at every length" in words


def test_few_lengths_decide_nothing_between_the_fits() -> None:
    decays = [fit_decay(dict(list(draw(number, c=0.0).items())[:6])) for number in range(5)]
    assert {decay.chosen for decay in decays} == {None}
    assert decay_sentences(decays[0])[-1] == "undecided between the fits, 6 lengths (8 required for a choice)"


def test_a_gap_that_does_not_decay_is_not_sound() -> None:
    points = {tokens: dict.fromkeys(range(3), 0.1 * (number + 1)) for number, tokens in enumerate(TOKENS)}
    decay = fit_decay(points)
    assert "the exponent is at its bound" in decay.fits[ZERO].problem
    assert decay.chosen is None, "a choice requires two sound fits"
    sound = [kind for kind, fit in decay.fits.items() if not fit.problem]
    last = "only the fit to a constant is sound" if sound else "no sound fit"
    assert decay_sentences(decay)[-1] == last
