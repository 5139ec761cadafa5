"""Sweeps: held-out losses of arms by the value of a config key, also with each arm at its best value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2i_lm.comparison.best import Losses, best_of, best_value, common_value, no_best
from t2i_lm.comparison.comparability import ORDER, SEED, following
from t2i_lm.comparison.study_plan import BATCH_SIZE, IN_STEPS, STEPS
from t2i_lm.plots.captions import group_caption
from t2i_lm.plots.groups import FIGURE5, INITS
from t2i_lm.plots.panels import LOG_RATIO, ArmStyle, arm_styles, captioned_figure
from t2i_lm.runtime.tables import text_table
from t2i_lm.storage.run_folder import VAL, Run

MODALITIES = {"image": "Image tokens", "text": "Text tokens"}
LAST = 0.1  # share of the steps, at the end, whose training loss is averaged


@dataclass(frozen=True)
class Outcome:
    """A finished run as a point of a sweep, with its values of the swept keys; runs may differ in the seed alone."""

    arm: str
    values: Sequence[str]
    run: Run

    @property
    def value(self) -> str:
        """The value of the first swept key."""
        return self.values[0]

    def nll(self, modality: str) -> float | None:
        """Final held-out loss of the primary split, nats/token; None if the run has no such tokens."""
        last = self.run.validations()[-1][VAL].get(modality, {})
        return float(last["nll"]) if "nll" in last else None

    def training_nll(self, modality: str) -> float | None:
        """Mean training loss of the last tenth of the steps: new samples, if each is seen once."""
        lines = self.run.records("train")
        if not lines:
            return None
        late = [line for line in lines if line["step"] > (1 - LAST) * lines[-1]["step"] and modality in line["train"]]
        if not late:
            return None
        sums = [line["train"][modality] for line in late]
        return float(sum(part["nll_sum"] for part in sums) / sum(part["count"] for part in sums))


def losses(
    outcomes: Sequence[Outcome], modality: str, training: bool = False
) -> dict[str, dict[str, dict[int, float]]]:
    """Held-out or training losses by arm, value and seed."""
    result: dict[str, dict[str, dict[int, float]]] = {}
    for outcome in outcomes:
        nll = outcome.training_nll(modality) if training else outcome.nll(modality)
        if nll is not None:
            result.setdefault(outcome.arm, {}).setdefault(outcome.value, {})[outcome.run.config[SEED]] = nll
    return result


def held_out(outcomes: Sequence[Outcome]) -> str:
    """The name of the held-out losses: with the primary validation split where there are several."""
    return " ".join([*outcomes[0].run.validation_splits[:1], "held-out"])


def distance(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """The mean of a loss minus another one, over the seeds of both; None without any."""
    gaps = [nll - other[seed] for seed, nll in one.items() if seed in other]
    return fmean(gaps) if gaps else None


def sweep_table(key: str, outcomes: Sequence[Outcome]) -> str:
    """Every arm's losses by value, and distances from the first arm: at equal values, and each arm at its best value.

    For a sweep of seeds, means and standard deviations. `training` is the mean of the last tenth of the steps.
    """
    tables: list[str] = []
    for modality, words in MODALITIES.items():
        arms, training = losses(outcomes, modality), losses(outcomes, modality, training=True)
        if not arms:
            continue
        first = next(iter(arms))
        header = (f"{words.lower()}, nats/token", key, held_out(outcomes), "range", f"- {first}", "training", "")
        rows = []
        for arm, values in arms.items():
            best = best_of(values)
            for value, by_seed in values.items():
                nlls, late = list(by_seed.values()), training.get(arm, {}).get(value)
                apart = None if arm == first else distance(by_seed, arms[first].get(value, {}))
                rows.append(
                    (
                        arm,
                        value,
                        f"{fmean(nlls):.4f}",
                        f"{min(nlls):.4f}-{max(nlls):.4f}" if len(nlls) > 1 else "",
                        "" if apart is None else f"{apart:+.4f}",
                        "" if late is None else f"{fmean(late.values()):.4f}",
                        "*" if value == best and len(values) > 1 and key != SEED else "",
                    )
                )
        summary = (
            _over_seeds(arms, first) if key == SEED else [*_at_best(arms, first), *best_lines(key, outcomes, modality)]
        )
        tables.append("\n".join([text_table(header, rows), *summary]))
    return "\n\n".join(tables)


def at_edges(key: str, arms: Mapping[str, Losses]) -> list[str]:
    """A warning for each arm whose best value is the smallest or the largest one, beyond which a better one may lie."""
    found = [best_value(arm, key, values) for arm, values in arms.items()]
    return [best.warning for best in found if best is not None and best.warning]


def best_lines(key: str, outcomes: Sequence[Outcome], modality: str) -> list[str]:
    """Each arm's best value, whether it is interior to the grid, and the distance of the next one; then warnings."""
    arms = losses(outcomes, modality)
    found = {arm: best_value(arm, key, values) for arm, values in arms.items() if len(values) > 1}
    common = common_value(arms) if len(arms) > 1 else None
    last = [f"best common {key}: {common}, by the mean loss of the arms"] if common is not None else []
    sentences = [no_best(arm, key) if best is None else best.sentence for arm, best in found.items()]
    return [*sentences, *last, *at_edges(key, {arm: arms[arm] for arm in found})]


def _at_best(arms: Mapping[str, Losses], first: str) -> list[str]:
    """Each arm's distance from the first arm, both at their best values, over the seeds of both."""
    lines = []
    best = best_of(arms[first])
    for arm, values in list(arms.items())[1:]:
        own = best_of(values)
        apart = None if best is None or own is None else distance(values[own], arms[first][best])
        if apart is None or best is None or own is None:
            continue
        percent = 100 * apart / fmean(nll for seed, nll in values[own].items() if seed in arms[first][best])
        difference = f"{apart:+.4f} nats/token, {percent:+.1f} % of {arm}'s"
        lines.append(f"{arm} - {first}, each at its best (*): {difference}")
    return lines


def _over_seeds(arms: Mapping[str, Losses], first: str) -> list[str]:
    """Means and standard deviations over seeds: of each arm, and of its distance from the first arm at equal seeds."""
    lines = []
    for arm, values in arms.items():
        lines.append(f"{arm}: {_mean([fmean(nlls.values()) for nlls in values.values()])}")
        apart = [distance(nlls, arms[first].get(seed, {})) for seed, nlls in values.items()]
        gaps = [one for one in apart if one is not None]
        if gaps and arm != first:
            lines.append(f"{arm} - {first}, at equal seeds: {_mean(gaps, '+')}")
    return lines


def _mean(numbers: Sequence[float], sign: str = "") -> str:
    spread = f", standard deviation {stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"mean {fmean(numbers):{sign}.4f} nats/token{spread} ({len(numbers)} seeds)"


def sweep_caption(key: str, outcomes: Sequence[Outcome], has_best: bool = True) -> str:
    """The caption of `draw_sweep`."""
    seeds = sorted({outcome.run.config["seed"] for outcome in outcomes})
    some = {modality: losses(outcomes, modality) for modality in present(outcomes)[:1]}
    counts = [len(nlls) for arms in some.values() for values in arms.values() for nlls in values.values()]
    arms = {f"{one.arm} {key}={one.value} seed={one.run.config['seed']}": one.run for one in outcomes}
    over_shared = ", and rings over the shared ones" if has_best else ""
    fewer = f" (some over {min(counts)} alone{over_shared})" if min(counts) < len(seeds) else ""
    over = f"seeds {', '.join(map(str, seeds))}{fewer}"
    bars = f"; points are means and bars ranges over {over}" if len(seeds) > 1 else ""
    rings = "; rings: each arm's best" if has_best else ""
    marks = "" if key == SEED else f"{rings}{bars}"
    how = (
        f"Final {held_out(outcomes)} loss by {key}, all other keys of an arm equal{marks}. Pale: "
        "training loss of the last tenth of the steps, which are new samples if each is seen once."
    )
    edges = [] if key == SEED or not has_best else at_edges(key, losses(outcomes, next(iter(present(outcomes)))))
    sentences = [f"Sweep of {key}.", group_caption(arms, varied=varied_in([key]), how=how), *(f"{e}." for e in edges)]
    return " ".join(sentences)


def present(outcomes: Sequence[Outcome]) -> list[str]:
    """The modalities of which runs have held-out losses."""
    return [modality for modality in MODALITIES if losses(outcomes, modality)]


def varied_in(keys: Sequence[str]) -> tuple[str, ...]:
    """Keys, and entries of env.json, in which the runs of a sweep differ by design.

    A batch size changes the steps for the same tokens.
    """
    steps = (STEPS, *IN_STEPS) if BATCH_SIZE in keys else ()
    return (*keys, *following(keys), *steps, SEED, ORDER, *FIGURE5.varied, *INITS.varied)


def draw_sweep(key: str, outcomes: Sequence[Outcome], caption: str, has_best: bool = True) -> Figure:
    """A panel per modality, a line per arm, a point per value; lines carry a gid of the form `MODALITY/ARM`.

    Args:
        key: the swept key.
        outcomes: the runs.
        caption: below the panels.
        has_best: whether each arm's best value has a ring; not while planned seeds are missing.
    """
    by_modality = {modality: losses(outcomes, modality) for modality in present(outcomes)}
    places = _places(list(dict.fromkeys(outcome.value for outcome in outcomes)))
    styles = arm_styles(one.arm for one in outcomes)
    with captioned_figure(caption) as figure:
        panels = figure.subplots(1, len(by_modality), squeeze=False)[0]
        for axes, (modality, arms) in zip(panels, by_modality.items(), strict=True):
            training = losses(outcomes, modality, training=True)
            for arm, values in arms.items():
                late = training.get(arm, {})
                _draw_arm(axes, key, styles[arm], values, late, places, f"{modality}/{arm}", has_best)
            _label(axes, key, places)
            axes.set_title(MODALITIES[modality])
        panels[0].set_ylabel("loss (nats/token)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _draw_arm(
    axes: Axes,
    key: str,
    look: ArmStyle,
    values: Losses,
    training: Losses,
    places: Mapping[str, float],
    gid: str,
    has_best: bool,
) -> None:
    unordered = key == SEED
    pale = sorted((places[value], fmean(nlls.values())) for value, nlls in training.items())
    faint = {"linestyle": "none" if unordered else "-", "marker": look.marker, "markersize": 4, "alpha": 0.4}
    axes.plot(*zip(*pale, strict=True), color=look.color, **faint)  # type: ignore[arg-type]
    means = {value: fmean(nlls.values()) for value, nlls in sorted(values.items(), key=lambda item: places[item[0]])}
    line = [places[value] for value in means]
    below = [mean - min(values[value].values()) for value, mean in means.items()]
    above = [max(values[value].values()) - mean for value, mean in means.items()]
    axes.errorbar(
        line,
        list(means.values()),
        yerr=[below, above] if any(above) else None,
        color=look.color,
        linestyle="none" if unordered else look.dashes,
        marker=look.marker,
        label=look.label,
        gid=gid,
    )
    best = best_of(values) if has_best else None
    if best is not None and len(means) > 1 and not unordered:
        ring = {"marker": "o", "markersize": 15, "fillstyle": "none", "linestyle": "none", "color": look.color}
        axes.plot([places[best]], [means[best]], gid=f"{gid}/best", **ring)  # type: ignore[arg-type]


def _places(values: Sequence[str]) -> dict[str, float]:
    """Positions of values on the axis: numbers at their value, words in order."""
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return {value: float(number) for number, value in enumerate(values)}


def _label(axes: Axes, key: str, places: Mapping[str, float]) -> None:
    axes.set_xlabel(key)
    least, most = min(places.values()), max(places.values())
    if least > 0 and most / least >= LOG_RATIO:
        axes.set_xscale("log")
    axes.set_xticks(list(places.values()), list(places), minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(x=0.12, y=0.15)
