"""The study's figures by name: the paper's Figures 1 to 6, and those beyond the paper."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from t2i_lm.comparison.comparability import (
    ENVIRONMENT,
    ORDER,
    SEED,
    IncomparableError,
    MissingRunsError,
    require_comparable,
)
from t2i_lm.comparison.gap import find_gap_curve, gap_json, gap_text
from t2i_lm.comparison.study_plan import IN_STEPS, STEPS
from t2i_lm.plots.alignment import alignment_figure
from t2i_lm.plots.captions import final_note, gap_table, group_caption, loss_table, pair_caption, smoothing
from t2i_lm.plots.curves import progress, series
from t2i_lm.plots.figure1 import draw_figure1, figure1_table, image_tokenizer_sentence, newest_run, tokenized_images
from t2i_lm.plots.floor import with_floor
from t2i_lm.plots.forgetting import HOW, TEXTS, require_same_texts, retention_panels, retention_table
from t2i_lm.plots.gap import TITLE, draw_gap, gap_caption
from t2i_lm.plots.groups import FIGURE5, FIGURE6, FORGETTING, INITS, Group, arm_of
from t2i_lm.plots.pairing import RunPair, find_group, find_pair
from t2i_lm.plots.panels import Panel, arm_style, draw_panels, save_figure
from t2i_lm.plots.published import draw_systems, own_systems, published_systems, system_table, systems_caption
from t2i_lm.plots.relearning import relearning_curves, relearning_series, relearning_size, relearning_table
from t2i_lm.plots.table1 import CompletionsTable, completions_table
from t2i_lm.plots.tradeoff import (
    draw_tradeoff,
    has_second_text,
    image_loss,
    lacks_for_point,
    point_of,
    probe_table,
    remedy_group,
    scratch_run,
    strengths,
    tradeoff_table,
)
from t2i_lm.runtime.command_line import RUNS
from t2i_lm.runtime.tables import listed
from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.storage.writing import write_atomic

UNITS = {"nll": "loss (nats/token)", "ppl": "perplexity"}


@dataclass(frozen=True)
class Request:
    """The folder of runs to search, and the run folders of a pair where the user names them.

    Attributes:
        strict: whether unfinished runs, and those that differ in more than what a figure compares, are refused; else
            its caption names them.
        varied: config keys in which the arms of any figure differ by design, such as each arm's own learning rate.
        pair_keys: likewise, where the named pair alone is compared.
    """

    root: Path = RUNS
    pretrained: Path | None = None
    scratch: Path | None = None
    strict: bool = False
    varied: tuple[str, ...] = ()
    pair_keys: tuple[str, ...] = ()

    def check(self, arms: Mapping[str, Run], varied: tuple[str, ...] = ()) -> None:
        """Refuses incomparable and unfinished runs if `strict`.

        Raises:
            IncomparableError: naming the keys in which they differ, or the unfinished ones.
        """
        if self.strict:
            if going := [str(run.folder) for run in arms.values() if run.report is None]:
                raise IncomparableError(f"unfinished: {', '.join(going)}")
            require_comparable(arms, (*varied, *self.by_design(arms)))

    def by_design(self, arms: Mapping[str, Run]) -> tuple[str, ...]:
        """Config keys in which these arms differ by design, beside what their figure compares."""
        own = {run.folder for run in arms.values()} == {self.pretrained, self.scratch}
        return (*self.varied, *(self.pair_keys if own else ()))

    @property
    def is_named(self) -> bool:
        """Whether the user names both runs of the pair."""
        return self.pretrained is not None and self.scratch is not None

    @cached_property
    def pair(self) -> RunPair:
        """The two arms of Figures 3 and 4, read once.

        Raises:
            ValueError: if no two runs pair.
        """
        return find_pair(self.root, self.pretrained, self.scratch)


@dataclass(frozen=True)
class RenderedFigure:
    """A figure with its caption and the table of its values."""

    title: str
    figure: Figure
    caption: str
    table: str
    content: str = ""  # the numbers as JSON, of figures that have more than curves

    @property
    def uncontrolled(self) -> list[str]:
        """Sentences of the caption on differences of the arms that are not by design."""
        return re.findall(r"NOT CONTROLLED.*?\.(?= |$)", self.caption)

    def save(self, stem: Path) -> list[Path]:
        """Writes STEM.png and STEM.pdf, and STEM.json where there are numbers, and returns their paths."""
        paths = save_figure(self.figure, stem, self.title, self.caption)
        if self.content:
            paths.append(stem.with_name(f"{stem.name}.json"))
            write_atomic(paths[-1], f"{self.content}\n")
        return paths


@dataclass(frozen=True)
class PairFigure:
    """Perplexity of the pre-trained and the random arm, one panel per modality.

    Attributes:
        title: first sentence of the caption.
        how: its second sentence.
        panels: panel titles by modality.
    """

    title: str
    how: str
    panels: Mapping[str, str]

    def __call__(self, request: Request) -> RenderedFigure:
        """Renders the figure from the pair of a request."""
        pair = request.pair
        request.check(pair.arms)
        unfinished = pair.unfinished()
        labels = {arm: arm_style(arm).label + (" (unfinished)" if arm in unfinished else "") for arm in pair.arms}
        rates = {seen.tokens / seen.step for seen in map(progress, pair.arms.values())}
        caption = f"{self.title}. {self.how} {pair_caption(pair, request.by_design(pair.arms))}"
        panels = [self._panel(pair, modality) for modality in self.panels]
        rate = rates.pop() if len(rates) == 1 else None
        figure = draw_panels(panels, caption, labels, smoothing(pair.pretrained), rate, pair.validation_splits)
        return RenderedFigure(self.title, figure, caption, gap_table(pair))

    def _panel(self, pair: RunPair, modality: str) -> Panel:
        curves = {arm: series(run, modality) for arm, run in pair.arms.items()}
        panel = Panel(self.panels[modality], curves, note=final_note(pair, modality))
        return with_floor(panel, pair.arms.values(), modality, "ppl")


@dataclass(frozen=True)
class GroupFigure:
    """Curves of the arms of a group, one panel per modality.

    Attributes:
        title: first sentence of the caption.
        group: the arms.
        panels: panel titles by modality.
        unit: `nll` or `ppl`.
        labels: legend text by arm, where it is not the arm's usual label.
    """

    title: str
    group: Group
    panels: Mapping[str, str]
    unit: str = "nll"
    labels: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, request: Request) -> RenderedFigure:
        """Renders the figure from the runs of a request."""
        group = replace(self.group, varied=(*self.group.varied, *request.varied))
        arms = find_group(request.root, group)
        request.check(arms, group.varied)
        reference, *others = arms
        order = (*others, reference)  # the reference on top
        panels = [
            with_floor(
                Panel(title, {arm: series(arms[arm], modality, self.unit) for arm in order}, unit=UNITS[self.unit]),
                arms.values(),
                modality,
                self.unit,
            )
            for modality, title in self.panels.items()
        ]
        return _render_group(self.title, group, arms, panels, loss_table(arms, "image"), self.labels)


def figure1(request: Request) -> RenderedFigure:
    """Figure 1: images as ids, their reconstructions, and the expanded matrices (Section 2.1)."""
    named = request.pretrained or request.scratch
    run = read_run(named) if named else newest_run(request.root) or request.pair.pretrained
    request.check({arm_of(run.name): run})
    images, vocab, width = tokenized_images(run)
    title = "Figure 1. A language model that generates images: ids of an image tokenizer as additional vocabulary"
    captions = " ".join(f"({number}) {image.caption}" for number, image in enumerate(images, 1))
    caption = (
        f"{title}. Left: held-out images, their ids, and what the image tokenizer decodes from these ids. Right: rows "
        f"that are added to the language model's embedding and output matrices (not to scale). Captions: {captions} "
        f"{image_tokenizer_sentence(run)}"
    )
    figure = draw_figure1(images, vocab, width, caption)
    return RenderedFigure(title, figure, caption, figure1_table(images, vocab, width))


def figure2(request: Request) -> RenderedFigure:
    """Figure 2: published zero-shot COCO FIDs by release date, and those of our runs (Section 1)."""
    systems = [*published_systems(), *own_systems(request.root.glob("*/*"))]
    title = "Figure 2. Zero-shot FID on COCO of auto-regressive and diffusion models by release date"
    caption = f"{title}. {systems_caption(systems)}"
    return RenderedFigure(title, draw_systems(systems, caption), caption, system_table(systems))


def figure6(request: Request) -> RenderedFigure:
    """Figure 6: contrastive alignment of image rows with text rows, loss and temperature (Section 3.2)."""
    arms = find_group(request.root, FIGURE6)
    request.check(arms, FIGURE6.varied)
    title, panels = alignment_figure(arms)
    return _render_group(title, FIGURE6, arms, panels, loss_table(arms, "all", "nats"))


def figure_forgetting(request: Request) -> RenderedFigure:
    """Forgetting: held-out text perplexity by tokens seen, over the text rows and over all rows (Table 1 as curves)."""
    named = request.pair.arms if request.is_named else {}
    measured = named and all(run.records(FORGETTING.records) for run in named.values())
    arms = named if measured else find_group(request.root, FORGETTING)
    request.check(arms, FORGETTING.varied)
    require_same_texts(arms.values())
    title = "Perplexity of held-out text in text-to-image training"
    caption = f"{title}. {group_caption(arms, varied=(*FORGETTING.varied, *request.by_design(arms)), how=HOW)}"
    table = "\n\n".join([loss_table(arms, "image"), retention_table(arms), probe_table(arms)])
    return RenderedFigure(title, draw_panels(retention_panels(arms), caption), caption, table)


def figure_relearning(request: Request) -> RenderedFigure:
    """Relearning: held-out text loss over the first steps on text, of both arms and of their controls."""
    pair = request.pair
    request.check(pair.arms)
    steps, curves = relearning_curves(pair)
    title = "Relearning of text after text-to-image training"
    how = (
        "Each model is trained on the same rows of text in the same order; the loss is over the text rows, a mean over "
        f"{relearning_size(pair)}. One run per arm."
    )
    panel = Panel("Held-out text", relearning_series(steps, curves), unit=UNITS["nll"], axis="training steps on text")
    caption = f"{title}. {group_caption(pair.arms, varied=request.by_design(pair.arms), how=how)}"
    return RenderedFigure(title, draw_panels([panel], caption), caption, relearning_table(steps, curves))


def figure_remedies(request: Request) -> RenderedFigure:
    """Remedies: increase of held-out text loss against held-out image loss."""
    group = remedy_group(request.root)
    arms = find_group(request.root, group, lacks_for_point)
    runs = strengths(request.root, arms)
    points = [point_of(arm, run, strength) for (arm, strength), run in runs.items()]
    require_same_texts(runs.values(), TEXTS[: 1 + has_second_text(points)])
    random = scratch_run(request.root, arms["pretrained"])
    scratch = None if random is None else image_loss(random)
    title = "Remedies against forgetting: increase of text loss against image loss"
    how = (
        "Horizontal: final held-out text loss minus that before training, softmax over the text rows; bars: standard "
        "error of the paired differences of rows. Vertical: final held-out image loss. Lines join the strengths of one "
        "remedy; the first and the last are written beside their points. One run each."
    )
    compared = {f"{arm} {strength}".strip(): run for (arm, strength), run in runs.items()}
    compared |= {} if random is None else {"scratch": random}
    request.check(compared, group.varied)
    caption = f"{title}. {group_caption(compared, varied=group.varied, how=how)}"
    return RenderedFigure(title, draw_tradeoff(points, caption, scratch), caption, tradeoff_table(points, scratch))


def figure_gap(request: Request) -> RenderedFigure:
    """Gap of the arms' image loss against training tokens, every length runs of their own, with fits of its decay."""
    curve = find_gap_curve(request.root)
    request.check(curve.runs, (SEED, ORDER, STEPS, *IN_STEPS, ENVIRONMENT["backbone"]))
    caption = gap_caption(curve)
    return RenderedFigure(TITLE, draw_gap(curve, caption), caption, gap_text(curve), gap_json(curve))


def _render_group(
    title: str,
    group: Group,
    arms: Mapping[str, Run],
    panels: list[Panel],
    table: str,
    labels: Mapping[str, str] | None = None,
) -> RenderedFigure:
    """Panels of a group with the caption of its runs."""
    caption = f"{title}. {group_caption(arms, group.experiments, group.varied)}"
    run = next(iter(arms.values()))
    figure = draw_panels(panels, caption, labels, smoothing(run), splits=run.validation_splits)
    return RenderedFigure(title, figure, caption, table)


# Figure by name: what finds its runs and renders it.
FIGURES: dict[str, Callable[[Request], RenderedFigure]] = {
    "1": figure1,
    "2": figure2,
    "3": PairFigure(
        "Figure 3. Perplexity of all tokens, from a pre-trained language model and from random weights",
        "Every target counts, including the five boundary tokens of a sequence; pads do not.",
        {"all": "All tokens"},
    ),
    "4": PairFigure(
        "Figure 4. Perplexity of text and of image tokens, from a pre-trained language model and from random weights",
        "A prediction counts as text or image by the predicted token.",
        {"text": "Text tokens", "image": "Image tokens"},
    ),
    "5": GroupFigure(
        "Figure 5. Loss of image tokens without captions, by the tuned part of the pre-trained model",
        FIGURE5,
        {"image": "Image tokens"},
        labels={"pretrained": "tuned fully"},
    ),
    "6": figure6,
    "inits": GroupFigure(
        "Perplexity of text and of image tokens, by the part taken from the pre-trained language model",
        INITS,
        {"text": "Text tokens", "image": "Image tokens"},
        unit="ppl",
    ),
    "forgetting": figure_forgetting,
    "gap": figure_gap,
    "relearning": figure_relearning,
    "remedies": figure_remedies,
}
# Figures of the pair, or of one of its runs, that the user may name.
OF_PAIR = ("1", "3", "4", "forgetting", "relearning")
# Figures that need no run.
WITHOUT_RUNS = ("2",)
TABLE = "Table 1"


def stem(name: str) -> str:
    """File name of a figure without its suffix: figure4, figure_inits."""
    return f"figure{name}" if name.isdigit() else f"figure_{name}"


def show(name: str, request: Request, folder: Path) -> Figure | None:
    """Prints a figure's table, saves and returns it; without its runs, prints the command that makes them."""
    try:
        rendered = FIGURES[name](request)
    except ValueError as error:
        print(error)
        return None
    print(rendered.table, "", *rendered.save(folder / stem(name)), sep="\n")
    return rendered.figure


def write_figures(
    request: Request, folder: Path, names: Iterable[str] | None = None, told: Callable[[str], str] = str
) -> int:
    """Writes figures and prints their paths, then their tables; returns the exit code of the command.

    Of all figures, those that cannot be drawn though their runs exist are named on stderr, and the code is 2. So are
    differences of arms that are not by design, without a change of the code.

    Args:
        request: where to find the runs.
        folder: where to write.
        names: keys of FIGURES, all required; None for every figure that has its runs.
        told: changes messages, such as the names of folders in them.

    Raises:
        ValueError: if the runs of a required figure, or of all figures, are missing.
        OSError: if a file of a required figure cannot be written.
    """
    tables: dict[str, None] = {}  # figures of the same runs share a table, which is printed once
    missing: list[MissingRunsError] = []
    refused: dict[str, list[str]] = {}
    uncontrolled: dict[str, list[str]] = {}
    for name in dict.fromkeys(names or (*FIGURES, TABLE)):
        try:
            if name == TABLE:
                print(*_table1(request).save(folder), sep="\n")
                continue
            rendered = FIGURES[name](request)
            print(*rendered.save(folder / stem(name)), sep="\n")
            if names or name not in WITHOUT_RUNS:
                tables[rendered.table] = None
            for sentence in rendered.uncontrolled:
                uncontrolled.setdefault(sentence, []).append(f"figure {name}")
        except MissingRunsError as error:
            if names:
                raise
            missing.append(error)
        except (ValueError, OSError) as error:
            if names:
                raise
            refused.setdefault(str(error), []).append(name if name == TABLE else f"figure {name}")
    if missing and not tables and not refused:
        raise missing[0]
    for table in tables:
        print(f"\n{table}")
    for sentence, figures in uncontrolled.items():
        print(f"note: {listed(figures)}: {sentence}", file=sys.stderr)
    for message, figures in refused.items():
        print(told(f"error: not drawn, {listed(figures)}: {message}"), file=sys.stderr)
    return 2 if refused else 0


def _table1(request: Request) -> CompletionsTable:
    request.check(request.pair.arms)
    return completions_table(request.pair)


def write_table1(request: Request, folder: Path) -> int:
    """Writes Table 1 of the pair of a request and prints its paths and itself; returns 0, the exit code of the command.

    Raises:
        ValueError: if there is no pair, or an arm did not measure forgetting.
        IncomparableError: if the arms differ and the request is strict.
        OSError: if a file cannot be written.
    """
    table = _table1(request)
    print(*table.save(folder), "", table.markdown(), sep="\n")
    return 0
