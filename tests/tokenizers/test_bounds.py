"""Text tokenizers whose rules multiply a text, or never end, are refused when they are opened."""

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from t2i_lm.tokenizers.text import open_text_tokenizer


def saved(folder: Path, **parts: Any) -> Path:
    made = Tokenizer(models.BPE({chr(32 + number): number for number in range(95)}, []))
    for name, part in parts.items():
        setattr(made, name, part)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "replacements": (
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "a" * 10)] * 9)},
        "its normalizer makes up to 1,000,000,000 characters of one",
    ),
    "an empty pattern": ({"normalizer": normalizers.Replace("", "a" * 999)}, "up to 1,000 characters"),
    "prefixes": ({"normalizer": normalizers.Sequence([normalizers.Prepend("a" * 9)] * 3)}, "up to 1,000 characters"),
    "decoder": ({"decoder": decoders.Replace("a", "a" * 300)}, "its decoder makes up to 300 characters"),
    "nested": (
        {"normalizer": normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", "b" * 20)] * 2)])},
        "up to 400 characters",
    ),
    "splits": ({"pre_tokenizer": pre_tokenizers.Split(Regex("(z+)+$"), "isolated")}, "encoding .* times 'z' "),
    "normalizer's pattern": ({"normalizer": normalizers.Replace(Regex("(a|aa)+$"), "b")}, "encoding .* times 'a' "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_that_would_never_end_is_refused(name: str, tmp_path: Path) -> None:
    parts, message = HOSTILE[name]
    with pytest.raises(ValueError, match=rf"^text_tokenizer\.path: .*tokenizer\.json: .*{message}"):
        open_text_tokenizer(saved(tmp_path, **parts))


def test_a_compiled_map_is_bounded_in_both_formats(tmp_path: Path) -> None:
    file = saved(tmp_path)
    content = json.loads(file.read_text())
    charsmap = struct.pack("<I", 4) + bytes(4) + b"ab\0" + b"x" * 500 + b"\0"
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):  # by its bound, or by the library that reads it first
        open_text_tokenizer(file)
    model, words = io.BytesIO(), iter(["the cat sat on a mat", "a dog ran over the hill"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    usual = tmp_path / "usual.model"
    usual.write_bytes(model.getvalue())
    assert open_text_tokenizer(usual).vocab_size == 60
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())  # type: ignore[attr-defined]
    proto.normalizer_spec.precompiled_charsmap += b"x" * 500 + b"\0"
    hostile = tmp_path / "hostile.model"
    hostile.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"hostile\.model: its normalizer_spec makes up to 500 characters of one"):
        open_text_tokenizer(hostile)


def test_a_pattern_that_backtracks_in_the_middle_of_the_data_is_one_error(tmp_path: Path) -> None:
    file = saved(tmp_path, pre_tokenizer=pre_tokenizers.Split(Regex("cat( ?d)* ?(d+)+$"), "isolated"))
    text = open_text_tokenizer(file)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode a text: Onig: .*retry-limit"):
        text.encode("cat" + " d" * 100 + "d" * 60 + "!")


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("_"), normalizers.Lowercase()])},
        {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(), "decoder": decoders.ByteLevel()},
        {"normalizer": normalizers.Replace(" ", "_"), "decoder": decoders.Replace("_", " ")},
    ],
)
def test_usual_tokenizers_are_opened(parts: dict[str, Any], tmp_path: Path) -> None:
    assert open_text_tokenizer(saved(tmp_path, **parts)).vocab_size == 95
