"""The section `lora` of an experiment. Standard library only."""

from dataclasses import dataclass

from t2i_lm.config.sections import Section


@dataclass(frozen=True)
class LoraConfig(Section, prefix="lora"):
    """Low-rank adapters on the linear layers and experts of the blocks, which stay frozen (extra `lora`)."""

    rank: int = 0
    """Rank of the adapters; 0: none."""
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    image_only: bool = False
    """Adapters apply to ids from `<image>` on (`<image>`, `</image>`, `<pad>`, image codes); logits of plain text over
    the text rows are unchanged to the bit."""

    def __post_init__(self) -> None:
        self.at_least(0, "rank")
        self.positive("alpha")
        default = type(self).alpha
        self.check(self.rank > 0 or self.alpha == default, "alpha", f"{default:g} with lora.rank=0, without adapters")
        self.check(self.rank > 0 or not self.image_only, "image_only", "false with lora.rank=0, without adapters")
