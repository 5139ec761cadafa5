"""Search for the runs of a report: finished ones are used, all others are named."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

from t2i_lm.comparison.arms import Arms, meets, pair_arms, unfinished
from t2i_lm.comparison.comparability import ENVIRONMENT, ORDER, SEED, config_values, differences
from t2i_lm.comparison.comparison import Comparison, make_comparison
from t2i_lm.comparison.plan import Plan, setting_folder, setting_in_one_spelling, setting_words
from t2i_lm.comparison.study_plan import Study
from t2i_lm.storage.owner import OwnedError, require_free
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import (
    OWNER,
    Run,
    folders_below,
    in_order,
    read_config,
    read_environment,
    read_run,
    run_folders,
)
from t2i_lm.training.study import RUNS as STUDY_RUNS
from t2i_lm.training.sweep import RUNS as SWEEP_RUNS

SHOWN = 40  # characters of a value in a note
REPEATED = re.compile(r"_?trainer\.threads=\d+$")


@dataclass(frozen=True)
class Pool:
    """The runs below a folder.

    Attributes:
        runs: finished ones, oldest first.
        notes: on every other one.
    """

    runs: tuple[Run, ...]
    notes: tuple[str, ...]


class RunSearch:
    """Search below a folder of runs, or of a study's runs, that lists it once and reads each run once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, Run | str | None] = {}

    def pool(self, folders: Iterable[Path]) -> Pool:
        """The runs of some run folders."""
        runs, notes = [], []
        for folder in sorted(folders, key=lambda path: path.name):
            if folder not in self._read:
                self._read[folder] = _finished(folder)
            found = self._read[folder]
            if isinstance(found, Run):
                runs.append(found)
            elif found is not None:
                notes.append(found)
        return Pool(tuple(runs), tuple(notes))

    def figure_pool(self) -> Pool:
        """The runs for figures: those of the folder, and those of a study in it that have no setting of their own.

        Of an experiment that has none of these, the runs of a study in it, if all of them are of one setting.
        """
        tops = (self.root, self.root / STUDY_RUNS)
        places: dict[str, set[Path]] = {}
        for folder in self._folders:
            places.setdefault(folder.parent.name, set()).add(folder.parents[1])

        def is_shown(folder: Path) -> bool:
            place = folder.parents[1]
            of_study = place.parent in tops and place.parent.name == STUDY_RUNS
            return place in tops or (of_study and places[folder.parent.name] == {place})

        return self.pool(filter(is_shown, self._folders))

    def sweep_pool(self) -> Pool:
        """The runs of sweeps below the folder, or beside that of a study."""
        top = self.root.parent if self.root.name == STUDY_RUNS else self.root
        return self.pool(run_folders(top / SWEEP_RUNS))

    def comparisons(self, study: Study, strict: bool) -> list[Comparison]:
        """Every comparison of a study, from the finished runs.

        Args:
            study: the plan.
            strict: whether runs of more than one setting are refused; else those of one are compared, the others named.
        """
        return [make_comparison(name, plan, partial(self._arms, plan, strict)) for name, plan in study.plans().items()]

    def require_scale(self, scale: str) -> None:
        """Refuses a scale that no run has, where there are runs."""
        found = set()
        for folder in self._folders:
            with suppress(ValueError, OSError):  # unreadable ones are named later
                found.add(str(read_config(folder, read_environment(folder)).get("scale")))
            if scale in found:
                return
        if found:
            raise ValueError(f"--scale {scale}: no run of it below {self.root}; found: {', '.join(sorted(found))}")

    @cached_property
    def _folders(self) -> list[Path]:
        return in_order(folder for folder in folders_below(self.root) if folder.parent != self.root)

    def _arms(self, plan: Plan, strict: bool) -> Arms:
        """The runs of a plan, without those of another setting of a study."""
        notes: dict[str, None] = {}
        found: dict[str, list[Run]] = {}
        for name, arm in plan.parsed.items():
            settings = set(map(setting_in_one_spelling, _setting_folders(plan.required(name))))
            pool = self.pool(
                folder
                for folder in self._folders
                if folder.parent.name == arm.experiment and settings & self._settings(folder)
            )
            found[name] = [run for run in pool.runs if meets(plan, name, run, config_values(run))]
            notes |= dict.fromkeys(pool.notes)
        own_notes = [*notes]
        found = _one_setting(plan, found, own_notes, self.root, strict)
        return pair_arms(plan, found, own_notes, self.root, strict)

    def _settings(self, folder: Path) -> set[str]:
        """The folder of a study's setting that a run lies in; empty for one outside of a study or without a setting.

        Of a run that repeats another with other threads (`rounding`), also the other's.
        """
        above = folder.parents[1]
        name = above.name if above != self.root and above.parent.name == STUDY_RUNS and "=" in above.name else ""
        return {setting_in_one_spelling(one) for one in (name, REPEATED.sub("", name))}


def _setting_folders(values: Mapping[str, Any]) -> set[str]:
    """Names of the folders that a study's runs with these values may lie in: values that are defaults name none."""
    words = setting_words(values)
    several = (some for count in range(len(words) + 1) for some in combinations(words, count))
    return {setting_folder(some) for some in several}


def _finished(folder: Path) -> Run | str | None:
    """A finished run, or the note on another one; None for a run without a training step."""
    try:
        run = read_run(folder)
        config_values(run)
        _ = run.config[SEED], run.config["scale"]
    except (ValueError, OSError, TypeError) as error:
        return f"left out, unreadable: {folder}: {reason(error)}"
    try:
        require_free(folder / OWNER)
    except OwnedError as error:
        return f"left out, still being written: {folder} by {error.owner or 'another process'}"
    if run.report is None:
        return unfinished(run)
    return run if run.records("train") else None


def _one_setting(
    plan: Plan, found: Mapping[str, Sequence[Run]], notes: list[str], root: Path, strict: bool
) -> dict[str, list[Run]]:
    """The runs of the setting with most pairs; adds a note on each other setting.

    A run may be of several settings, such as one seed of two precisions beside the other seeds. If `strict`, only runs
    of sweeps are left out, which differ by design.
    """
    settings: list[dict[str, list[Run]]] = []
    everything = [(arm, run) for arm, runs in found.items() for run in runs]
    for place, (arm, run) in enumerate(everything):
        joined = [one for one in settings if _agrees(plan, one, arm, run)]
        for one in joined:
            one[arm].append(run)
        if not joined:
            own: dict[str, list[Run]] = {name: [] for name in found}
            own[arm].append(run)
            settings.append(own)
            for earlier_arm, earlier in everything[:place]:
                if _agrees(plan, own, earlier_arm, earlier):
                    own[earlier_arm].append(earlier)
    if not settings:
        return {arm: [] for arm in found}
    chosen = max(settings, key=lambda one: _rank(one, root))
    for other in settings:
        if other is chosen:
            continue
        apart = {arm: [run for run in runs if run not in chosen[arm]] for arm, runs in other.items()}
        kept = {arm: [run for run in runs if strict and not _is_swept(run, root)] for arm, runs in apart.items()}
        for arm, runs in kept.items():
            chosen[arm].extend(runs)
        if left_out := sum(map(len, apart.values())) - sum(map(len, kept.values())):
            words = "; ".join(_difference(plan, chosen, apart))
            notes.append(f"left out, another setting ({left_out} runs): {words}")
    return chosen


def _agrees(plan: Plan, setting: Mapping[str, Sequence[Run]], arm: str, run: Run) -> bool:
    """Whether a run is of a setting: equal to the runs of its own arm, and to those of the other but for the weights.

    All have one precision for each seed.
    """

    def compared(runs: Sequence[Run]) -> list[Run]:
        return [*runs[:1], *(one for one in runs if one.config[SEED] == run.config[SEED]), run]

    everything = [one for runs in setting.values() for one in runs]
    varied = (SEED, ORDER, *plan.varied, ENVIRONMENT["backbone"])
    return not (
        differences(compared(setting[arm]), (SEED, ORDER), one_arm=True, paired=True)
        or differences(compared(everything), varied, plan.own_keys, paired=True)
    )


def _rank(setting: Mapping[str, Sequence[Run]], root: Path) -> tuple[bool, int, int, str]:
    """Order of settings: outside sweeps, by the number of pairs, by depth, the newest."""
    runs = [run for one in setting.values() for run in one]
    seeds = [{config_values(run)[SEED] for run in one} for one in setting.values()]
    depth = min(len(run.folder.relative_to(root).parts) for run in runs)
    pairs = len(set.intersection(*seeds))
    return not all(_is_swept(run, root) for run in runs), pairs, -depth, max(run.folder.name for run in runs)


def _is_swept(run: Run, root: Path) -> bool:
    return SWEEP_RUNS in run.folder.relative_to(root).parts


def _difference(plan: Plan, chosen: Mapping[str, Sequence[Run]], other: Mapping[str, Sequence[Run]]) -> list[str]:
    """The keys in which a setting differs, with its values and those of the chosen one."""
    for arm, runs in other.items():
        if runs and chosen[arm]:
            differing = differences([runs[0], chosen[arm][0]], (SEED, ORDER))
            return [f"{key} {_short(mine)} instead of {_short(theirs)}" for key, (mine, theirs) in differing.items()]
    return ["of an arm that has no run in the setting compared"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
