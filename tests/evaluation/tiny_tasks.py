"""A text of few words, and question files of each form about it."""

import gzip
import json
from pathlib import Path

SENTENCE = "the red circle is above a blue square and the green ring lies on a grey field of stars"
WORDS = SENTENCE.split()
TEXT = [" ".join(WORDS[(start * step) % len(WORDS)] for step in range(1, 13)) for start in range(1, 60)]


def write_tasks(folder: Path, extra: str = "") -> Path:
    folder.mkdir()
    choices = [{"query": "Question: the red\n", "choices": ["circle", "ring of stars"], "gold": 1}] * 3
    contexts = [{"context_options": ["the circle", "the ring"], "continuation": "lies on a field", "gold": 0}] * 2
    cloze = [{"context": "the green ring lies on a", "continuation": "grey"}]
    (folder / "arc.jsonl").write_text("\n".join(map(json.dumps, choices)) + "\n")
    with gzip.open(folder / "wino.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, contexts)))
    (folder / "lambada.v2.jsonl").write_text("\n".join(map(json.dumps, cloze)) + extra)
    return folder
