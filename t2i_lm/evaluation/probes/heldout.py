"""Loss of a language model on held-out text, in rows of consecutive ids.

Shapes: `R` rows, `T` ids of a row.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from t2i_lm.data.shards.tokenize import text_rows
from t2i_lm.data.text import read_documents
from t2i_lm.evaluation.probes.scores import POSITIONS, score_targets
from t2i_lm.models.backbone import Backbone
from t2i_lm.tokenizers.base import TextTokenizer


def heldout_rows(
    path: str, text: TextTokenizer, rows: int, length: int, documents: Iterable[str] | None = None
) -> tuple[Tensor, int]:
    """Evenly spaced rows of a text, cut as in pre-training on text (`data/shards/tokenize.py`).

    Args:
        path: a file or folder of documents, or a hub name (`data/text.py`).
        text: its tokenizer.
        rows: their number at most.
        length: targets per row.
        documents: those of `path`, where they have been read.

    Returns:
        Ids (R, length + 1) int64, and the UTF-8 bytes of all their targets.

    Raises:
        ValueError: if the text is shorter than one row or cannot be read.
    """
    if documents is None:
        documents = read_documents(path, "forgetting.text")
    every = list(text_rows(documents, text, length))
    if not every:
        raise ValueError(
            f"forgetting.text={path}: less text than one row of forgetting.length={length} ids (evaluate: --length)"
        )
    count = min(rows, len(every))
    chosen = [every[number * len(every) // count] for number in range(count)]
    ids_RT = torch.from_numpy(np.array([row["text_ids"] for row in chosen], dtype=np.int64))
    return ids_RT, sum(row["bytes"] for row in chosen)


def text_losses(decoder: Backbone, ids_RT: Tensor, start: int | None = None) -> dict[str, list[float]]:
    """Mean nll per row, nats/token: `all_rows`, and `text_rows` renormalized to the text rows of the vocabulary.

    The mean over rows is the loss of all targets; standard errors are taken over rows, since the targets of one row are
    not independent. A `start`, the beginning of a document, is no target: nothing before it foretells it.
    """
    losses: dict[str, list[float]] = {"all_rows": [], "text_rows": []}
    targets = target_count(ids_RT, start)
    for part_BT in torch.split(ids_RT, max(1, POSITIONS // ids_RT.shape[1])):
        target_BT = torch.ones_like(part_BT, dtype=torch.bool)
        target_BT[:, 0] = False
        if start is not None:
            target_BT &= part_BT != start
        scores = score_targets(decoder, part_BT, target_BT)
        for name, nll_N in (("all_rows", scores.all_rows_N), ("text_rows", scores.text_rows_N)):
            if start is None:
                losses[name] += nll_N.view(len(part_BT), -1).mean(dim=1).tolist()
            else:  # rows may have different numbers of targets
                sums = [float(own_N.sum()) for own_N in torch.split(nll_N, target_BT.sum(dim=1).tolist())]
                losses[name] += [total * len(ids_RT) / targets for total in sums]
    return losses


def target_count(ids_RT: Tensor, start: int | None = None) -> int:
    """Number of targets of `text_losses`."""
    targets_RT = ids_RT[:, 1:]
    return targets_RT.numel() if start is None else int((targets_RT != start).sum())
