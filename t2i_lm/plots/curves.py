"""The two arms that Figures 3 and 4 compare: what they must share, their curves, the gap left."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.storage.run_folder import Run

# What two runs must share before their curves may be laid over each other.
PAIR_KEYS = ("data hash", "seed", "scale", "trainer.max_steps", "log.interval", "log.ema")
# Where a run was made and what it printed; none of it changes a curve.
CIRCUMSTANCES = (
    "name",
    "init",
    "run.",
    "samples.",
    "forgetting.",
    "data.cache_dir",
    "data.workers",
    "data.trim",
    "log.logger",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.threads",
    "trainer.packing",
    "trainer.checkpoint_interval",
)
# Paths whose contents the data hash already compares.
HASHED = ("data.path", "data.val_path", "text_tokenizer.path", "image_tokenizer.path")
# Facts of env.json that two arms of one comparison should share, with their plain names.
ENVIRONMENT = {"git": "code revision", "stream_hash": "order of the data", "precision": "precision"}


@dataclass(frozen=True)
class Series:
    """One arm's curve of one modality: perplexities (or losses) against positions (or samples) seen."""

    tokens: list[float]
    raw: list[float]
    ema: list[float]
    val_tokens: list[float]
    val: list[float]


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done, positions seen, and those of them that were no pad."""

    step: int
    tokens: int
    real: int


@dataclass(frozen=True)
class Gap:
    """A final value of both arms. The gap is pre-trained minus random: < 0 favours the former."""

    quantity: str
    pretrained: float
    scratch: float

    @property
    def absolute(self) -> float:
        """In the quantity's own unit."""
        return self.pretrained - self.scratch

    @property
    def percent(self) -> float:
        """In percent of the random arm."""
        return 100 * self.absolute / self.scratch


@dataclass(frozen=True)
class Pair:
    """A run from pre-trained and one from random weights, otherwise equal."""

    pretrained: Run
    scratch: Run

    @property
    def arms(self) -> dict[str, Run]:
        """Both runs by arm."""
        return {"pretrained": self.pretrained, "scratch": self.scratch}

    def unfinished(self) -> list[str]:
        """Arms that have written no report."""
        return [arm for arm, run in self.arms.items() if run.report is None]

    def other_differences(self) -> dict[str, tuple[Any, Any]]:
        """What differs beyond `name` and `init`: in a controlled pair, nothing."""
        differing = config_differences(self.pretrained, self.scratch, ignored=HASHED)
        for key, words in ENVIRONMENT.items():
            values = (self.pretrained.environment.get(key), self.scratch.environment.get(key))
            if None not in values and values[0] != values[1]:
                differing[words] = values
        return differing

    def text_floor_nll(self) -> float | None:
        """Entropy of the captions in nats a text token, where a report gives it."""
        for run in self.arms.values():
            if run.report and run.report.get("text_floor_nll") is not None:
                return float(run.report["text_floor_nll"])
        return None

    def final_gaps(self, modalities: Sequence[str] = ("text", "image", "all")) -> tuple[int | None, list[Gap]]:
        """Held-out nll (nats/token) and perplexity at the last validation that both arms reached.

        Returns:
            That step and, for each modality, a nll and a ppl row; (None, []) where there is none.
        """
        pretrained, scratch = ({line["step"]: line["val"] for line in run.records("val")} for run in self.arms.values())
        common = pretrained.keys() & scratch.keys()
        if not common:
            return None, []
        step = max(common)
        mine, other = pretrained[step], scratch[step]
        rows = []
        for modality in modalities:
            for key in ("nll", "ppl"):
                if key in mine.get(modality, {}) and key in other.get(modality, {}):
                    rows.append(Gap(f"{modality} {key}", mine[modality][key], other[modality][key]))
        return step, rows


def series(run: Run, modality: str, unit: str = "ppl", axis: str = "tokens_nominal") -> Series:
    """The curve of a modality from metrics.jsonl, as perplexity or `nll`; intervals without targets are left out."""
    train = [line for line in run.records("train") if unit in line["train"].get(modality, {})]
    val = [line for line in run.records("val") if unit in line["val"].get(modality, {})]
    return Series(
        [line[axis] for line in train],
        [line["train"][modality][unit] for line in train],
        [line["train"][modality][f"{unit}_ema"] for line in train],
        [line[axis] for line in val],
        [line["val"][modality][unit] for line in val],
    )


def scalar_series(run: Run, name: str, axis: str = "tokens_nominal") -> Series:
    """A value that is logged beside the training loss, as it is."""
    lines = [line for line in run.records("train") if name in line.get("scalars", {})]
    values = [line["scalars"][name] for line in lines]
    return Series([line[axis] for line in lines], values, values, [], [])


def progress(run: Run) -> Progress:
    """How far a run has come, by its last line."""
    last = run.metrics[-1]
    return Progress(last["step"], last["tokens_nominal"], last["tokens_real"])


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a config by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def config_differences(one: Run, two: Run, ignored: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Config keys whose values differ, circumstances and `ignored` left out.

    A key that one run does not have is newer than that run, whose value is then the default: what is added changes
    nothing where it is not asked for.
    """
    mine, other = leaves(one.config), leaves(two.config)
    known = leaves(asdict(ExperimentConfig()))
    mine, other = ({key: known.get(key) for key in mine | other} | values for values in (mine, other))
    keys = [key for key in mine | other if not key.startswith(CIRCUMSTANCES) and key not in ignored]
    return {key: (mine.get(key), other.get(key)) for key in keys if mine.get(key) != other.get(key)}


def pair_values(run: Run) -> dict[str, Any]:
    """A run's values of PAIR_KEYS; None where it does not say."""
    config = leaves(run.config)
    return {key: run.environment.get("data_hash") if key == "data hash" else config.get(key) for key in PAIR_KEYS}


def mismatches(one: Run, two: Run) -> list[str]:
    """PAIR_KEYS that keep two runs apart. A value that is unknown matches nothing."""
    mine, other = pair_values(one), pair_values(two)
    return [key for key in PAIR_KEYS if mine[key] is None or mine[key] != other[key]]
