"""Relearning: held-out text loss over a few training steps on text, from a trained run's weights and from controls.

What training on images suppressed comes back within some tens of steps; what it erased takes as long as from random
weights. The controls are the same architecture from random weights and, where the run has one, the language model that
it started from. Torch is imported late.

Shapes: `S` training rows, `R` held-out rows, `T` ids of a row.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.text import read_documents
from t2i_lm.evaluation.base import EvaluationContext, Evaluator

if TYPE_CHECKING:
    from torch import Tensor

    from t2i_lm.models.backbone import Backbone

# Steps after which the loss is measured.
POINTS = (0, 5, 10, 20, 40, 60)
BATCH, LENGTH, HELDOUT_ROWS = 16, 256, 32
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
            ValueError: if a text is missing, empty, unreadable or the same as the other.
        """
        if options.relearn_heldout is None:
            raise ValueError("--relearn requires --relearn-heldout, the text that the loss is measured on")
        if options.relearn == options.relearn_heldout:
            raise ValueError(f"--relearn-heldout {options.relearn}: this is the text to train on; give another one")
        self.text, self.heldout = options.relearn, options.relearn_heldout
        for flag, path in (("--relearn", self.text), ("--relearn-heldout", self.heldout)):
            if next(read_documents(path, flag), None) is None:
                raise ValueError(f"{flag} {path}: there is no text in it")

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add("--relearn", metavar="TEXT", help=f"text to train on for {POINTS[-1]} steps")
        add("--relearn-heldout", metavar="TEXT", help="text that the loss is measured on")

    def describe(self) -> str:
        return (
            f"relearning: {POINTS[-1]} steps of {BATCH} rows of {LENGTH} ids of {self.text}, AdamW {RATE:g}; loss on "
            f"{HELDOUT_ROWS} rows of {self.heldout} after {', '.join(map(str, POINTS))} steps"
        )

    def identity(self, config: ExperimentConfig) -> dict[str, Any]:
        """Both texts by path, and the settings."""
        return {
            "text": self.text,
            "heldout": self.heldout,
            "steps": list(POINTS),
            "rows": [BATCH, HELDOUT_ROWS],
            "length": LENGTH,
            "rate": RATE,
        }

    def run(self, context: EvaluationContext) -> dict[str, Any] | None:
        if context.rank:
            return None
        import copy

        from t2i_lm.models.factory import pretrained_backbone, random_backbone
        from t2i_lm.runtime.progress import progress

        model, config = context.model, context.model.config
        length = min(LENGTH, model.decoder.config.seq_len)
        rows = read_rows(self.text, self.heldout, model.text, length)
        starts: dict[str, Callable[[], Backbone]] = {
            RUN: lambda: copy.deepcopy(model.decoder),
            RANDOM: lambda: random_backbone(config),
        }
        if config.backbone.path is not None and config.init != "random":
            starts[LANGUAGE_MODEL] = lambda: pretrained_backbone(config)
        curves = {}
        with progress("relearning", POINTS[-1] * len(starts), unit="steps") as advance:
            for name, start in starts.items():
                curves[name] = relearn(start(), rows, advance)
        return {"run": context.run.name, "length": length, "steps": list(POINTS), "nll": curves}


def read_rows(text: str, heldout: str, tokenizer: Any, length: int) -> RelearningRows:
    """Training rows from the beginning of each document, and held-out rows spread over theirs.

    Raises:
        ValueError: if a text is too short.
    """
    from t2i_lm.evaluation.probes.heldout import heldout_rows

    needed = BATCH * POINTS[-1]
    documents = list(read_documents(text, "--relearn"))
    share = -(-needed * length * CHARACTERS // len(documents))  # tokenizing 100 MB of books takes minutes
    beginnings = [document[:share] for document in documents]
    train_ST, _ = heldout_rows(text, tokenizer, needed, length - 1, beginnings)
    if len(train_ST) < needed:
        raise ValueError(f"--relearn {text}: {len(train_ST)} rows of {length} ids; {needed} are needed, give more text")
    documents = list(read_documents(heldout, "--relearn-heldout"))
    share = -(-HELDOUT_ROWS * length * CHARACTERS // len(documents))
    heldout_RT, _ = heldout_rows(heldout, tokenizer, HELDOUT_ROWS, length - 1, [text[:share] for text in documents])
    return RelearningRows(train_ST, heldout_RT)


def relearn(
    decoder: "Backbone", rows: RelearningRows, advance: Callable[[int], object] = lambda steps: None
) -> dict[str, list[float]]:
    """Held-out loss of a decoder, which it trains, at each of `POINTS`.

    All parameters are trained, with the loss over the text rows, in float32 and in the same order for every decoder.

    Returns:
        `nll` per token over the text rows, and its standard error `se` over held-out rows, in nats.
    """
    import torch

    from t2i_lm.evaluation.probes.heldout import text_losses
    from t2i_lm.evaluation.probes.suite import summary
    from t2i_lm.models.cross_entropy import linear_cross_entropy

    decoder = decoder.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    order_S = torch.randperm(len(rows.train_ST), generator=torch.Generator().manual_seed(0))
    device = decoder.output.text.device
    result: dict[str, list[float]] = {"nll": [], "se": []}
    for step in range(POINTS[-1] + 1):
        if step in POINTS:
            decoder.eval()
            entry = summary("nll", text_losses(decoder, rows.heldout_RT)["text_rows"])
            result["nll"].append(entry["nll"])
            result["se"].append(entry["se"])
            decoder.train()
        if step < POINTS[-1]:
            ids_BT = rows.train_ST[order_S[step * BATCH : (step + 1) * BATCH]].to(device)
            x_ND = decoder.hidden(ids_BT[:, :-1]).flatten(0, 1)
            loss = linear_cross_entropy(x_ND, decoder.output.text, ids_BT[:, 1:].flatten()).total
            optimizer.zero_grad()
            (loss / ids_BT[:, 1:].numel()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            advance(1)
    return result
