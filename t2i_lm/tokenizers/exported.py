"""The text tokenizer of an export: its file, and beside it where documents begin and end for the exported model."""

import json
import shutil
from pathlib import Path
from typing import Any

from t2i_lm.storage.writing import atomic_file, write_atomic
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import TOKENIZER_CONFIG
from t2i_lm.tokenizers.text import FileTokenizer


def write_tokenizer(
    text: TextTokenizer, folder: Path, stem: str, settings: dict[str, Any] | None = None, begin: bool = False
) -> Path:
    """Writes a tokenizer that begins and ends documents alike when it is opened again; returns its file.

    The file is copied. Only a post-processor that puts another token in front of a text than the beginning of documents
    is replaced. Of a plug-in, which has its own ends, nothing else is written.

    Args:
        text: the tokenizer.
        folder: where to write.
        stem: of the file's name.
        settings: further keys of `tokenizer_config.json`.
        begin: whether a JSON file's post-processor is to put the beginning in front of texts in any case:
            `AutoTokenizer` does not read `add_bos_token`.
    """
    if not isinstance(text, FileTokenizer):
        return _copy(text.path, folder / f"{stem}{text.path.suffix}")
    known, file = text.documents, folder / f"{stem}{Path(text.in_folder).suffix}"
    start, end = (None if number is None else text.token(number) for number in (known.start, known.end))
    first = text.put_first()
    if known.start == first or (first is None and not (begin and file.suffix == ".json")):
        _copy(text.path, file)
    else:
        content = json.loads(text.path.read_text(encoding="utf-8"))
        content["post_processor"] = None if start is None else _put_in_front(start, known.start)
        write_atomic(file, json.dumps(content, ensure_ascii=False))
    keys = dict(settings or {})
    keys |= {} if start is None else {"add_bos_token": True, "bos_token": start}
    keys |= {} if end is None else {"eos_token": end}
    write_atomic(folder / TOKENIZER_CONFIG, json.dumps(keys, indent=2) + "\n")
    return file


def _copy(path: Path, target: Path) -> Path:
    with atomic_file(target) as file:
        shutil.copyfile(path, file)
    return target


def _put_in_front(token: str, number: int | None) -> dict[str, Any]:
    """A post-processor of `tokenizers` that puts a token in front of a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
