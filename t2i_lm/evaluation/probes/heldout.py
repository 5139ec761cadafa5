"""Held-out text: the loss of a language model on running text, in rows of consecutive ids.

Shapes: `R` rows, `T` ids of a row.
"""

import numpy as np
import torch
from torch import Tensor

from t2i_lm.data.shards.tokenize import text_rows
from t2i_lm.data.text import read_documents
from t2i_lm.evaluation.probes.scores import POSITIONS, score_targets
from t2i_lm.models.backbone import Backbone
from t2i_lm.tokenizers.base import TextTokenizer


def heldout_rows(path: str, text: TextTokenizer, rows: int, length: int) -> tuple[Tensor, int]:
    """Evenly spaced rows of a text, cut as pre-training on text cuts its own (`data/tokenize.py`).

    Args:
        path: a file or folder of documents, or a hub name (`data/text.py`).
        text: its tokenizer.
        rows: at most so many.
        length: targets of a row.

    Returns:
        Ids (R, length + 1) int64, and the UTF-8 bytes of all their targets.

    Raises:
        ValueError: if the text is shorter than one row or cannot be read.
    """
    found = list(text_rows(read_documents(path, "forgetting.text"), text, length))
    if not found:
        raise ValueError(
            f"forgetting.text={path}: less text than one row of forgetting.length={length} ids (evaluate: --length)"
        )
    kept = min(rows, len(found))
    chosen = [found[number * len(found) // kept] for number in range(kept)]
    ids_RT = torch.from_numpy(np.array([row["text_ids"] for row in chosen], dtype=np.int64))
    return ids_RT, sum(row["bytes"] for row in chosen)


def text_losses(decoder: Backbone, ids_RT: Tensor) -> dict[str, list[float]]:
    """Mean nll of each row's targets, nats/token: `all_rows`, and `text_rows` renormalized to the text rows.

    Rows are equally long, so the mean of these is the loss of all targets; and they are what may be taken for
    independent, which the targets of one row are not.
    """
    losses: dict[str, list[float]] = {"all_rows": [], "text_rows": []}
    for part_BT in torch.split(ids_RT, max(1, POSITIONS // ids_RT.shape[1])):
        target_BT = torch.ones_like(part_BT, dtype=torch.bool)
        target_BT[:, 0] = False
        scores = score_targets(decoder, part_BT, target_BT)
        for name, nll_N in (("all_rows", scores.all_rows_N), ("text_rows", scores.text_rows_N)):
            losses[name] += nll_N.view(len(part_BT), -1).mean(dim=1).tolist()
    return losses
