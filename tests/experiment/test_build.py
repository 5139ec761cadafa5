"""Whether a text tokenizer is the backbone's own, decided by the ids that it can produce."""

from pathlib import Path

import pytest
import tokenizers

from t2i_lm.experiment.build import require_own_tokenizer
from t2i_lm.tokenizers.text import JsonTokenizer


def byte_tokenizer(folder: Path, special: list[str], plain: list[str]) -> JsonTokenizer:
    """256 bytes, `<eos>`, then added tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)} | {"<eos>": 256}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(["<eos>", *special])
    model.add_tokens(plain)
    model.save(str(folder / "tokenizer.json"))
    return JsonTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("special", "plain", "rows", "fits"),
    [
        ([], [], 257, True),
        ([], [], 300, True),  # padding rows
        (["<image_soft_token>"], [], 257, True),  # as Gemma 3's text models have it
        (["<a>", "<b>"], [], 257, True),
        ([], ["<plain>"], 257, False),  # found in ordinary text
        (["<a>"], ["<plain>"], 258, False),
        (["<a>"], ["<plain>"], 259, True),
        ([], [], 256, False),  # without the end of a document
    ],
)
def test_special_tokens_alone_may_lack_a_row(
    special: list[str], plain: list[str], rows: int, fits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = byte_tokenizer(tmp_path, special, plain)
    if not fits:
        with pytest.raises(ValueError, match=f"has {text.vocab_size} pieces but the backbone {rows} rows"):
            require_own_tokenizer(text, rows)
        return
    require_own_tokenizer(text, rows)
    lacking = text.vocab_size - rows
    note = (
        f"note: {lacking} special tokens of text_tokenizer.path have no row in the backbone; no text is encoded as one"
    )
    assert capsys.readouterr().err.strip() == (note if lacking > 0 else "")
    assert max(text.encode("a cat <image_soft_token> <a><b> <plain> <eos>")) < rows
