"""Loss of a language model on held-out text, in rows of consecutive ids.

Shapes: `R` rows, `T` ids of a row, `N` targets of all rows, `V` vocabulary.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2i_lm.data.shards.tokenize import text_rows
from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.data.text import first_documents
from t2i_lm.evaluation.probes.floors import unigram_nll
from t2i_lm.evaluation.probes.scores import POSITIONS, TargetFeatures, score_features, target_features
from t2i_lm.evaluation.probes.temperature import best_temperatures
from t2i_lm.models.backbone import Backbone
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import document_start


class HeldoutText(NamedTuple):
    """Evenly spaced rows of a text.

    Attributes:
        ids_RT: int64, (R, length + 1).
        size: UTF-8 bytes of all targets.
        unigram_nll: loss of the text's own frequencies of pieces on these rows, cross-validated, nats/token.
    """

    ids_RT: Tensor
    size: int
    unigram_nll: float


def heldout_text(
    path: str,
    text: TextTokenizer,
    rows: int,
    length: int,
    documents: Iterable[str] | None = None,
    key: str = "forgetting.text",
) -> HeldoutText:
    """Rows of a text, cut as in pre-training on text (`data/shards/tokenize.py`).

    Args:
        path: a file or folder of documents, or a hub name (`data/text.py`).
        text: its tokenizer.
        rows: their number at most.
        length: targets per row.
        documents: those of `path`, where they have been read.
        key: config key of `path`, for messages.

    Raises:
        ValueError: if the text is shorter than one row or cannot be read.
    """
    every = list(text_rows(first_documents(path, key) if documents is None else documents, text, length))
    if not every:
        raise ValueError(f"{key}={path}: less text than one row of forgetting.length={length} ids (evaluate: --length)")
    chosen = evenly_spaced_indices(len(every), rows)
    every_RT = torch.from_numpy(np.array([row["text_ids"] for row in every], dtype=np.int64))
    floor = unigram_nll(every_RT, chosen, text.vocab_size, document_start(text))
    return HeldoutText(every_RT[chosen], sum(every[number]["bytes"] for number in chosen), floor)


class RowScores(NamedTuple):
    """Scores of one softmax on rows of text.

    The mean over rows is that over all targets; standard errors are taken over rows, since the targets of one row are
    not independent.

    Attributes:
        nll_R: mean negative log-likelihood per row, nats/token.
        top1_R: share of targets that are the likeliest id.
        temperature: the best one (`temperature.py`).
        best_nll_R: `nll_R` at that temperature.
    """

    nll_R: list[float]
    top1_R: list[float]
    temperature: float
    best_nll_R: list[float]


def text_scores(decoder: Backbone, ids_RT: Tensor, start: int | None = None) -> dict[str, RowScores]:
    """Scores over `all_rows` of the vocabulary, and over `text_rows`, to which they are renormalized.

    A `start`, the beginning of a document, is no target: nothing before it foretells it.
    """
    parts = list(_features(decoder, ids_RT, start))
    features = parts[0]._replace(
        x_ND=torch.cat([part.x_ND for part in parts]), target_N=torch.cat([part.target_N for part in parts])
    )
    scores, best = score_features(features), best_temperatures(features)
    counts = target_counts(ids_RT, start)
    found = {}
    for name, nll_N, best_N in (
        ("all_rows", scores.all_rows_N, scores.best_of_all_N),
        ("text_rows", scores.text_rows_N, scores.best_of_text_N),
    ):
        columns = [per_row(values_N, counts) for values_N in (nll_N, best_N.double(), best[name].nll_N)]
        found[name] = RowScores(columns[0], columns[1], best[name].temperature, columns[2])
    return found


def text_losses(decoder: Backbone, ids_RT: Tensor, start: int | None = None) -> dict[str, list[float]]:
    """Mean nll per row, nats/token, over `all_rows` and over `text_rows`; arguments as of `text_scores`."""
    scores = [score_features(part) for part in _features(decoder, ids_RT, start)]
    counts = target_counts(ids_RT, start)
    columns = {"all_rows": [one.all_rows_N for one in scores], "text_rows": [one.text_rows_N for one in scores]}
    return {name: per_row(torch.cat(column), counts) for name, column in columns.items()}


def per_row(values_N: Tensor, counts: list[int]) -> list[float]:
    """Means over the targets of each row, scaled so that their own mean is that over all targets."""
    scale = len(counts) / sum(counts)
    return [float(own_N.sum()) * scale for own_N in torch.split(values_N, counts)]


def target_counts(ids_RT: Tensor, start: int | None = None) -> list[int]:
    """Number of targets of each row."""
    counts: list[int] = target_mask(ids_RT, start).sum(dim=1).tolist()
    return counts


def target_count(ids_RT: Tensor, start: int | None = None) -> int:
    """Number of targets of all rows."""
    return sum(target_counts(ids_RT, start))


def _features(decoder: Backbone, ids_RT: Tensor, start: int | None) -> Iterator[TargetFeatures]:
    """What predicts the targets, some rows at a time."""
    for part_BT in torch.split(ids_RT, max(1, POSITIONS // ids_RT.shape[1])):
        yield target_features(decoder, part_BT, target_mask(part_BT, start))


def target_mask(ids_BT: Tensor, start: int | None) -> Tensor:
    """Which ids are targets: all but the first of a row, and a `start`."""
    target_BT = torch.ones_like(ids_BT, dtype=torch.bool) if start is None else ids_BT != start
    target_BT[:, 0] = False
    return target_BT
