"""Arms of the figures that compare several runs. Loads nothing else, so that commands can import it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Beginnings of experiments' names; the rest is the arm.
PREFIXES = ("t2i_", "uncond_", "remedy_")


def arm_of(experiment: str) -> str:
    """The arm of an experiment: its name without the prefix."""
    return next((experiment.removeprefix(one) for one in PREFIXES if experiment.startswith(one)), experiment)


def arms_of(experiments: Iterable[str]) -> dict[str, str]:
    """The arm of each experiment; its whole name where several would have one arm."""
    arms = {name: arm_of(name) for name in experiments}
    return {name: arm if list(arms.values()).count(arm) == 1 else name for name, arm in arms.items()}


@dataclass(frozen=True)
class Group:
    """Runs that one figure compares.

    Attributes:
        experiments: experiment name by arm. The first arm is the reference: the others must agree with it in PAIR_KEYS.
        command: what trains the arms, for the error where they are missing.
        required: least number of arms for a figure.
        records: kind of metrics.jsonl lines that a run must have.
        varied: config keys, or their beginnings, in which arms differ by design, besides `name` and `init`.
    """

    experiments: Mapping[str, str]
    command: str
    required: int = 2
    records: str = "train"
    varied: tuple[str, ...] = ()


FIGURE5 = Group(
    {
        "scratch": "uncond_scratch",
        "pretrained": "uncond_pretrained",
        "tune_embed": "uncond_tune_embed",
        "tune_norm": "uncond_tune_norm",
        "tune_first_half": "uncond_tune_first_half",
        "tune_ffn": "uncond_tune_ffn",
    },
    "python -m t2i_lm.ablate --all",
    varied=("tune",),
)
FIGURE6 = Group(
    {"align": "align", "align_shuffled": "align_shuffled"},
    "python -m t2i_lm.train experiments/align.yaml --scale demo",
    required=1,
    varied=("align.shuffle_pairs",),
)
BETWEEN = ("gaussian", "mimetic", "shuffled", "embeddings_only", "body_only", "aligned")
INITS = Group(
    {"scratch": "t2i_scratch", "pretrained": "t2i_pretrained", **{name: f"t2i_{name}" for name in BETWEEN}},
    f"python -m t2i_lm.train experiments/t2i_NAME.yaml with NAME one of {', '.join(BETWEEN)}",
    required=3,
    varied=("aligned_rows",),
)
FORGETTING = Group(
    {"pretrained": "t2i_pretrained", "scratch": "t2i_scratch"},
    "make exp-pretrained exp-scratch, or forgetting.interval=STEPS forgetting.text=HELDOUT at another scale",
    required=1,
    records="forgetting",
)
