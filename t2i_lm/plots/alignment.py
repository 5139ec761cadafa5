"""Panels of Figure 6: contrastive alignment of image rows with text rows (Section 3.2)."""

import math
from collections.abc import Mapping

from t2i_lm.plots.curves import scalar_series, series
from t2i_lm.plots.panels import Panel
from t2i_lm.storage.run_folder import Run

AXIS = "pairs seen"


def alignment_figure(arms: Mapping[str, Run]) -> tuple[str, list[Panel]]:
    """The figure's title; panels of the contrastive loss, with chance, and of the learnable temperature, by arm."""
    pairs = next(iter(arms.values())).config["data"]["batch_size"]
    loss = {arm: series(run, "all", "nll", "samples") for arm, run in arms.items()}
    scale = {arm: scalar_series(run, "logit_scale", "samples") for arm, run in arms.items()}
    return f"Figure 6. Contrastive alignment of image-token rows with text-token rows, {pairs:,} pairs per batch", [
        Panel("Contrastive loss", loss, math.log(pairs), f"chance, ln {pairs:,}", unit="loss (nats)", axis=AXIS),
        Panel("Learnable temperature", scale, unit="logit scale, 1 / temperature", axis=AXIS),
    ]
