"""Held-out losses of arms against the value of a key: each arm at its own best value, too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2i_lm.plots.captions import group_caption
from t2i_lm.plots.panels import ARM_STYLES, GREY, LOG_RATIO, ArmStyle, captioned_figure
from t2i_lm.storage.run_folder import Run

OTHER = ArmStyle("", GREY, "x")  # of an experiment that no figure of the paper has
MODALITIES = {"image": "Image tokens", "text": "Text tokens"}
SEED = "seed"  # swept alone: repetitions, of which none is the best
LAST = 0.1  # share of the steps whose training loss is averaged


@dataclass(frozen=True)
class Outcome:
    """A finished run as a point of a sweep; runs that differ in the seed alone share arm and value."""

    arm: str
    value: str
    run: Run

    def nll(self, modality: str) -> float | None:
        """Held-out loss at the end, nats/token; None where the run has no such tokens."""
        last = self.run.records("val")[-1]["val"].get(modality, {})
        return float(last["nll"]) if "nll" in last else None

    def trained(self, modality: str) -> float | None:
        """Mean training loss of the last tenth of the steps: of new samples, where each is seen once."""
        lines = self.run.records("train")
        if not lines:
            return None
        late = [line for line in lines if line["step"] > (1 - LAST) * lines[-1]["step"] and modality in line["train"]]
        if not late:
            return None
        sums = [line["train"][modality] for line in late]
        return float(sum(part["nll_sum"] for part in sums) / sum(part["count"] for part in sums))


def losses(outcomes: Sequence[Outcome], modality: str, training: bool = False) -> dict[str, dict[str, list[float]]]:
    """Held-out or training losses by arm and value, one a seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for outcome in outcomes:
        nll = outcome.trained(modality) if training else outcome.nll(modality)
        if nll is not None:
            found.setdefault(outcome.arm, {}).setdefault(outcome.value, []).append(nll)
    return found


def best_of(values: Mapping[str, Sequence[float]]) -> str:
    """The value with the least mean loss."""
    return min(values, key=lambda value: fmean(values[value]))


def sweep_table(key: str, outcomes: Sequence[Outcome]) -> str:
    """Every arm's losses at every value, and distances from the first arm's: at equal values and at each one's best.

    Of seeds, means and standard deviations. `training` is the mean of the last tenth of the steps.
    """
    lines: list[str] = []
    for modality, words in MODALITIES.items():
        arms, trained = losses(outcomes, modality), losses(outcomes, modality, training=True)
        if not arms:
            continue
        first = next(iter(arms))
        head = f"{f'{words.lower()}, nats':<26}{key:>14}{'held-out':>12}{'range':>16}{f'- {first}':>16}{'training':>12}"
        lines += [*([""] if lines else []), head]
        for arm, values in arms.items():
            best = best_of(values)
            for value, found in values.items():
                span = f"{min(found):.4f}-{max(found):.4f}" if len(found) > 1 else ""
                base = arms[first].get(value)
                gap = "" if base is None or arm == first else f"{fmean(found) - fmean(base):+.4f}"
                mark = " *" if value == best and len(values) > 1 and key != SEED else ""
                late = f"{fmean(trained[arm][value]):.4f}" if value in trained.get(arm, {}) else ""
                numbers = f"{fmean(found):>12.4f}{span:>16}{gap:>16}{late:>12}"
                lines.append(f"{arm:<26}{value:>14}{numbers}{mark}")
        lines += _over_seeds(arms, first) if key == SEED else _at_best(arms, first)
    return "\n".join(lines)


def _at_best(arms: Mapping[str, Mapping[str, Sequence[float]]], first: str) -> list[str]:
    """Each arm's distance from the first arm, both at their best values."""
    lines = []
    floor = fmean(arms[first][best_of(arms[first])])
    for arm in list(arms)[1:]:
        own = fmean(arms[arm][best_of(arms[arm])])
        percent = 100 * (own - floor) / own
        lines.append(f"{arm} - {first}, each at its best (*): {own - floor:+.4f} nats, {percent:+.1f} % of {arm}'s")
    return lines


def _over_seeds(arms: Mapping[str, Mapping[str, Sequence[float]]], first: str) -> list[str]:
    """Each arm's mean and that of its distances from the first arm at equal seeds, with standard deviations."""
    lines = []
    for arm, values in arms.items():
        lines.append(f"{arm}: {_mean([fmean(found) for found in values.values()])}")
        gaps = [fmean(found) - fmean(arms[first][seed]) for seed, found in values.items() if seed in arms[first]]
        if gaps and arm != first:
            lines.append(f"{arm} - {first}, at equal seeds: {_mean(gaps, '+')}")
    return lines


def _mean(numbers: Sequence[float], sign: str = "") -> str:
    spread = f", standard deviation {stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"mean {fmean(numbers):{sign}.4f} nats{spread} ({len(numbers)} seeds)"


def sweep_caption(key: str, outcomes: Sequence[Outcome]) -> str:
    """What the figure says under it."""
    seeds = sorted({outcome.run.config["seed"] for outcome in outcomes})
    arms = {f"{outcome.arm} {outcome.value} {outcome.run.config['seed']}": outcome.run for outcome in outcomes}
    bars = f"; points are means and bars ranges over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    marks = "" if key == SEED else f"; rings: each arm's best{bars}"
    how = (
        f"Held-out loss at the end of training against {key}, all else equal{marks}. Pale: "
        "training loss of the last tenth of the steps, of new samples where each is seen once."
    )
    return f"Sweep of {key}. {group_caption(arms, list(arms), how)}"


def draw_sweep(key: str, outcomes: Sequence[Outcome], caption: str) -> Figure:
    """A panel a modality, a line an arm, a point a value; lines carry a gid of the form `MODALITY/ARM`."""
    shown = {modality: arms for modality in MODALITIES if (arms := losses(outcomes, modality))}
    places = _places(list(dict.fromkeys(outcome.value for outcome in outcomes)))
    with captioned_figure(caption) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (modality, arms) in zip(panels, shown.items(), strict=True):
            trained = losses(outcomes, modality, training=True)
            for arm, values in arms.items():
                _draw_arm(axes, key, arm, values, trained.get(arm, {}), places, f"{modality}/{arm}")
            _label(axes, key, places)
            axes.set_title(MODALITIES[modality])
        panels[0].set_ylabel("loss (nats/token)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _draw_arm(
    axes: Axes,
    key: str,
    arm: str,
    values: Mapping[str, Sequence[float]],
    trained: Mapping[str, Sequence[float]],
    places: Mapping[str, float],
    gid: str,
) -> None:
    look, unordered = ARM_STYLES.get(arm, OTHER), key == SEED
    pale = sorted((places[value], fmean(found)) for value, found in trained.items())
    faint = {"linestyle": "none" if unordered else "-", "marker": look.marker, "markersize": 4, "alpha": 0.4}
    axes.plot(*zip(*pale, strict=True), color=look.colour, **faint)  # type: ignore[arg-type]
    means = {value: fmean(found) for value, found in sorted(values.items(), key=lambda item: places[item[0]])}
    line = [places[value] for value in means]
    below = [mean - min(values[value]) for value, mean in means.items()]
    above = [max(values[value]) - mean for value, mean in means.items()]
    axes.errorbar(
        line,
        list(means.values()),
        yerr=[below, above] if any(above) else None,
        color=look.colour,
        linestyle="none" if unordered else look.dashes,
        marker=look.marker,
        label=look.label or arm.replace("_", " "),
        gid=gid,
    )
    if len(means) > 1 and not unordered:
        best = best_of(values)
        ring = {"marker": "o", "markersize": 15, "fillstyle": "none", "linestyle": "none", "color": look.colour}
        axes.plot([places[best]], [means[best]], gid=f"{gid}/best", **ring)  # type: ignore[arg-type]


def _places(values: Sequence[str]) -> dict[str, float]:
    """Where values lie on the axis: numbers at themselves, words one after another."""
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
