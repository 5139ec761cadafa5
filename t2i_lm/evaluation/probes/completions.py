"""Greedy completions of fixed prompts (Table 1), with image and boundary rows masked and unmasked.

Unmasked completions do not distinguish a model that has forgotten a fact from one that answers with an image, since
image rows win; masked completions hide the latter.
"""

import torch

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.generate import NotFiniteError, continue_text
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import leading_ids
from t2i_lm.tokenizers.joint_vocab import SPECIALS

# Table 1: a fact, and three examples of a translation.
PROMPTS = {
    "fact": "Simply put, the theory of relativity states that",
    "translation": (
        "Translate English to French:\nsea otter => loutre de mer\npeppermint => menthe poivrée\n"
        "plush girafe => girafe peluche\ncheese =>"
    ),
}

# In place of a completion by a model whose logits are NaN or infinite.
NOT_FINITE = "(none: the logits are not finite)"


def complete(decoder: Backbone, text: TextTokenizer, prompt: str, tokens: int, limit: int) -> dict[str, str]:
    """A prompt and its greedy completions: `masked` (over the text rows only) and `unmasked`.

    Args:
        decoder: expanded or not.
        text: its tokenizer.
        prompt: text at the beginning of a document, cut on the left where it does not fit.
        tokens: maximum length of the completion in ids; it ends earlier with the document.
        limit: positions of the model.
    """
    ids, _ = leading_ids(text, text.encode(prompt), max(1, limit - tokens))
    prompt_T = torch.tensor(ids, device=decoder.output.text.device)
    result = {"prompt": prompt}
    for name, all_rows in (("masked", False), ("unmasked", True)):
        try:
            added = continue_text(decoder, prompt_T, tokens, stop=text.document_end, all_rows=all_rows)
        except NotFiniteError:  # of a model that has diverged, which ends no run
            result[name] = NOT_FINITE
            continue
        result[name] = spell(added.tolist(), text, len(decoder.output.text))
    return result


def spell(ids: list[int], text: TextTokenizer, text_size: int) -> str:
    """Text of joint ids; boundary tokens by name, image codes as `<image 17>`."""
    words, run = "", list[int]()
    for token in [*ids, None]:
        if token is not None and token < text_size:
            run.append(token)
            continue
        # Rows that pad a backbone's vocabulary have no piece in its tokenizer.
        words += text.decode(piece for piece in run if piece < text.vocab_size)
        run = []
        if token is not None:
            code = token - text_size
            words += SPECIALS[code] if code < len(SPECIALS) else f"<image {code - len(SPECIALS)}>"
    return words
