"""Sequence layouts (Section 2.1) and the modality of a target.

Shapes: `B` batch, `T` positions, `N` image tokens of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from t2i_lm.tokenizers.joint_vocab import BOUNDARY_TOKENS, JointVocab

IntArray = npt.NDArray[np.integer]

# Indices in every (M,) sum and count; pads are a class of their own and never counted.
MODALITIES = ("text", "image", "boundary")
TEXT, IMAGE, BOUNDARY, PAD = range(4)


@dataclass(frozen=True)
class Layout:
    """`<doc> <text> t.. </text> <image> i.. </image> </doc>`, padded with `<pad>` to `length`.

    Attributes:
        vocab: id ranges.
        image_tokens: ids per image (1,024 in the paper).
        length: positions of a padded sequence (1,152 in the paper).
    """

    vocab: JointVocab
    image_tokens: int
    length: int

    def __post_init__(self) -> None:
        if self.text_budget < 1:
            raise ValueError(
                f"data.length={self.length} leaves no room for text: {self.image_tokens} image tokens and "
                f"{BOUNDARY_TOKENS} boundary tokens need data.length > {self.image_tokens + BOUNDARY_TOKENS}"
            )

    @property
    def text_budget(self) -> int:
        """Text tokens that fit (122 in the paper)."""
        return self.length - self.image_tokens - BOUNDARY_TOKENS

    @property
    def prompt_budget(self) -> int:
        """Positions of the longest prompt."""
        return self.length - self.image_tokens - 2  # `</image>` and `</doc>` follow the image

    def prompt(self, text_ids: IntArray) -> IntArray:
        """Ids up to and including `<image>`, the text cut to its budget; 1-d int64."""
        special = self.vocab.special
        head = [special("<doc>"), special("<text>")]
        tail = [special("</text>"), special("<image>")]
        return np.concatenate([head, text_ids[: self.text_budget], tail]).astype(np.int64)

    def pack(self, text_ids: Sequence[IntArray], image_ids_BN: IntArray) -> Tensor:
        """Joint ids (B, T) int64 of B captions and their images.

        Args:
            text_ids: B arrays of text ids, each to be cut to the text budget.
            image_ids_BN: codes in [0, vocab.image_size), row-major.

        Raises:
            ValueError: if the images do not have `image_tokens` ids.
        """
        if image_ids_BN.shape != (len(text_ids), self.image_tokens):
            raise ValueError(
                f"image ids have shape {image_ids_BN.shape}, expected {(len(text_ids), self.image_tokens)}"
            )
        special = self.vocab.special
        tail = [special("</image>"), special("</doc>")]
        joint_BN = image_ids_BN.astype(np.int64) + self.vocab.image_offset
        ids_BT = np.full((len(text_ids), self.length), self.vocab.pad, dtype=np.int64)
        for row_T, text, joint_N in zip(ids_BT, text_ids, joint_BN, strict=True):
            prompt = self.prompt(text)
            end = len(prompt) + self.image_tokens
            row_T[: len(prompt)] = prompt
            row_T[len(prompt) : end] = joint_N
            row_T[end : end + 2] = tail
        return torch.from_numpy(ids_BT)


@dataclass(frozen=True)
class ImageLayout:
    """`<doc> <image> i.. </image> </doc>`, without pads: unconditional image modeling (Section 3.1).

    Attributes:
        vocab: id ranges.
        image_tokens: ids per image.
    """

    vocab: JointVocab
    image_tokens: int

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.image_tokens + 4

    def prompt(self) -> IntArray:
        """`<doc> <image>`; 1-d int64."""
        return np.array([self.vocab.special("<doc>"), self.vocab.special("<image>")], dtype=np.int64)

    def pack(self, text_ids: Sequence[IntArray], image_ids_BN: IntArray) -> Tensor:
        """Joint ids (B, T) int64 of B images; captions are ignored.

        Raises:
            ValueError: if the images do not have `image_tokens` ids.
        """
        if image_ids_BN.shape[1] != self.image_tokens:
            raise ValueError(f"image ids have shape {image_ids_BN.shape}, expected (B, {self.image_tokens})")
        tail = [self.vocab.special("</image>"), self.vocab.special("</doc>")]
        parts = [self.prompt(), image_ids_BN.astype(np.int64) + self.vocab.image_offset, np.array(tail)]
        rows = [np.broadcast_to(part, (len(image_ids_BN), part.shape[-1])) for part in parts]
        return torch.from_numpy(np.concatenate(rows, axis=1))


def modality_of_target(target_BT: Tensor, vocab: JointVocab) -> Tensor:
    """TEXT, IMAGE, BOUNDARY or PAD of each target id, int64, same shape.

    The split is by target, not by input: the token predicted at `<image>` is an image token.
    """
    modality_BT = torch.full_like(target_BT, BOUNDARY)
    modality_BT[target_BT < vocab.text_size] = TEXT
    modality_BT[target_BT >= vocab.image_offset] = IMAGE
    modality_BT[target_BT == vocab.pad] = PAD
    return modality_BT
