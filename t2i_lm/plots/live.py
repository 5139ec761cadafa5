"""Figures of a run while it trains, beside the newest run that pairs with it."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from t2i_lm.comparison.comparability import mismatches
from t2i_lm.plots.alignment import alignment_figure
from t2i_lm.plots.captions import group_caption, smoothing
from t2i_lm.plots.curves import series
from t2i_lm.plots.floor import with_floor
from t2i_lm.plots.groups import FIGURE6, arm_of
from t2i_lm.plots.pairing import newest_first
from t2i_lm.plots.panels import Panel, draw_panels
from t2i_lm.storage.run_folder import Run, read_run

# Panels of losses of a figure, their modality and title, by task.
FIGURES = {
    "text_to_image": {
        "Figure 3": {"all": "All tokens"},
        "Figure 4": {"text": "Text tokens", "image": "Image tokens"},
    },
    "unconditional": {"Figure 5": {"image": "Image tokens"}},
}
# The experiments that a run is drawn beside, by task.
PARTNERS = {
    "text_to_image": ("t2i_pretrained", "t2i_scratch"),
    "unconditional": ("uncond_pretrained", "uncond_scratch"),
    "align": tuple(FIGURE6.experiments.values()),
}
DPI = 120


def live_figures(folder: Path) -> dict[str, Image.Image]:
    """The figures of a run's task as images by title; empty before its first logged step and for other tasks."""
    run = read_run(folder)
    task = str(run.config["task"])
    if task not in PARTNERS or not run.records("train"):
        return {}
    arms = _partners(run, PARTNERS[task]) | {arm_of(run.name): run}
    if task == "align":
        return {"Figure 6": _draw(*alignment_figure(arms), arms, FIGURE6.varied)}
    return {title: _draw(title, _loss_panels(words, arms), arms) for title, words in FIGURES[task].items()}


def _partners(run: Run, names: tuple[str, ...]) -> dict[str, Run]:
    """The newest run of each other experiment that pairs with a run, by arm."""
    found = {}
    for name in names:
        if name == run.name:
            continue
        others = newest_first(run.folder.parents[1], name)
        partner = next((other for other in others if not mismatches(run, other)), None)
        if partner is not None:
            found[arm_of(name)] = partner
    return found


def _loss_panels(titles: dict[str, str], arms: dict[str, Run]) -> list[Panel]:
    return [
        with_floor(
            Panel(title, {arm: series(run, modality) for arm, run in arms.items()}), arms.values(), modality, "ppl"
        )
        for modality, title in titles.items()
    ]


def _draw(title: str, panels: list[Panel], arms: dict[str, Run], varied: tuple[str, ...] = ()) -> Image.Image:
    caption = f"{title}. {group_caption(arms, varied=varied)}"
    file = BytesIO()
    first = next(iter(arms.values()))
    draw_panels(panels, caption, smoothing=smoothing(first), splits=first.validation_splits).savefig(file, dpi=DPI)
    return Image.open(file).convert("RGB")
