"""Comparability of runs: the keys that must agree, and the differences that a figure or table has to name."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import is_neutral
from t2i_lm.config.load import flatten_mapping, migrate
from t2i_lm.storage.run_folder import CONFIG, Run

ORDER, PRECISION, CHANGES = "order of the data", "precision", "changes within a run"
REPLAYED, PLUGINS = "replayed text", "plug-ins"
SEED = "seed"  # its values are repetitions: none is the best
# Runs of one figure agree in these.
PAIR_KEYS = ("data hash", SEED, "scale", "trainer.max_steps", "log.interval", "log.ema")
REVISIONS = "code revisions"  # start of the note on several
# The arm itself: every comparison is between values of these.
ARM_KEYS = ("name", "init")
# Paths whose contents a hash of env.json covers.
HASHED = ("data.path", "data.val_path", "data.second_val_path", "text_tokenizer.path", "image_tokenizer.path")
# Entries of env.json that comparable runs share, by dotted key, and their names in a caption.
ENVIRONMENT = {
    "data_hash": "data hash",
    "tokenizers.text": "text tokenizer",
    "tokenizers.image": "image tokenizer",
    "backbone": "backbone weights",
    "configs.backbone": "backbone config",
    "plugins": PLUGINS,
    "replay_hash": REPLAYED,
    "stream_hash": ORDER,
    "precision": PRECISION,
    "numerics": "numerics",  # version of what the code computes
}
# Entries that follow from keys of an arm's own, by the beginning of the key.
CONTENT = (
    "path",
    "val_path",
    "second_val_path",
    "train_size",
    "val_size",
    "seed",
    "hold_out_pairs",
    "captions",
    "control",
    "part_size",
    "text_ratio",
)
FOLLOWING = {
    "backbone.": ("backbone weights", "backbone config", PLUGINS),
    **{f"data.{name}": ("data hash", ORDER) for name in CONTENT},
    **{f"data.{name}": (ORDER,) for name in ("batch_size", "caption_dropout", "shuffle_parts")},
    "data.replay_": (REPLAYED, ORDER),
    "data.length": (REPLAYED,),
    "data.source": ("data hash", ORDER, PLUGINS),
    "image_tokenizer.": ("image tokenizer", "data hash", ORDER, PLUGINS),
    "text_tokenizer.": ("text tokenizer", "data hash", ORDER, REPLAYED, PLUGINS),
    "trainer.max_steps": (ORDER,),
    "trainer.precision": (PRECISION,),
}


OF_RESULTS = "collected results lack it"  # in messages on what only the run itself can give


class IncomparableError(ValueError):
    """Runs differ in more than the experiment varies."""


class MissingRunsError(ValueError):
    """There are no runs, or no measurements, of a figure; the message names the command that makes them."""


def mismatches(one: Run, two: Run) -> list[str]:
    """PAIR_KEYS in which two runs differ; an unknown value differs from every other."""
    return unequal(pair_values(one), pair_values(two))


def unequal(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """As `mismatches`, of the `pair_values` of both, which take a while to compute."""
    return [key for key in PAIR_KEYS if mine[key] is None or mine[key] != other[key]]


def pair_values(run: Run) -> dict[str, Any]:
    """A run's values of PAIR_KEYS, None where unknown."""
    config = config_values(run)
    return {key: run.environment.get("data_hash") if key == "data hash" else config.get(key) for key in PAIR_KEYS}


def config_differences(one: Run, two: Run) -> dict[str, tuple[Any, Any]]:
    """Config keys whose values differ, without ARM_KEYS and neutral keys."""
    return {key: (values[0], values[1]) for key, values in _config_differences((one, two)).items()}


def differences(
    runs: Sequence[Run],
    varied: tuple[str, ...] = (),
    own: Collection[str] = (),
    one_arm: bool = False,
    paired: bool = False,
) -> dict[str, tuple[Any, ...]]:
    """The value of each run by key, for all keys in which runs differ beyond the arm; empty if they are comparable.

    Keys are those of the config, without neutral ones and paths that are hashed, and the names in ENVIRONMENT. An entry
    that env.json lacks is "unknown", which alone is no difference. The code revision is left to `revision_note`.

    Args:
        runs: the runs to compare.
        varied: keys, or their beginnings, in which runs differ by design.
        own: config keys of which arms have values of their own, with what follows from them.
        one_arm: whether the runs are of one arm, which has one `init`.
        paired: whether runs are compared within a seed only: they share one precision for each seed, since seeds may
            be trained on several machines.
    """
    differing = {key: values for key, values in _config_differences(runs, one_arm).items() if key not in HASHED}
    for path, name in ENVIRONMENT.items():
        values = tuple(environment_value(run, path) for run in runs)
        if len({str(value) for value in values if value is not None}) > 1:
            differing[name] = tuple("unknown" if value is None else value for value in values)
    changes = tuple(map(_changes, runs))
    if len(set(changes)) > 1:
        differing[CHANGES] = changes
    if paired and all(len(names) == 1 for names in precisions(runs).values()):
        differing.pop(PRECISION, None)
    allowed = {*own, *following(own)}
    return {key: values for key, values in differing.items() if not key.startswith(varied) and key not in allowed}


def _changes(run: Run) -> str:
    """What `--resume --allow-mismatch` changed within a run, in words."""
    changes = changes_of(run.environment)
    return "; ".join(f"{one['key']} {one['from']} to {one['to']} after step {one['step']}" for one in changes) or "none"


def changes_of(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of env.json on what `--allow-mismatch` changed within a run, without those that change no curve."""
    return [one for one in environment.get("changes") or [] if not is_neutral(one["key"])]


def following(own: Collection[str]) -> set[str]:
    """The entries of ENVIRONMENT in which arms differ because of keys of their own."""
    return {entry for key in own for start, entries in FOLLOWING.items() if key.startswith(start) for entry in entries}


def precisions(runs: Iterable[Run]) -> dict[Any, list[str]]:
    """The precisions of runs by seed, where env.json has one."""
    found: dict[Any, set[str]] = {}
    for run in runs:
        if (name := environment_value(run, PRECISION)) is not None:
            found.setdefault(config_values(run)[SEED], set()).add(str(name))
    return {seed: sorted(names) for seed, names in found.items()}


def revisions(runs: Iterable[Run]) -> list[str]:
    """The code revisions of runs, where env.json has one."""
    return sorted({str(run.environment["git"]) for run in runs if run.environment.get("git")})


def revision_note(runs: Iterable[Run]) -> list[str]:
    """A note on runs of several code revisions."""
    known = revisions(runs)
    return [f"{REVISIONS}: {', '.join(name[:7] for name in known)}"] if len(known) > 1 else []


def require_comparable(runs: Mapping[str, Run], varied: tuple[str, ...] = ()) -> None:
    """Checks that runs differ in nothing beyond the arm and `varied`; seeds may be of several precisions.

    Raises:
        IncomparableError: naming each key with its values.
    """
    if differing := differences(list(runs.values()), varied, paired=True):
        named = "; ".join(
            f"{key}: " + ", ".join(f"{arm} {value}" for arm, value in zip(runs, values, strict=True))
            for key, values in differing.items()
        )
        raise IncomparableError(f"the runs differ in more than what is compared: {named}")


def config_values(run: Run) -> dict[str, Any]:
    """A run's config by dotted keys with today's names; a key that it lacks is newer and has its default.

    Raises:
        ValueError: naming a value in place of a section, or two names of one key.
    """
    values = flatten_mapping(migrate(run.config, run.folder / CONFIG))
    for key in _sections() & values.keys():
        raise ValueError(f"{run.folder / CONFIG}: {key}={values[key]}: expected the keys of a section")
    return _defaults() | values


@cache
def _sections() -> frozenset[str]:
    return frozenset(key.rpartition(".")[0] for key in _defaults()) - {""}


@cache
def _defaults() -> dict[str, Any]:
    return flatten_mapping(asdict(ExperimentConfig()))


def _config_differences(runs: Sequence[Run], one_arm: bool = False) -> dict[str, tuple[Any, ...]]:
    exempt = ARM_KEYS[:1] if one_arm else ARM_KEYS
    configs = [config_values(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: tuple(config.get(key) for config in configs) for key in keys}
    return {
        key: each
        for key, each in values.items()
        if any(value != each[0] for value in each) and key not in exempt and not is_neutral(key)
    }


def environment_value(run: Run, path: str) -> Any:
    """An entry of env.json by dotted key; None if it is absent."""
    value: Any = run.environment
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
