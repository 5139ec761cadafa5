"""The sections of an experiment that measure forgetting and that hold it back.

Standard library only. A wrong value raises a ValueError that names the key, the value and what is allowed.
"""

from dataclasses import dataclass, field

from t2i_lm.config.sections import one_of, require

LOSS_BACKENDS = ("fused", "torch")


@dataclass
class ForgettingConfig:
    """What is measured of the language model before, during and after training; nothing where `interval` is null."""

    interval: int | None = None  # optimiser steps between measurements; also before the first and after the last step
    text: str | None = None  # held-out text: .txt, .txt.gz, a folder of them, or a hub name
    rows: int = 64  # evenly spaced rows of it
    length: int = 256  # ids of a row
    tasks: str | None = None  # folder of questions, NAME.jsonl[.gz] (probes/questions.py says in which forms)
    questions: int = 100  # evenly spaced questions of each
    completion_tokens: int = 32
    prompts: list[str] = field(default_factory=list)  # completed beside those of Table 1

    def __post_init__(self) -> None:
        require(self.interval is None or self.interval >= 1, "forgetting.interval", self.interval, "null or at least 1")
        for key in ("rows", "length", "questions", "completion_tokens"):
            require(getattr(self, key) >= 1, f"forgetting.{key}", getattr(self, key), "at least 1")
        if self.interval is not None and self.text is None:
            raise ValueError(
                f"forgetting.text=null: forgetting.interval={self.interval} needs held-out text, "
                "for example forgetting.text=heldout.txt.gz"
            )


@dataclass
class LossConfig:
    """What is differentiated; what is logged stays the plain loss.

    The loss is the mean over targets, weighted by modality (boundary tokens keep 1), with the z-loss added to each.
    """

    text_weight: float = 1.0  # 0: captions condition the pictures but are not learnt
    image_weight: float = 1.0
    replay_weight: float = 1.0  # of data.replay_path's text
    backend: str = "fused"  # or torch: its own chunked loss, in float32 and slower, for comparison
    z: float = 0.0  # factor of logsumexp squared, which keeps logits small (PaLM's z-loss, there 1e-4); 0: none

    def __post_init__(self) -> None:
        one_of("loss.backend", self.backend, LOSS_BACKENDS)
        for key in ("text_weight", "image_weight", "replay_weight", "z"):
            require(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "0 or more")

    @property
    def weighted(self) -> bool:
        """Whether any modality's factor is not 1."""
        return (self.text_weight, self.image_weight, self.replay_weight) != (1, 1, 1)


@dataclass
class DistilConfig:
    """Distillation from the frozen initial model on text: captions and replay."""

    weight: float = 0.0  # factor of KL(initial || trained) over the text rows, nats, at every text target

    def __post_init__(self) -> None:
        require(self.weight >= 0, "distil.weight", self.weight, "0 or more")


@dataclass
class LoraConfig:
    """Low-rank adapters on the linear layers of attention and feed-forward (extra `lora`); those stay frozen."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a positive value")
