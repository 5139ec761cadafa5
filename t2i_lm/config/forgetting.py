"""The section `forgetting` of an experiment. Standard library only."""

from dataclasses import dataclass, field

from t2i_lm.config.sections import Section

# Held-out text that is shipped (`assets/README.md`), of two domains, and text to train on for a few steps.
NOVELS, NONFICTION = "asset:text/novels.txt.gz", "asset:text/nonfiction.txt.gz"
RELEARNING = "asset:text/relearning.txt.gz"


@dataclass(frozen=True)
class ForgettingConfig(Section, prefix="forgetting"):
    """Measurements of language retention before, during and after training."""

    interval: int | None = None
    """Optimizer steps between measurements, beside those before the first and after the last step; null: none."""
    text: str | None = None
    """Held-out text: .txt, .txt.gz, a folder of them, or the name of a Hugging Face dataset; shipped are
    `asset:text/novels.txt.gz` and `asset:text/nonfiction.txt.gz`."""
    second_text: str | None = None
    """Held-out text of another domain, measured in the same way; null: none."""
    rows: int = 64
    """Evenly spaced rows of each text, or all where it has fewer."""
    length: int = 256
    """Ids per row."""
    tasks: str | None = None
    """Folder of questions, NAME.jsonl[.gz] (evaluation/probes/questions.py documents the formats); null: none."""
    questions: int = 100
    """Evenly spaced questions of each task."""
    completion_tokens: int = 32
    """Length of a completion."""
    prompts: list[str] = field(default_factory=list)
    """Prompts completed beside those of Table 1."""

    def __post_init__(self) -> None:
        self.at_least(1, "interval", "rows", "length", "questions", "completion_tokens")
        if self.interval is not None and self.text is None:
            raise ValueError(
                f"forgetting.text=null: forgetting.interval={self.interval} needs held-out text, "
                f"for example forgetting.text={NOVELS}"
            )

    @property
    def texts(self) -> dict[str, str]:
        """Path of each text by its key, which is also its name in a record: `text`, `second_text`."""
        paths = {"text": self.text, "second_text": self.second_text}
        return {key: path for key, path in paths.items() if path is not None}
