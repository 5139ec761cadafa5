"""Sweeps for the page: a figure of every key, and of every two keys, in whose values runs of `t2i_lm.sweep` differ."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

from t2i_lm.comparison.best import best_of, no_best, seed_means
from t2i_lm.comparison.comparability import ENVIRONMENT, ORDER, SEED, config_values, differences
from t2i_lm.comparison.plan import setting_words
from t2i_lm.comparison.study_plan import BATCH_SIZE, IN_STEPS, STEPS
from t2i_lm.config.key_groups import is_neutral
from t2i_lm.config.values import value_word
from t2i_lm.plots.groups import arms_of
from t2i_lm.plots.sweep import MODALITIES, Outcome, distance, present, varied_in
from t2i_lm.plots.sweep_grid import caption_of, draw, grids, seed_words, tables_of
from t2i_lm.reporting.figures import FigureBlock
from t2i_lm.reporting.findings import arm_label, endpoint_label
from t2i_lm.reporting.provenance import changed_values, experiment_file, experiment_values
from t2i_lm.reporting.search import Pool
from t2i_lm.runtime.command_line import NO_SAMPLES
from t2i_lm.runtime.tables import upper_first
from t2i_lm.storage.run_folder import VAL, Run

MOST = 6  # figures of one key, and of two


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in one or two keys alone, beside the arm and the seed."""

    keys: tuple[str, ...]
    outcomes: Sequence[Outcome]

    @property
    def name(self) -> str:
        """Its keys in words."""
        return " and ".join(self.keys)

    @property
    def folders(self) -> set[Path]:
        """Those of its runs."""
        return {one.run.folder for one in self.outcomes}

    def within(self, other: "Sweep") -> bool:
        """Whether another sweep shows its runs by its keys too."""
        return {*self.keys} <= {*other.keys} and self.folders <= other.folders

    def figure(self) -> FigureBlock:
        """Its figure and table."""
        caption, title = caption_of(self.keys, self.outcomes), f"Sweep of {self.name}"
        return FigureBlock.drawn(
            f"sweep of {self.name}",
            title,
            draw(self.keys, self.outcomes, caption),
            caption,
            table=tables_of(self.keys, self.outcomes),
            arms={
                f"{one.arm} {self._point(one.values)} seed {one.run.config['seed']}": one.run for one in self.outcomes
            },
        )

    def sentences(self) -> list[str]:
        """Each arm's best values, and the distance of the arms at equal values and at their best."""
        modality = present(self.outcomes)[0]
        split = next(iter(self.outcomes[0].run.validation_splits), "")
        losses = grids(self.outcomes, modality)
        best = {arm: place for arm, places in losses.items() if (place := best_of(places)) is not None}
        what = endpoint_label(f"val/{split}.{modality}.nll" if split else f"val.{modality}.nll")
        lowest = "; ".join(
            f"{arm_label(arm)} {seed_means(losses[arm])[best[arm]]:.4f} at {self._point(best[arm])}"
            if arm in best
            else no_best(arm_label(arm), "value")
            for arm in losses
        )
        sentences = [f"Sweep of {self.name}, lowest {what} (nats/token): {lowest}."]
        first, *others = losses
        for other in others:
            found = [distance(nlls, losses[first].get(place, {})) for place, nlls in losses[other].items()]
            gaps = [gap for gap in found if gap is not None]
            span = " to ".join(dict.fromkeys(f"{gap:+z.4f}" for gap in (min(gaps), max(gaps)))) if gaps else ""
            words = [f"{span} at {len(gaps)} equal value{'s' * (len(gaps) > 1)}"] if gaps else []
            if first in best and other in best:
                at_best = distance(losses[other][best[other]], losses[first][best[first]])
                words += [] if at_best is None else [f"{at_best:+z.4f} with each at its best"]
            name = arm_label(other)
            if words:
                sentences.append(
                    f"{upper_first(name)} minus {arm_label(first)}, at equal seeds: {', '.join(words)}; "
                    f"{seed_words(self.outcomes)} per value, no interval."
                )
        return sentences

    def command(self, experiments: Path) -> str:
        """What trains its arms at its values with its seeds, and with what else all runs have other than by default.

        Empty where no sweep does: without the file of an experiment, or where a value has a comma.
        """
        runs = [one.run for one in self.outcomes]
        files = [experiment_file(run, experiments) for run in runs]
        shared = self._shared(experiments)
        columns = [sorted({*column}, key=_order) for column in zip(*(one.values for one in self.outcomes), strict=True)]
        if None in files or shared is None or any("," in value for column in columns for value in column):
            return ""
        names = dict.fromkeys(file.relative_to(experiments).with_suffix("") for file in files if file is not None)
        arms = [word for name in names for word in ("--arm", str(name))]
        swept = [f"{key}={','.join(column)}" for key, column in zip(self.keys, columns, strict=True)]
        seeds = ",".join(map(str, sorted({run.config[SEED] for run in runs})))
        scale, equal = ["--scale", str(runs[0].config["scale"])], [f"--equal={self._equal}"] if self._equal else []
        words = sorted(word for word in setting_words(shared) if word not in NO_SAMPLES)
        return shlex.join(["python", "-m", "t2i_lm.sweep", *scale, *arms, *equal, *swept, f"seed={seeds}", *words])

    @property
    def _equal(self) -> str:
        """What runs of several batch sizes share, as the command's option; empty where none are swept alone."""
        if BATCH_SIZE not in self.keys or STEPS in self.keys:
            return ""
        return "tokens" if len({config_values(one.run)[STEPS] for one in self.outcomes}) > 1 else "steps"

    def _shared(self, experiments: Path) -> dict[str, Any] | None:
        """The values that all runs have other than by default, by key; None where no steps give their tokens."""
        runs = [one.run for one in self.outcomes]
        values = [config_values(run) for run in runs]
        first, base = values[0], experiment_values(runs[0], experiments)
        keys = {key for run in runs for key in changed_values(run, experiments)} - {*self.keys, SEED}
        if base and self._equal == "tokens":
            steps, rest = divmod(first[STEPS] * first[BATCH_SIZE], base[BATCH_SIZE])
            # Where all runs have one value it was given: else it changes with the steps.
            keys |= {key for key in IN_STEPS if first[key] and not is_neutral(key)} - {*self.keys}
            shared = {STEPS: steps} if steps != base[STEPS] else {}
            return None if rest else shared | _agreed(keys, values)
        return _agreed(keys, values)

    def _point(self, values: Sequence[str]) -> str:
        return " ".join(f"{key}={value}" for key, value in zip(self.keys, values, strict=True))


def find_sweeps(pool: Pool) -> tuple[list[Sweep], list[str]]:
    """The sweeps among some runs, and notes on runs that are in none."""
    runs = [run for run in pool.runs if any(MODALITIES.keys() & line[VAL].keys() for line in run.validations()[-1:])]
    notes = list(pool.notes) + [f"left out, {run.nonfinite_words}: {run.folder}" for run in runs if run.nonfinite]
    runs = [run for run in runs if not run.nonfinite]
    settable = config_values(runs[0]) if runs else {}
    keys = [key for key in differences(runs, (SEED, ORDER), paired=True) if key in settable]
    grids = [sweep for two in combinations(keys, 2) if (sweep := _sweep(two, runs)) is not None]
    lines = [sweep for key in keys if (sweep := _sweep((key,), runs)) is not None]
    lines = [
        line for line in lines if not any(line.keys[0] in grid.keys and line.folders <= grid.folders for grid in grids)
    ]
    found = []
    for several in (lines, grids):
        found += several[:MOST]
        if len(several) > MOST:
            notes.append(f"further sweeps: {', '.join(one.name for one in several[MOST:])}")
    used = {folder for sweep in (*lines, *grids) for folder in sweep.folders}
    notes += [f"in no sweep, or repeated since: {run.folder}" for run in runs if used and run.folder not in used]
    return found, notes


def _sweep(keys: tuple[str, ...], runs: Sequence[Run]) -> Sweep | None:
    """The sweep of the setting with most values, then with most runs; None without two values of each key.

    Runs of several batch sizes share their steps, or their samples.
    """
    others = differences(runs, (*varied_in(keys), ENVIRONMENT["backbone"]), paired=True)
    lengths = ((STEPS,), (STEPS, BATCH_SIZE)) if BATCH_SIZE in keys and STEPS not in keys else ((),)
    settings: dict[str, list[Run]] = {}
    for factors in lengths:
        for number, run in enumerate(runs):
            length = prod(config_values(run)[key] for key in factors)
            setting = [factors, length, *(values[number] for values in others.values())]
            settings.setdefault(repr(setting), []).append(run)
    swept = [one for one in settings.values() if _is_swept(keys, one)]
    if not swept:
        return None
    best = max(swept, key=lambda one: (len({_values(keys, run) for run in one}), len(one)))
    best = sorted(best, key=lambda run: (run.name != "t2i_pretrained", run.name, [*map(_order, _values(keys, run))]))
    newest = {(run.name, _values(keys, run), run.config[SEED]): run for run in best}  # a repetition is no further seed
    best = list(newest.values())
    arms = arms_of(dict.fromkeys(run.name for run in best))
    return Sweep(keys, [Outcome(arms[run.name], _values(keys, run), run) for run in best])


def _is_swept(keys: tuple[str, ...], runs: Sequence[Run]) -> bool:
    """Whether an arm has two values of a key, or all four combinations of two values of two keys."""
    for name in {run.name for run in runs}:
        places = {_values(keys, run) for run in runs if run.name == name}
        if len(keys) == 1 and len(places) > 1:
            return True
        if len(keys) == 2 and any(len(shared) > 1 for shared in _shared(places)):
            return True
    return False


def _shared(places: set[tuple[str, ...]]) -> Iterator[set[str]]:
    """The second values that two first values have in common."""
    columns: dict[str, set[str]] = {}
    for first, second in places:
        columns.setdefault(first, set()).add(second)
    return (one & other for one, other in combinations(columns.values(), 2))


def _values(keys: Sequence[str], run: Run) -> tuple[str, ...]:
    values = config_values(run)
    return tuple(_word(values[key]) for key in keys)


def _agreed(keys: Collection[str], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values that are equal in all runs."""
    return {key: values[0][key] for key in keys if all(one[key] == values[0][key] for one in values)}


def _word(value: Any) -> str:
    """A value; of a list with one entry the entry, which a sweep takes for it."""
    return value_word(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _order(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words, then lists, which a sweep takes among its values but not as the first."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1 + value.startswith("["), 0.0, value
