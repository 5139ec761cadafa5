"""The joint vocabulary: text ids | seven special ids | image ids, in that order (Section 2.1).

Special rows follow the backbone's vocabulary, padding rows included, so that no pre-trained row changes its meaning.
"""

from dataclasses import dataclass

SPECIALS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>", "<pad>")
BOUNDARY_TOKENS = len(SPECIALS) - 1  # of a text-to-image sequence


@dataclass(frozen=True)
class JointVocab:
    """Id ranges of an expanded decoder.

    Attributes:
        text_size: rows of the backbone before expansion (50,432 for open_lm-1b).
        image_size: codes of the image tokenizer (16,384 for SBER-MoVQGAN).
    """

    text_size: int
    image_size: int

    def __post_init__(self) -> None:
        for name in ("text_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def image_offset(self) -> int:
        """Joint id of image code 0."""
        return self.text_size + len(SPECIALS)

    @property
    def size(self) -> int:
        """Rows of the expanded embedding and output matrices."""
        return self.image_offset + self.image_size

    def special(self, token: str) -> int:
        """Joint id of one of `SPECIALS`."""
        return self.text_size + SPECIALS.index(token)

    @property
    def pad(self) -> int:
        """Joint id of `<pad>`, the last special id: all above it are image ids."""
        return self.special("<pad>")
