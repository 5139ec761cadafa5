"""Table 1: greedy completions of fixed prompts before and after training, of both arms of a pair."""

import re
from dataclasses import dataclass
from pathlib import Path

from t2i_lm.comparison.comparability import MissingRunsError
from t2i_lm.evaluation.forgetting import completion_rows
from t2i_lm.plots.captions import ARM_NAMES, group_caption
from t2i_lm.plots.groups import FORGETTING
from t2i_lm.plots.pairing import RunPair
from t2i_lm.runtime.tables import latex_table, markdown_table
from t2i_lm.storage.run_folder import Run
from t2i_lm.storage.writing import write_atomic

NAME = "table1"
TITLE = "Table 1. Greedy completions before and after text-to-image training"
HOW = (
    "Greedy decoding, over the text rows alone and over all rows of the vocabulary, with which a model may answer a "
    "prompt by an image. One run per arm."
)
# Image tokens in a row of which the first are shown.
IMAGES = re.compile(r"(?:<image \d+>){4,}")
SHOWN = 2


@dataclass(frozen=True)
class CompletionsTable:
    """A table with its caption."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As Markdown, the caption below."""
        return f"{markdown_table(self.header, self.rows)}\n\n{self.caption}\n"

    def latex(self) -> str:
        """As a `tabular` in the style of booktabs, under a comment with the caption."""
        columns = "p{0.2\\linewidth}l" + "p{0.15\\linewidth}" * (len(self.header) - 2)
        return f"% {self.caption}\n{latex_table(self.header, self.rows, columns)}\n"

    def save(self, folder: Path) -> list[Path]:
        """Writes table1.md and table1.tex and returns their paths.

        Raises:
            OSError: if a file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{NAME}.md", folder / f"{NAME}.tex"]
        for path, content in zip(paths, (self.markdown(), self.latex()), strict=True):
            write_atomic(path, content)
        return paths


def completions_table(pair: RunPair) -> CompletionsTable:
    """Table 1 of a pair; the random arm is the control.

    Raises:
        ValueError: if an arm did not measure forgetting, or the two completed other prompts.
    """
    arms = {ARM_NAMES[arm]: _completions(run) for arm, run in pair.arms.items()}
    first, *others = (list(found) for found in arms.values())
    if any(keys != first for keys in others):
        raise ValueError(f"Table 1: {' and '.join(str(run.folder) for run in pair.arms.values())} have other prompts")
    header = ("prompt", "rows", *(f"{arm}, {when}" for arm in arms for when in ("before", "after")))
    rows = [
        (prompt, kind, *(text for found in arms.values() for text in found[prompt, kind])) for prompt, kind in first
    ]
    return CompletionsTable(f"{TITLE}. {group_caption(pair.arms, how=HOW)}", header, rows)


def _completions(run: Run) -> dict[tuple[str, str], tuple[str, str]]:
    """Completions before and after training by prompt and rows."""
    rows = completion_rows(run)
    if not rows or len(run.records("forgetting")) < 2:
        missing = f"{run.folder} has no completions before and after training"
        raise MissingRunsError(f"{missing}; to make them: {FORGETTING.command}")
    *_, after = rows[0]
    return {(row["prompt"], row["rows"]): (_short(row["original"]), _short(row[after])) for row in rows}


def _short(completion: str) -> str:
    """A completion whose long runs of image tokens are cut."""

    def cut(found: re.Match[str]) -> str:
        ids = re.findall(r"<image \d+>", found[0])
        return f"{''.join(ids[:SHOWN])} ... ({len(ids)} image tokens)"

    return IMAGES.sub(cut, completion)
