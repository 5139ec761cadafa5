"""Token statistics of the training captions and images: Zipf's law, entropies by context, compression.

Shapes: `R` rows, `H` by `W` image ids of one image, `N` tokens, `K` distinct tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from t2i_lm.analysis.base import ProbedRun, ProbeResult, Settings
from t2i_lm.analysis.looks import MODALITY_LOOKS
from t2i_lm.data.scenes.cells import code_meaning, scenes_of
from t2i_lm.data.scenes.oracle import SIDE
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.experiment.build import open_image, open_text
from t2i_lm.plots.panels import GREY, captioned_figure, place_legend
from t2i_lm.runtime.tables import compact, upper_first
from t2i_lm.tokenizers.entropy import (
    Entropy,
    ZipfFit,
    compressed_bits,
    conditional_entropy,
    neighbor_entropies,
    order_entropies,
    zipf_fit,
)
from t2i_lm.tokenizers.layout import IntArray

ORDERS = 3
COMPRESSED = 2**20  # ids at most, from the beginning
SCENES = 4000  # at most, whose ids are compared with what their cells show
TITLE = "Statistics of text and image tokens"


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the tokens of one modality.

    Attributes:
        vocabulary: ids that there are.
        counts_K: of the ids that occur, descending.
        entropies: by context: `none`, the last `1` to `ORDERS` tokens, and neighbors of image tokens.
        compressed: bits/token by compressor.
    """

    vocabulary: int
    counts_K: IntArray
    entropies: dict[str, Entropy]
    zipf: ZipfFit | None
    compressed: dict[str, float]

    def numbers(self) -> dict[str, Any]:
        """All values by name."""
        return {
            "tokens": int(self.counts_K.sum()),
            "vocabulary": self.vocabulary,
            "distinct": len(self.counts_K),
            "entropy_bits": {name: one.numbers() for name, one in self.entropies.items()},
            "zipf": None if self.zipf is None else vars(self.zipf),
            "compressed_bits": self.compressed,
            "uniform_bits": math.log2(self.vocabulary),
        }


def token_statistics(
    sequences: Sequence[IntArray], vocabulary: int, images_RHW: IntArray | None = None
) -> TokenStatistics:
    """Statistics of sequences of ids; `images_RHW` are the same ids by row and column, for images."""
    flat_N = np.concatenate(sequences)
    entropies = {"none": conditional_entropy(flat_N)}
    entropies |= {str(order): one for order, one in enumerate(order_entropies(sequences, ORDERS), start=1)}
    entropies |= {} if images_RHW is None else neighbor_entropies(images_RHW)
    counts_K = np.sort(np.unique(flat_N, return_counts=True)[1])[::-1]
    return TokenStatistics(vocabulary, counts_K, entropies, zipf_fit(counts_K), compressed_bits(flat_N[:COMPRESSED]))


def probe_tokens(runs: Sequence[ProbedRun], settings: Settings) -> ProbeResult:
    """Of the training split that all runs share, which the first run's shards hold."""
    one = runs[0]
    image = open_image(one.config)
    parts = one.split("train")
    columns = PairColumns(parts)
    chosen = evenly_spaced_indices(len(columns), settings.rows)
    texts = [columns.caption(row, number) for row in chosen for number in range(columns.count(row))]
    images_RHW = columns.images(chosen).reshape(len(chosen), *image.grid)
    found = {"image": token_statistics(list(images_RHW.reshape(len(chosen), -1)), image.vocab_size, images_RHW)}
    if any(len(text) for text in texts):
        text = token_statistics([text for text in texts if len(text)], open_text(one.config).vocab_size)
        found = {"text": text, **found}
    numbers: dict[str, Any] = {name: statistics.numbers() for name, statistics in found.items()}
    numbers |= {"rows": len(chosen), "rows_of_split": len(columns), "captions": len(texts), "split": "train"}
    some = evenly_spaced_indices(len(chosen), SCENES)
    scenes = None
    if not parts.is_remote and image.grid == (SIDE, SIDE):
        rows = parts.dataset().select([chosen[place] for place in some])
        scenes = scenes_of([str(text) for text in rows["meaning"]])
    meaning = None if scenes is None else code_meaning(images_RHW[some], scenes)
    numbers |= {} if meaning is None else {"meaning": meaning}
    counted = " and ".join(f"{int(found[name].counts_K.sum()):,} {name} tokens" for name in found)
    how = (
        f"Training split: {counted} of {len(chosen):,} images. Left: counts by rank, with a line fitted over the ranks "
        "of at least 10 occurrences. Right: entropy without context, given the 1 to 3 tokens before (all at positions "
        "with 3), given neighbors in the image (all at positions with both), corrected for finite samples (Miller and "
        "Madow); hollow: fewer than 10 observations per distinct context and token, an underestimate. zlib, lzma: "
        "size of the packed ids."
    )
    return ProbeResult(TITLE, _sentence(found, meaning), how, numbers, partial(_draw, found))


def _sentence(found: dict[str, TokenStatistics], meaning: dict[str, dict[str, Any]] | None) -> str:
    parts = []
    for name, one in found.items():
        most = [entropy for key, entropy in one.entropies.items() if key.isdigit() and entropy.well_sampled]
        given = f", {most[-1].bits:.2f} given the {_words(most)} before" if most else ""
        slope = "" if one.zipf is None else f", Zipf slope {one.zipf.slope:.2f} (R2 {one.zipf.r2:.2f})"
        parts.append(
            f"{name} tokens carry {one.entropies['none'].bits:.2f} bits{given}, {one.compressed['lzma']:.2f} by lzma"
            f"{slope} (n = {int(one.counts_K.sum()):,})"
        )
    if meaning is not None:
        shares = ", ".join(f"{name} {meaning[name]['explained']:.0%}" for name in ("ground", "colour", "kind", "size"))
        parts.append(f"of what its cell shows, an image id alone explains: {shares} of the entropy")
    return f"{upper_first('; '.join(parts))}."


def _words(entropies: list[Entropy]) -> str:
    return "token" if len(entropies) == 1 else f"{len(entropies)} tokens"


def _draw(found: dict[str, TokenStatistics], caption: str) -> Figure:
    places = list(dict.fromkeys(key for one in found.values() for key in (*one.entropies, *one.compressed)))
    places.sort(key=lambda key: key in ("zlib", "lzma"))
    with captioned_figure(caption) as figure:
        ranks, bits = figure.subplots(1, 2, width_ratios=[1, 1.5])
        for name, one in found.items():
            _draw_ranks(ranks, name, one)
            look = MODALITY_LOOKS[name]
            shift = 0.12 if name == "image" else -0.12
            for key, entropy in one.entropies.items():
                inside = look.color if entropy.well_sampled else "white"
                place = places.index(key) + shift
                bits.plot(place, entropy.bits, look.marker, color=look.color, mfc=inside, markersize=8)
            for key, value in one.compressed.items():
                bits.plot(places.index(key) + shift, value, look.marker, color=look.color, markersize=8)
        ranks.set(xscale="log", yscale="log", xlabel="rank", ylabel="count")
        for axis in (ranks.xaxis, ranks.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
            axis.set_minor_formatter(NullFormatter())
        ranks.set_title("Counts by rank", loc="left")
        bits.set_xticks(range(len(places)), [key.replace(" and ", "\n+ ") for key in places])
        bits.set(ylabel="bits/token", xlabel="context, or compressor", ylim=(0, None))
        bits.set_title("Entropy and compression", loc="left")
        looks = [MODALITY_LOOKS[name] for name in found]
        handles = [Line2D([], [], color=look.color, marker=look.marker, label=look.label) for look in looks]
        fitted = Line2D([], [], color=GREY, linestyle="--", label="fit of Zipf's law")
        place_legend(figure, [*handles, fitted])
    return figure


def _draw_ranks(axes: Axes, name: str, one: TokenStatistics) -> None:
    look = MODALITY_LOOKS[name]
    axes.plot(np.arange(1, len(one.counts_K) + 1), one.counts_K, color=look.color, gid=f"{name}/ranks")
    if one.zipf is not None:
        fitted = np.array([1, one.zipf.ranks])
        axes.plot(fitted, one.zipf.frequency(fitted), color=look.color, linestyle="--", linewidth=1)
