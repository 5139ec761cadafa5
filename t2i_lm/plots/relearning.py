"""Relearning curves of both arms and their controls, from the results of `evaluate --relearn`."""

from collections.abc import Mapping

from t2i_lm.comparison.relearning import relearning_of, way_of
from t2i_lm.evaluation.relearning import LANGUAGE_MODEL, RANDOM, RUN
from t2i_lm.plots.curves import Series
from t2i_lm.plots.pairing import RunPair
from t2i_lm.runtime.tables import text_table

# Curves of a result (`evaluation/relearning.py`) by the arm that they are drawn as.
CONTROLS = {"language_model": LANGUAGE_MODEL, "random_weights": RANDOM}


def relearning_curves(pair: RunPair) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and held-out loss (nats/token) by arm: both arms of the pair, and the controls of the pre-trained one.

    Raises:
        ValueError: if an arm was not measured, or the two were measured in different ways.
    """
    results = {arm: relearning_of(run) for arm, run in pair.arms.items()}
    ways = [way_of(result) for result in results.values()]
    if differing := sorted(key for key in {*ways[0], *ways[1]} if ways[0].get(key) != ways[1].get(key)):
        named = "; ".join(f"{key}: {ways[0].get(key)!r} and {ways[1].get(key)!r}" for key in differing)
        raise ValueError(f"relearning of the two arms was measured in different ways: {named}")
    first = next(iter(results.values()))
    curves = {arm: result["nll"][RUN]["nll"] for arm, result in results.items()}
    curves |= {arm: first["nll"][name]["nll"] for arm, name in CONTROLS.items() if name in first["nll"]}
    return first["steps"], curves


def relearning_series(steps: list[int], curves: Mapping[str, list[float]]) -> dict[str, Series]:
    """Each curve as a series of points."""
    places = [float(step) for step in steps]
    return {arm: Series(places, losses, losses, places, losses) for arm, losses in curves.items()}


def relearning_table(steps: list[int], curves: Mapping[str, list[float]]) -> str:
    """Held-out loss of each arm after each number of steps."""
    rows = [(arm.replace("_", " "), *(f"{loss:.3f}" for loss in losses)) for arm, losses in curves.items()]
    return text_table(("held-out text nll (nats/token) after steps", *steps), rows)


def relearning_size(pair: RunPair) -> str:
    """The held-out text in words, as far as the results say."""
    made_with = relearning_of(pair.pretrained)["made_with"]
    if "rows" not in made_with or "length" not in made_with:
        return "held-out text"
    return f"{made_with['rows'][1]} held-out rows of {made_with['length']} ids"
