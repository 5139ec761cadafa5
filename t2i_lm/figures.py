"""Draws the study's figures: `python -m t2i_lm.figures`. Curves come from metrics.jsonl alone."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_lm.plots.captions import final_note, gap_table, group_caption, loss_table, pair_caption, smoothing
from t2i_lm.plots.curves import Pair, progress, scalar_series, series
from t2i_lm.plots.pairing import Group, find_group, find_pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from t2i_lm.plots.panels import Panel
    from t2i_lm.storage.run_folder import Run

EXAMPLE = """example:
  python -m t2i_lm.figures
  python -m t2i_lm.figures --figure 4 --runs runs --out figures

without --pretrained and --scratch, the newest two runs are drawn that agree in data hash, seed,
scale, trainer.max_steps, log.interval and log.ema."""
INITIALIZATION = "from a pre-trained language model and from random weights"


@dataclass(frozen=True)
class Request:
    """Where to look for runs, and which to take where the user says so."""

    root: Path = Path("runs")
    pretrained: Path | None = None
    scratch: Path | None = None

    @cached_property
    def pair(self) -> Pair:
        """The two arms of Figures 3 and 4, read once.

        Raises:
            ValueError: if no two runs pair.
        """
        return find_pair(self.root, self.pretrained, self.scratch)


@dataclass(frozen=True)
class Drawing:
    """A figure, what it says under it, and the numbers behind it."""

    title: str
    figure: "Figure"
    caption: str
    table: str

    def save(self, stem: Path) -> list[Path]:
        """Writes STEM.png and STEM.pdf."""
        from t2i_lm.plots.panels import save_figure

        return save_figure(self.figure, stem, self.title, self.caption)


def figure2(request: Request) -> Drawing:
    """Figure 2: published zero-shot COCO FIDs by release date, and those of our runs (Section 1)."""
    from t2i_lm.plots.published import draw_systems, own_systems, published_systems, system_table, systems_caption

    systems = [*published_systems(), *own_systems(request.root)]
    title = "Figure 2. Zero-shot FID on COCO of auto-regressive and diffusion models against their release date"
    caption = f"{title}. {systems_caption(systems)}"
    return Drawing(title, draw_systems(systems, caption), caption, system_table(systems))


def figure3(request: Request) -> Drawing:
    """Figure 3: perplexity of all tokens, pre-trained against random weights (Section 2.2)."""
    title = f"Figure 3. Perplexity of all tokens, {INITIALIZATION}"
    how = "Every target counts, the five boundary tokens of a sequence too, pads never."
    return _draw_pair(request.pair, title, {"all": "All tokens"}, how)


def figure4(request: Request) -> Drawing:
    """Figure 4: the same runs, split into text and image tokens (Section 2.2)."""
    title = f"Figure 4. Perplexity of text and of image tokens, {INITIALIZATION}"
    how = "A prediction counts as text or image by the token that is predicted."
    return _draw_pair(request.pair, title, {"text": "Text tokens", "image": "Image tokens"}, how)


def figure5(request: Request) -> Drawing:
    """Figure 5: unconditional image modelling, what of a pre-trained model has to learn (Section 3.1)."""
    title = "Figure 5. Loss of image tokens without captions, by what of the pre-trained model is tuned"
    labels = {"pretrained": "tuned fully"}
    return _draw_group(request, FIGURE5, title, {"image": "Image tokens"}, labels)


def figure6(request: Request) -> Drawing:
    """Figure 6: contrastive alignment of image rows with text rows, loss and temperature (Section 3.2)."""
    from t2i_lm.plots.panels import Panel

    arms = find_group(request.root, FIGURE6)
    pairs = arms["align"].config["data"]["batch_size"]
    title = f"Figure 6. Contrastive alignment of image-token rows with text-token rows, {pairs:,} pairs a batch"
    axis = "pairs seen"
    loss = {arm: series(run, "all", "nll", "samples") for arm, run in arms.items()}
    scale = {arm: scalar_series(run, "logit_scale", "samples") for arm, run in arms.items()}
    panels = [
        Panel("Contrastive loss", loss, math.log(pairs), f"chance, ln {pairs:,}", unit="loss (nats)", axis=axis),
        Panel("Learnable temperature", scale, unit="logit scale, 1 / temperature", axis=axis),
    ]
    return _group_drawing(FIGURE6, arms, title, panels, {}, "all")


def figure_inits(request: Request) -> Drawing:
    """Initializations between pre-trained and random: statistics, layers, rows, aligned image rows."""
    title = "Perplexity of text and of image tokens, by what is taken from the pre-trained language model"
    return _draw_group(request, INITS, title, {"text": "Text tokens", "image": "Image tokens"}, {}, "ppl")


def figure_forgetting(request: Request) -> Drawing:
    """Forgetting: held-out text against tokens seen, over the text rows and over all rows (Table 1, as curves)."""
    from t2i_lm.plots.panels import ARM_STYLES, Panel, draw_panels
    from t2i_lm.plots.tradeoff import question_table, text_series

    arms = find_group(request.root, FORGETTING)
    title = "What a language model forgets as it learns to draw: held-out text"
    panels = [
        Panel(words, {arm: text_series(run, rows) for arm, run in arms.items()})
        for rows, words in (("text_rows", "Softmax over the text rows"), ("all_rows", "Softmax over all rows"))
    ]
    how = "Held-out text, measured at the points; both softmaxes in one pass."
    caption = f"{title}. {group_caption(arms, list(arms), how)}"
    figure = draw_panels(panels, caption, {arm: ARM_STYLES[arm].label for arm in arms}, "")
    return Drawing(title, figure, caption, "\n".join([loss_table(arms, "image"), "", question_table(arms)]))


def figure_remedies(request: Request) -> Drawing:
    """Remedies: what is kept of the language against what it costs in image loss."""
    from t2i_lm.plots.tradeoff import draw_tradeoff, point_of, remedy_group, scratch_of, tradeoff_table

    arms = find_group(request.root, remedy_group(request.root))
    points = [point_of(arm, run) for arm, run in arms.items()]
    scratch = scratch_of(request.root, arms["pretrained"])
    title = "Remedies against forgetting: text loss gained against image loss"
    how = (
        "Across: held-out text loss at the end minus before, softmax over the text rows; bars: standard error of the "
        "paired differences of rows. Up: held-out image loss at the end. One run each."
    )
    caption = f"{title}. {group_caption(arms, list(arms), how)}"
    return Drawing(title, draw_tradeoff(points, caption, scratch), caption, tradeoff_table(points, scratch))


TUNED = ("embed", "norm", "first_half", "ffn")
FIGURE5 = Group(
    {
        "scratch": "uncond_scratch",
        "pretrained": "uncond_pretrained",
        **{f"tune_{name}": f"uncond_tune_{name}" for name in TUNED},
    },
    "python -m t2i_lm.ablate --all",
)
FIGURE6 = Group(
    {"align": "align", "align_shuffled": "align_shuffled"},
    "python -m t2i_lm.train experiments/align.yaml --scale demo",
    required=1,
)
BETWEEN = ("shuffled", "embeddings_only", "body_only", "aligned")
INITS = Group(
    {"scratch": "t2i_scratch", "pretrained": "t2i_pretrained", **{name: f"t2i_{name}" for name in BETWEEN}},
    f"python -m t2i_lm.train experiments/t2i_NAME.yaml with NAME one of {', '.join(BETWEEN)}",
    required=3,
)
FORGETTING = Group(
    {"pretrained": "t2i_pretrained", "scratch": "t2i_scratch"},
    "python -m t2i_lm.train experiments/t2i_pretrained.yaml forgetting.interval=100 forgetting.text=HELDOUT",
    required=1,
    records="forgetting",
)
# Name -> what chooses its runs and draws it.
FIGURES: dict[str, Callable[[Request], Drawing]] = {
    "2": figure2,
    "3": figure3,
    "4": figure4,
    "5": figure5,
    "6": figure6,
    "inits": figure_inits,
    "forgetting": figure_forgetting,
    "remedies": figure_remedies,
}
# What can be drawn where nothing has been trained.
WITHOUT_RUNS = ("2",)


def stem(name: str) -> str:
    """File name of a figure without its suffix: figure4, figure_inits."""
    return f"figure{name}" if name.isdigit() else f"figure_{name}"


def _draw_group(
    request: Request,
    group: Group,
    title: str,
    modalities: dict[str, str],
    labels: dict[str, str],
    unit: str = "nll",
) -> Drawing:
    """Curves of all arms, one panel a modality; the reference comes last and is drawn on top."""
    from t2i_lm.plots.panels import Panel

    arms = find_group(request.root, group)
    order = [*list(arms)[1:], next(iter(arms))]
    words = {"nll": "loss (nats/token)", "ppl": "perplexity"}[unit]
    panels = [
        Panel(name, {arm: series(arms[arm], modality, unit) for arm in order}, unit=words)
        for modality, name in modalities.items()
    ]
    return _group_drawing(group, arms, title, panels, labels, "image")


def _group_drawing(
    group: Group, arms: "dict[str, Run]", title: str, panels: "list[Panel]", labels: dict[str, str], modality: str
) -> Drawing:
    from t2i_lm.plots.panels import ARM_STYLES, draw_panels

    caption = f"{title}. {group_caption(arms, list(group.experiments))}"
    legend = {arm: labels.get(arm, ARM_STYLES[arm].label) for arm in panels[0].series}
    constant = f"EMA {next(iter(arms.values())).config['log']['ema']:g}"
    return Drawing(title, draw_panels(panels, caption, legend, constant), caption, loss_table(arms, modality))


def _draw_pair(pair: Pair, title: str, modalities: dict[str, str], how: str) -> Drawing:
    """Perplexity curves of both arms, one panel a modality."""
    from t2i_lm.plots.panels import ARM_STYLES, Panel, draw_panels

    floor = pair.text_floor_nll()
    panels = [
        Panel(
            words,
            {arm: series(run, modality) for arm, run in pair.arms.items()},
            math.exp(floor) if floor is not None and modality == "text" else None,
            f"floor, the captions' entropy: {math.exp(floor):.3g}" if floor is not None else "",
            final_note(pair, modality),
        )
        for modality, words in modalities.items()
    ]
    unfinished = pair.unfinished()
    labels = {arm: ARM_STYLES[arm].label + (" (unfinished)" if arm in unfinished else "") for arm in pair.arms}
    caption = f"{title}. {how} {pair_caption(pair)}"
    rates = {seen.tokens / seen.step for seen in map(progress, pair.arms.values())}
    figure = draw_panels(panels, caption, labels, smoothing(pair), rates.pop() if len(rates) == 1 else None)
    return Drawing(title, figure, caption, gap_table(pair))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.figures",
        description="Draw the study's figures from the metrics of its runs, as PNG and PDF.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: %(default)s)")
    arguments.add_argument("--out", type=Path, default=Path("figures"), help="where to write (default: %(default)s)")
    arguments.add_argument("--pretrained", type=Path, metavar="RUN", help="run folder of the pre-trained arm")
    arguments.add_argument("--scratch", type=Path, metavar="RUN", help="run folder of the random arm")
    arguments.add_argument("--figure", choices=FIGURES, action="append", help="only this one; may be repeated")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Draws, writes, prints the paths and the numbers; returns the exit code."""
    options = parser().parse_args(argv)
    request = Request(options.runs, options.pretrained, options.scratch)
    tables: dict[str, None] = {}  # figures of the same runs share a table: print it once
    undrawn: list[str] = []
    for number in dict.fromkeys(options.figure or FIGURES):
        try:
            drawing = FIGURES[number](request)
            for path in drawing.save(options.out / stem(number)):
                print(path)
            if number not in WITHOUT_RUNS or options.figure:
                tables[drawing.table] = None
        except (ValueError, OSError) as error:
            undrawn.append(str(error))
            if options.figure:
                break
    # Of all figures, those are drawn whose runs are there.
    if undrawn and (options.figure or not tables):
        print(f"error: {undrawn[0]}", file=sys.stderr)
        return 2
    for table in tables:
        print(f"\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
