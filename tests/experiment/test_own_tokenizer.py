"""Whether a text tokenizer is the backbone's own: by the ids that it can produce, and by the one beside the weights."""

import gzip
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer

from t2i_lm.assets import resolve
from t2i_lm.experiment.own_tokenizer import require_own_tokenizer
from t2i_lm.prepare import main as prepare
from t2i_lm.tokenizers.text import JsonTokenizer, SentencePieceTokenizer, open_text_tokenizer, train_sentencepiece
from t2i_lm.train import main
from tests.runs import EXPERIMENTS


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


def trained(file: Path, text: str) -> SentencePieceTokenizer:
    """A tokenizer of a shipped text."""
    with gzip.open(resolve(f"asset:text/{text}.txt.gz", "text"), "rt", encoding="utf-8") as lines:
        return train_sentencepiece(islice(lines, 500), 1000, file)


def test_the_tokenizer_beside_the_weights_is_the_backbones(tmp_path: Path) -> None:
    """Another one of no more pieces than the backbone has rows would give ids of other words, without an error."""
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir()
    own = trained(model / "text_tokenizer.model", "novels")
    other = trained(elsewhere / "other.model", "nonfiction")
    require_own_tokenizer(own, 1000, str(model))
    require_own_tokenizer(other, 1000, str(elsewhere))
    require_own_tokenizer(other, 1000, None)
    require_own_tokenizer(other, 1000, "plugin:model")
    with pytest.raises(ValueError, match=rf"beside the weights .* set text_tokenizer\.path={model}/text_tokenizer"):
        require_own_tokenizer(other, 1000, str(model))


def test_another_file_of_the_same_tokenizer_is_the_backbones(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    byte_tokenizer(tmp_path / "model", [], [])
    copy = byte_tokenizer(tmp_path, ["<pad>"], [])
    assert copy.sha256 != JsonTokenizer(tmp_path / "model" / "tokenizer.json").sha256
    require_own_tokenizer(copy, 300, str(tmp_path / "model"))
    # One of several formats is enough, and one that cannot be read decides nothing.
    trained(tmp_path / "model" / "tokenizer.model", "nonfiction")
    require_own_tokenizer(copy, 300, str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    require_own_tokenizer(copy, 300, str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["tokenizer.json", "text_tokenizer.json"])
def test_a_json_tokenizer_beside_the_weights_is_found_by_every_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    byte_tokenizer(tmp_path / "model", [], []).path.rename(tmp_path / "model" / name)
    with pytest.raises(ValueError, match=rf"beside the weights .* set text_tokenizer\.path={tmp_path}/model/{name}"):
        require_own_tokenizer(trained(tmp_path / "other.model", "novels"), 1000, str(tmp_path / "model"))


def test_a_document_start_without_a_row_is_refused(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path, ["<bos>"], [])
    text = open_text_tokenizer(tmp_path / "tokenizer.json", document_start="<bos>")
    require_own_tokenizer(text, 258)
    with pytest.raises(ValueError, match=r"text_tokenizer\.document_start: id 257 .*has 257 rows"):
        require_own_tokenizer(text, 257)


@pytest.mark.parametrize("experiment", ["t2i_pretrained", "uncond_pretrained"])
def test_runs_dry_runs_and_prepare_refuse_a_foreign_tokenizer(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = trained(tmp_path / "other.model", "nonfiction")
    command = [str(EXPERIMENTS / f"{experiment}.yaml"), f"text_tokenizer.path={other.path}", f"run.dir={tmp_path}"]
    assert main(command) == 2
    refusal = "text_tokenizer.path: encodes text otherwise than"
    assert f"error: {refusal}" in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    assert f"a run is refused here: {refusal}" in capsys.readouterr().out
    assert prepare([*command, f"data.cache_dir={tmp_path}/cache"]) == 2
    assert f"error: {refusal}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("experiment", "keys", "refusal"),
    [
        ("t2i_scratch", ["text_tokenizer.path={folder}/large.model"], "pieces but the backbone 4096 rows"),
        ("text_lm", ["text_tokenizer.path={folder}/large.model"], "pieces but the backbone 4096 rows"),
        ("text_lm", ["text_tokenizer.vocab_size=4200"], "text_tokenizer.vocab_size=4200: expected at most"),
    ],
)
def test_prepare_refuses_more_pieces_than_the_backbone_has_rows(
    experiment: str, keys: list[str], refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "books.txt").write_text("words")
    texts = [f"{key}={tmp_path}/books.txt" for key in ("data.path", "data.val_path") if experiment == "text_lm"]
    SentencePieceTrainer.train(
        sentence_iterator=(chr(0x4E00 + number) for number in range(4_200)),
        model_prefix=str(tmp_path / "large"),
        model_type="char",
        vocab_size=4_200,
        minloglevel=2,
    )
    keys = [key.format(folder=tmp_path) for key in keys]
    command = [str(EXPERIMENTS / f"{experiment}.yaml"), *texts, *keys, f"data.cache_dir={tmp_path}/cache"]
    assert prepare(command) == 2
    assert refusal in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    assert refusal in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
