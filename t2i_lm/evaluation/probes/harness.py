"""A decoder as a model of lm-evaluation-harness (extra `lm-eval`): its requests, computed by this suite's own code.

Every text stands at the beginning of a document, behind what the model was trained behind, as in training on text and
in the other probes. Ids beyond the model's positions are cut on the left, as by the harness' own models.

Shapes: `B` texts, `N` targets, `D` width, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from t2i_lm.evaluation.probes.completions import spell
from t2i_lm.evaluation.probes.questions import encode_option
from t2i_lm.evaluation.probes.scores import POSITIONS, score_continuations
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.generate import prefill
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import context_id, leading_ids
from t2i_lm.tokenizers.text import MAX_CHARACTERS

# Sequences per step of the progress bar.
STEP = 512
# Maximum ids of an answer where the task sets none.
ANSWER = 256


class HarnessModel(LM):  # type: ignore[misc]  # the harness has no types
    """Likelihoods renormalized to the text rows, or over all rows, and greedy answers.

    A continuation is scored from the first id in which context and context + continuation differ.
    """

    def __init__(self, decoder: Backbone, text: TextTokenizer, all_rows: bool = False) -> None:
        """Takes a decoder in evaluation mode, expanded or not, and its tokenizer."""
        super().__init__()
        self._decoder, self._text, self._all_rows = decoder, text, all_rows
        self._limit = decoder.config.seq_len

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Log-likelihood in nats, whether every id is the likeliest) of each (context, continuation)."""
        options = [self._option(*request.args) for request in requests]
        return [(-float(nll_N.sum()), bool(best_N.all())) for nll_N, best_N in self._score(options, disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each (text,), in the harness' windows: each id once, after as long a context as fits."""
        options: list[tuple[list[int], int]] = []
        owners = []
        for owner, request in enumerate(requests):
            ids = self._encode(request.args[0])
            for window in get_rolling_token_windows(ids, context_id(self._text), self._limit, 1):
                context, target = make_disjoint_window(window)
                options.append(([*context, *target], len(context)))
                owners.append(owner)
        nats = [0.0] * len(requests)
        for owner, (nll_N, _) in zip(owners, self._score(options, disable_tqdm), strict=True):
            nats[owner] -= float(nll_N.sum())
        return nats

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers to each (context, settings), up to a stop text, the end of the document or a number of ids.

        Raises:
            ValueError: if a task requires random sampling, or more ids than the model has positions.
        """
        prompts, limits, stops = [], [], []
        for request in requests:
            context, settings = request.args
            kwargs = normalize_gen_kwargs(settings, min(ANSWER, self._limit // 2))
            if kwargs["do_sample"] and float(kwargs.get("temperature", 1.0)) > 0:
                raise ValueError(f"task {request.task_name}: do_sample=true, but answers are greedy here")
            tokens = kwargs["max_gen_toks"]
            if not 0 < tokens < self._limit:
                raise ValueError(
                    f"task {request.task_name}: max_gen_toks={tokens}, but the backbone has {self._limit} positions"
                )
            ids, _ = leading_ids(self._text, self._text.encode(context[-MAX_CHARACTERS:]), self._limit - tokens)
            prompts.append(torch.tensor(ids))
            limits.append(tokens)
            stops.append([stop for stop in kwargs["until"] if stop])
        answers: dict[int, str] = {}
        for members in tqdm(self._batches(prompts, limits), desc="answers", disable=disable_tqdm):
            own = [prompts[member] for member in members]
            texts = self._continue(own, limits[members[0]], [stops[member] for member in members])
            answers |= zip(members, texts, strict=True)
        return [answers[number] for number in range(len(requests))]

    def _option(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids at the beginning of a document, and the index of the first one that is scored."""
        stripped = context.rstrip()  # in the harness, a space before a word belongs to the word
        continuation = context[len(stripped) :] + continuation
        # The tokenizer's limit; text further to the left has no position anyway.
        stripped = stripped[max(0, len(stripped) + len(continuation) - MAX_CHARACTERS) :]
        return encode_option(self._text, stripped, continuation, self._limit + 1)  # the last id is only a target

    def _encode(self, string: str) -> list[int]:
        """Ids of a text of any length, tokenized in pieces."""
        starts = range(0, len(string), MAX_CHARACTERS)
        return [token for start in starts for token in self._text.encode(string[start : start + MAX_CHARACTERS])]

    def _score(self, options: Sequence[tuple[list[int], int]], quiet: bool) -> list[tuple[Tensor, Tensor]]:
        """Nll (N,) of the targets of each option, and whether each is the likeliest id; longest first."""
        order = sorted(range(len(options)), key=lambda number: -len(options[number][0]))
        scored: dict[int, tuple[Tensor, Tensor]] = {}
        with tqdm(total=len(order), desc="likelihoods", disable=quiet) as bar:
            for start in range(0, len(order), STEP):
                members = order[start : start + STEP]
                scores = score_continuations(self._decoder, [options[member] for member in members])
                for member, score in zip(members, scores, strict=True):
                    all_rows = (score.all_rows_N, score.best_of_all_N)
                    scored[member] = all_rows if self._all_rows else (score.text_rows_N, score.best_of_text_N)
                bar.update(len(members))
        return [scored[number] for number in range(len(options))]

    def _batches(self, prompts: Sequence[Tensor], limits: Sequence[int]) -> list[list[int]]:
        """Batches of prompts: of one answer limit, and of one length unless the cache is ragged."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
            length = 0 if self._decoder.ragged_cache else len(prompts[number])
            groups.setdefault((limits[number], length), []).append(number)
        batches = []
        for (tokens, _), members in groups.items():
            while members:
                size = max(1, POSITIONS // (len(prompts[members[0]]) + tokens))
                batches.append(members[:size])
                members = members[size:]
        return batches

    def _continue(self, prompts: Sequence[Tensor], tokens: int, stops: Sequence[Sequence[str]]) -> list[str]:
        """Answers to prompts, each cut at its first stop text."""
        rows, end = len(self._decoder.output.text), self._text.document_end
        cache = self._decoder.new_cache(len(prompts), max(map(len, prompts)) + tokens)
        last_BD = prefill(self._decoder, prompts, cache)
        added: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        for step in range(tokens):
            logits_BV = self._decoder.output(last_BD)
            best_B = (logits_BV if self._all_rows else logits_BV[:, :rows]).argmax(dim=-1)
            for row in sorted(open_rows):
                token = int(best_B[row])
                if token != end:
                    added[row].append(token)
                    texts[row] = spell(added[row], self._text, rows)
                if token == end or any(stop in texts[row] for stop in stops[row]):
                    open_rows.remove(row)
            if not open_rows or step + 1 == tokens:
                break
            last_BD = self._decoder.next_hidden(best_B, cache)
        for row, own in enumerate(stops):
            for stop in own:
                texts[row] = texts[row].split(stop)[0]
        return texts
