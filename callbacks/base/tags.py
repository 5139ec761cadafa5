"""Names of a run's numbers in TensorBoard and other loggers.

The loggers get what a chart shows; metrics.jsonl has every modality's sums, losses and perplexities.
"""

from collections.abc import Mapping
from typing import Any

Entries = Mapping[str, Mapping[str, float]]
# Modalities of the figures, whose training loss is also logged as average and as perplexity, and the others' fields.
FIGURES, OF_FIGURES, OF_OTHERS = ("text", "image", "all"), ("nll", "nll_ema", "ppl_ema"), ("nll",)
# The aggregate that differs from `all` by near-deterministic separators.
LEFT_OUT = ("all_no_boundary",)
# Share of a run after which losses are also logged under `late/`, for charts without the steep start.
LATE, LATE_MODALITIES = 0.1, ("text", "image", "all")
# Fields of throughput that a chart can show.
SPEED = ("tokens_per_s", "mfu", "data_wait", "memory_mib")


def loss_tags(values: Mapping[str, Entries], prefix: str = "", share: float = 0.0) -> dict[str, float]:
    """Losses by tag, such as `train/text/nll_ema` and `val/iid/image/nll`.

    Args:
        values: fields of each modality, by `train` or validation set.
        prefix: in front of every tag, so that runs of several tasks share a dashboard.
        share: of the run that is done, in [0, 1].
    """
    tags: dict[str, float] = {}
    for key, entries in values.items():
        smooth = "nll_ema" if key == "train" else "nll"
        for name, entry in entries.items():
            fields = OF_FIGURES if name in FIGURES else () if name in LEFT_OUT else OF_OTHERS
            tags |= {f"{prefix}{key}/{name}/{field}": entry[field] for field in fields if field in entry}
            if share > LATE and name in LATE_MODALITIES and smooth in entry:
                tags[f"{prefix}late/{key}/{name}/{smooth}"] = entry[smooth]
    return tags


def more_tags(more: Mapping[str, Any], rate: float, prefix: str = "") -> dict[str, float]:
    """The other numbers of a training line: the module's scalars, throughput and learning rate.

    Args:
        more: fields of the line beside its losses; empty for validations, whose learning rate is not logged again.
        rate: the learning rate.
        prefix: in front of the module's scalars.
    """
    tags = {f"{prefix}train/{name}": value for name, value in more.get("scalars", {}).items()}
    tags |= {f"throughput/{name}": more["throughput"][name] for name in SPEED if name in more.get("throughput", {})}
    return tags | ({"optim/lr": rate} if more else {})
