"""Plan of a study: comparisons and further runs, each over a grid of settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.plan import (
    SECONDARY,
    Arm,
    Plan,
    of_type,
    one_spelling,
    parse_arms,
    read_schema,
    require_settable,
    setting_folder,
    setting_words,
    typed,
)
from t2i_lm.config.experiment import is_file_name
from t2i_lm.config.file_kinds import STUDY
from t2i_lm.config.key_groups import COMPARED, is_compared
from t2i_lm.config.sections import require

STEPS, BATCH_SIZE = "trainer.max_steps", "data.batch_size"
# What a run of other steps changes with them.
IN_STEPS = (
    "optim.warmup_steps",
    "trainer.val_check_interval",
    "trainer.checkpoint_interval",
    "log.interval",
    "samples.interval",
    "forgetting.interval",
)
# Keys that are tuned: an arm's best value of them is looked for, under every value of the other keys of a grid.
TUNED = ("optim.",)
LENGTHS = 3  # fewest of a curve of the gap

MEASUREMENTS = ("relearning", "probes")  # of `python -m t2i_lm.evaluate --relearn`, and of `python -m t2i_lm.probe`


@dataclass(frozen=True)
class Member:
    """One comparison of two arms, at one point of a grid.

    Attributes:
        name: of its tables and files, unique in the study.
        plan: what is compared, `point` among its `where`.
        point: values of the grid's keys; empty without a grid.
    """

    name: str
    plan: Plan
    point: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A comparison of a study: each arm minus the last one, at every point of its grid.

    Attributes:
        name: in the study.
        keys: of the grid; empty without one.
        members: point by point.
    """

    name: str
    keys: tuple[str, ...]
    members: tuple[Member, ...]

    @property
    def tuned(self) -> str | None:
        """The key of which each arm has a best value; None without one, or for an endpoint that is no loss."""
        keys = [key for key in self.keys if key.startswith(TUNED)]
        return keys[0] if len(keys) == 1 and Endpoint(self.members[0].plan.primary).is_loss else None

    @property
    def has_several_arms(self) -> bool:
        """Whether several arms are compared with the last."""
        return len({next(iter(member.plan.parsed)) for member in self.members}) > 1

    def name_at_best(self, member: Member) -> str:
        """The name of the comparison of a member's arms, each at its best value under the values of the other keys."""
        arm = [next(iter(member.plan.parsed))] if self.has_several_arms else []
        others = {name: value for name, value in member.point.items() if name != self.tuned}
        return setting_folder([self.name, "each at its best", *arm, *setting_words(others)])


@dataclass(frozen=True)
class RunGroup:
    """Experiments that are trained and not compared.

    Attributes:
        arms: as in `parse_arms`.
        seeds: seeds of each arm.
        where: values of config keys.
        over: several values of one or more config keys; every combination is trained.
    """

    arms: Any = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    over: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needed:
    """Runs of one setting: what needs them, their arms and seeds, `where` with the values of `point` included.

    `use` is the name of a comparison at one point, `group` over the whole grid; both are equal for a group of runs.
    """

    use: str
    group: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    scale: str
    where: Mapping[str, Any]
    point: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Comparisons and further runs, trained and evaluated by one command.

    Attributes:
        scale, seeds, primary, margin, secondary, alpha: of every comparison that does not set its own (see `Plan`).
        comparisons: keys of a `Plan` by name; its runs are trained with the values of `where`. With more than two arms
            each is compared with the last one; with `over`, at every combination of values.
        runs: further experiments by name of the group, for figures: keys of a `RunGroup`.
        measure: names of `MEASUREMENTS`, made after training of the runs that the report shows: the lowest seed with
            both arms of the comparison that answers first.
        rounding: number of threads with which the runs of the first seed in the first comparison (of a grid: at its
            first point) are trained once more, on a CPU: what equal runs differ by is rounding. null: none.
    """

    scale: str = "demo"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    primary: str = "val/iid.image.nll"
    margin: str = "1%"
    secondary: list[str] = field(default_factory=lambda: list(SECONDARY))
    alpha: float = 0.05
    comparisons: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)
    measure: list[str] = field(default_factory=list)
    rounding: int | None = None

    def families(self) -> list[Family]:
        """Every comparison with its grid.

        Raises:
            ValueError: naming the key.
        """
        shared = {name: getattr(self, name) for name in ("scale", "seeds", "primary", "margin", "secondary", "alpha")}
        return [_family(str(name), shared | own) for name, own in self.comparisons.items()]

    def plans(self) -> dict[str, Plan]:
        """The plan of every comparison of two arms at one point, by its name."""
        return {member.name: member.plan for family in self.families() for member in family.members}

    def groups(self) -> dict[str, RunGroup]:
        """The further runs."""
        shared = {"seeds": self.seeds[:1]}
        return {name: typed(RunGroup, shared | own, f"runs.{name}.") for name, own in self.runs.items()}

    def needed(self, count: int | None = None) -> list[Needed]:
        """The runs of every comparison and group.

        Args:
            count: number of seeds, the first ones of each comparison and group; None for all.

        Raises:
            ValueError: naming the key, or `--seeds` where no comparison and no group has as many seeds.
        """
        found = []
        for family in self.families():
            for member in family.members:
                plan = member.plan
                arms, seeds = tuple(plan.parsed.values()), tuple(plan.seeds[:count])
                found.append(Needed(member.name, family.name, arms, seeds, plan.scale, plan.where, member.point))
        for name, group in self.groups().items():
            key = f"runs.{name}."
            require_settable(group.where, f"{key}where")
            arms = tuple(parse_arms(group.arms, f"{key}arms").values())
            for point in _points(group.over, group.where, arms, key):
                where = {**group.where, **point}
                found.append(Needed(name, name, arms, tuple(group.seeds[:count]), self.scale, where, point))
        if count is not None:
            several = [*(plan.seeds for plan in self.plans().values()), *(one.seeds for one in self.groups().values())]
            most = max(map(len, several))
            require(1 <= count <= most, "--seeds", count, f"1 to {most}, the seeds of the plan")
        return found


def _family(name: str, content: dict[str, Any]) -> Family:
    key = f"comparisons.{name}."
    over = content.get("over") or {}
    plain = {word: value for word, value in content.items() if word != "over"}
    arms = parse_arms(plain.get("arms", Plan().arms), f"{key}arms")
    require(len(arms) >= 2, f"{key}arms", list(arms), "two arms, or several of which each is compared with the last")
    *others, last = arms
    forms = plain.get("arms", Plan().arms)
    pairs = {
        other: [other, last] if isinstance(forms, list) else {other: forms[other], last: forms[last]}
        for other in others
    }
    where = plain.get("where") or {}
    require(isinstance(where, Mapping), f"{key}where", where, "values by config key")
    require_settable(where, f"{key}where")
    members = []
    for point in _points(over, where, tuple(arms.values()), key):
        for other in others:
            words = [name, *([other] if len(others) > 1 else []), *setting_words(point)]
            plan = typed(Plan, {**plain, "arms": pairs[other], "where": {**where, **point}}, key)
            members.append(Member(setting_folder(words), plan, point))
    names = [member.name for member in members]
    require(len(set(names)) == len(names), f"{key}over", over, "each value once")
    return Family(name, tuple(over), tuple(members))


def _points(over: Any, where: Mapping[str, Any], arms: tuple[Arm, ...], key: str) -> list[dict[str, Any]]:
    """Every combination of a grid's values; one empty one without a grid."""
    require(isinstance(over, Mapping), f"{key}over", over, "lists of values by config key")
    require_settable(dict.fromkeys(over), f"{key}over")
    own = {name for arm in arms for name in arm.own}
    for name, values in over.items():
        several = isinstance(values, list) and len(values) > 0
        once = several and len({of_type(name, one) for one in values}) == len(values)
        require(once, f"{key}over.{name}", values, "a list of values, each once")
        require(is_compared(name), f"{key}over.{name}", values, COMPARED)
        require(
            name not in where and name not in own,
            f"{key}over.{name}",
            values,
            "a key that neither where nor an arm sets",
        )
    return [dict(zip(over, values, strict=True)) for values in product(*over.values())]


def read_study(path: Path) -> Study:
    """A study from a YAML file, its comparisons and groups checked.

    Raises:
        ValueError: naming the file and the key.
    """
    study = read_schema(Study, path, STUDY)
    try:
        require(bool(study.comparisons or study.runs), "comparisons", study.comparisons, "at least one comparison")
        require(bool(study.seeds), "seeds", study.seeds, "at least one seed")
        known = set(study.measure) <= {*MEASUREMENTS}
        require(known, "measure", study.measure, f"names among {', '.join(MEASUREMENTS)}")
        require(study.rounding is None or study.rounding >= 1, "rounding", study.rounding, "null or at least 1 thread")
        for section in ("comparisons", "runs"):
            for name, own in getattr(study, section).items():
                require(is_file_name(str(name)), "name", name, "a name without /, of which files are named")
                require(isinstance(own, dict), f"{section}.{name}", own, "keys and values")
                both = name in study.comparisons and name in study.runs
                require(not both, f"{section}.{name}", own, "a name that comparisons and runs do not share")
        for need in study.needed():
            section = "comparisons" if need.group in study.comparisons else "runs"
            require(bool(need.seeds), f"{section}.{need.group}.seeds", list(need.seeds), "at least one seed")
            require(bool(need.arms), f"{section}.{need.group}.arms", list(need.arms), "at least one experiment")
        names = [member.name for family in study.families() for member in family.members]
        for name in names:
            require(names.count(name) == 1 and name not in study.runs, "name", name, "each name once")
        _require_own_files(study.families())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return study


@dataclass(frozen=True)
class CurvePlan:
    """A curve of the gap against training tokens: comparisons that differ in nothing but their length.

    Attributes:
        name: of its files, without `_gap`.
        family: the first comparison of the study that has one of the lengths.
        members: names of the comparisons, one for each length.
    """

    name: str
    family: str
    members: tuple[str, ...]


def curve_plans(families: Sequence[Family]) -> list[CurvePlan]:
    """A curve for every setting of several lengths, `trainer.max_steps` in grids; a length of two grids counts once."""
    lengths: dict[str, dict[str, str]] = {}
    names: dict[str, tuple[str, str]] = {}
    for family in families:
        for member in family.members:
            if STEPS in member.point:
                plan = member.plan
                rest = setting_words({key: value for key, value in plan.where.items() if key != STEPS})
                # Intervals require every seed at every length: longer lengths of fewer seeds have a curve of their own.
                tested = (plan.scale, plan.primary, plan.margin, plan.alpha, plan.seeds)
                key = repr((plan.arms, sorted(map(one_spelling, rest)), *tested))
                (steps,) = setting_words({STEPS: member.point[STEPS]})
                lengths.setdefault(key, {}).setdefault(one_spelling(steps), member.name)
                arm = [next(iter(plan.parsed))] if family.has_several_arms else []
                others = {name: value for name, value in member.point.items() if name != STEPS}
                names.setdefault(key, (setting_folder([family.name, *arm, *setting_words(others)]), family.name))
    several = ((key, one) for key, one in lengths.items() if len(one) >= LENGTHS)
    return [CurvePlan(*names[key], tuple(one.values())) for key, one in several]


TABLE, FIGURE = (".txt", ".json"), (".png", ".pdf")  # suffixes
# Files of the figures that a study draws beside its results.
FIGURES = (*map(str, range(1, 7)), "_forgetting", "_gap", "_inits", "_relearning", "_remedies")
DRAWN = (*(f"figure{name}{suffix}" for name in FIGURES for suffix in FIGURE), "figure_gap.json")


def result_files(families: Sequence[Family]) -> Iterator[tuple[str, str]]:
    """Every file that results of comparisons may be written to, and the comparison of the study that it is of."""
    for family in families:
        names = {member.name: TABLE for member in family.members}
        if len(names) > 1:
            yield from ((f"{family.name}{suffix}", family.name) for suffix in (*TABLE, *FIGURE))
            if family.tuned is not None:
                names |= {family.name_at_best(member): TABLE for member in family.members}
                names[f"{family.name}_losses"] = FIGURE
        yield from ((f"{name}{suffix}", family.name) for name, suffixes in names.items() for suffix in suffixes)
    for curve in curve_plans(families):
        yield from ((f"{curve.name}_gap{suffix}", curve.family) for suffix in (*TABLE, *FIGURE))


def _require_own_files(families: Sequence[Family]) -> None:
    """Checks that no two results of a study have one file.

    Raises:
        ValueError: naming the comparison and the file.
    """
    owners = dict.fromkeys(DRAWN, "a figure of the study")
    for file, name in result_files(families):
        require(file not in owners, f"comparisons.{name}", file, f"another name: {owners.get(file)} has this file")
        owners[file] = f"the comparison {name}"


def chosen_study(path: Path | None, scale: str | None) -> Study:
    """The study of a file, or one of the default comparison alone, with the command line's scale.

    Raises:
        ValueError: naming the file and the key.
    """
    study = Study(seeds=[], comparisons={"pretraining": {}}) if path is None else read_study(path)
    return study if scale is None else replace(study, scale=scale)
