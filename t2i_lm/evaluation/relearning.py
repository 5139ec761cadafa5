"""Relearning: held-out text loss over a few training steps on text, from a trained run's weights and from controls.

What training on images suppressed comes back within some tens of steps; what it erased takes as long as from random
weights. The controls are the same architecture from random weights and, where `init` is not random, the language model
of `backbone.path`. Torch is imported late.

Shapes: `S` training rows, `R` held-out rows, `T` ids of a row.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.forgetting import NOVELS, RELEARNING
from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.data.text import beginning, first_documents, recurring_in, same_dataset
from t2i_lm.evaluation.base import EvaluationContext, Evaluator
from t2i_lm.evaluation.forgetting import read_text, text_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from t2i_lm.models.backbone import Backbone
    from t2i_lm.tokenizers.base import TextTokenizer

# Steps after which the loss is measured.
POINTS = (0, 5, 10, 20, 40, 60)
BATCH, LENGTH, HELDOUT_ROWS = 12, 128, 32
RATE = 1e-3
CHARACTERS = 16  # read per id that is needed, several times what a tokenizer makes of them
RUN, RANDOM, LANGUAGE_MODEL = "run", "random weights", "language model"


@dataclass(frozen=True)
class RelearningRows:
    """Ids of text: rows to train on (S, T) and held-out rows (R, T), int64."""

    train_ST: "Tensor"
    heldout_RT: "Tensor"


class RelearningEvaluator(Evaluator):
    """Held-out text loss while a run's weights, and those of controls, are trained on text for a few steps."""

    title = "relearning (require --relearn)"

    def __init__(self, options: argparse.Namespace) -> None:
        """Checks the options and that both texts can be read.

        Raises:
            ValueError: if a text is missing, empty or unreadable, or a document is in both.
        """
        self.text, self.heldout = options.relearn, options.relearn_heldout or NOVELS
        if options.relearn_heldout is None and self.text != RELEARNING:
            raise ValueError("--relearn TEXT requires --relearn-heldout, the text that the loss is measured on")
        if self.text == self.heldout or same_dataset(self.text, self.heldout):
            raise ValueError(f"--relearn-heldout {self.heldout}: this is the text to train on; give another one")
        self.documents = read_text(self.text, "--relearn")
        self.heldout_documents = read_text(self.heldout, "--relearn-heldout")
        if shared := recurring_in(self.heldout_documents or (), self.documents or ()):
            raise ValueError(
                f"--relearn-heldout {self.heldout}: {len(shared)} of its documents are also in {self.text}, the text "
                f"to train on, such as {beginning(shared[0])!r}; give other ones"
            )

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add(
            "--relearn",
            metavar="TEXT",
            nargs="?",
            const=RELEARNING,
            help=f"text to train on for {POINTS[-1]} steps (default: shipped books)",
        )
        add("--relearn-heldout", metavar="TEXT", help="text that the loss is measured on (default: shipped novels)")

    def describe(self) -> str:
        return (
            f"relearning: {POINTS[-1]} steps of {BATCH} rows of {LENGTH} ids of {self.text}, AdamW {RATE:g}; loss on "
            f"{HELDOUT_ROWS} rows of {self.heldout} after {', '.join(map(str, POINTS))} steps"
        )

    def identity(self, config: ExperimentConfig) -> dict[str, Any]:
        """Hashes of both texts, the names of those on a hub, and the settings."""
        return {
            "text": text_sha256(self.documents) if self.documents else self.text,
            "heldout": text_sha256(self.heldout_documents) if self.heldout_documents else self.heldout,
            "steps": list(POINTS),
            "rows": [BATCH, HELDOUT_ROWS],
            "length": LENGTH,
            "rate": RATE,
        }

    def run(self, context: EvaluationContext) -> dict[str, Any] | None:
        if context.rank:
            return None
        import copy

        from t2i_lm.experiment.restore import require_same_backbone
        from t2i_lm.models.factory import pretrained_backbone, random_backbone
        from t2i_lm.runtime.progress import progress
        from t2i_lm.tokenizers.documents import document_start

        model, config = context.model, context.model.config
        device, first = model.decoder.output.text.device, document_start(model.text)
        length = min(LENGTH, model.decoder.config.seq_len)
        rows = RelearningRows(
            beginnings(self.text, "--relearn", self.documents, model.text, BATCH * POINTS[-1], length),
            beginnings(self.heldout, "--relearn-heldout", self.heldout_documents, model.text, HELDOUT_ROWS, length),
        )
        starts: dict[str, Callable[[], Backbone]] = {
            RUN: lambda: copy.deepcopy(model.decoder),
            RANDOM: lambda: random_backbone(config),
        }

        def language_model() -> "Backbone":
            backbone = pretrained_backbone(config)
            require_same_backbone(config, context.run)
            return backbone

        if config.backbone.path is not None and config.init != "random":
            starts = {LANGUAGE_MODEL: language_model, **starts}  # first, since its files may have changed
        if len(rows.train_ST) < BATCH * POINTS[-1]:
            found, needed = len(rows.train_ST), BATCH * POINTS[-1]
            raise ValueError(
                f"--relearn {self.text}: {found} rows of {length} ids; {needed} are needed, give more text"
            )
        curves = {}
        with progress("relearning", POINTS[-1] * len(starts), unit="steps") as advance:
            for name, start in starts.items():
                curves[name] = relearn(start().to(device), rows, advance, first)
        return {"run": context.run.name, "length": length, "steps": list(POINTS), "nll": curves}


def beginnings(
    path: str, flag: str, documents: list[str] | None, tokenizer: "TextTokenizer", rows: int, length: int
) -> "Tensor":
    """At most `rows` rows (S, length) of ids from the beginnings of the documents.

    Tokenizing 100 MB of books would take minutes.

    Args:
        path: the text, of the option `flag`.
        flag: for messages.
        documents: those of the text, where they have been read.
        tokenizer: of the model.
        rows: their number at most.
        length: ids per row.

    Raises:
        ValueError: if the text is shorter than one row.
    """
    import torch

    from t2i_lm.data.shards.tokenize import text_rows

    documents = documents or list(first_documents(path, flag))
    share = -(-rows * length * CHARACTERS // len(documents))
    every = [row["text_ids"] for row in text_rows([document[:share] for document in documents], tokenizer, length - 1)]
    if not every:
        raise ValueError(f"{flag} {path}: less text than one row of {length} ids")
    return torch.tensor([every[number] for number in evenly_spaced_indices(len(every), rows)])


def relearn(
    decoder: "Backbone",
    rows: RelearningRows,
    advance: Callable[[int], object] = lambda steps: None,
    start: int | None = None,
) -> dict[str, Any]:
    """Held-out loss of a decoder, which it trains, at each of `POINTS`.

    All parameters are trained, with the loss over the text rows, in float32, without dropout and in the same order for
    every decoder.

    Args:
        decoder: the model.
        rows: ids to train on and to measure on.
        advance: called with 1 after each step.
        start: id of the beginning of a document, which is no target (`probes/heldout.py`).

    Returns:
        `nll` per token over the text rows, and its standard error `se` over held-out rows (None of one), in nats.
    """
    import torch

    from t2i_lm.evaluation.probes.heldout import target_mask, text_losses
    from t2i_lm.evaluation.probes.suite import summary
    from t2i_lm.models.cross_entropy import linear_cross_entropy

    decoder = decoder.float().requires_grad_(True).eval()
    optimizer = torch.optim.AdamW(decoder.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    order_S = torch.randperm(len(rows.train_ST), generator=torch.Generator().manual_seed(0))
    device = decoder.output.text.device
    result: dict[str, Any] = {"nll": [], "se": []}
    for step in range(POINTS[-1] + 1):
        if step in POINTS:
            entry = summary("nll", text_losses(decoder, rows.heldout_RT, start)["text_rows"])
            result["nll"].append(entry["nll"])
            result["se"].append(entry["se"])
        if step < POINTS[-1]:
            ids_BT = rows.train_ST[order_S[step * BATCH : (step + 1) * BATCH]].to(device)
            x_ND, blocks = decoder.output.factors(decoder.hidden(ids_BT[:, :-1]).flatten(0, 1))
            weight_N = target_mask(ids_BT, start)[:, 1:].flatten().float()
            loss = linear_cross_entropy(x_ND, blocks[0], ids_BT[:, 1:].flatten(), weight_N).total
            optimizer.zero_grad()
            (loss / weight_N.sum()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            advance(1)
    return result
