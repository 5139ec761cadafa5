"""Protocol card of a COCO FID: everything that the number depends on, and the title that it may have.

The same model scores 8.5 or 16 under two protocols that are both called "COCO FID". So a number here is called
"COCO FID-30k" only where each field of `CANONICAL` has its value. Standard library only.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

HEADLINE = "COCO FID-30k"
# Seed that chooses captions from val2014 (40,504 images with 202,654 captions).
PROMPT_SEED = 2014
# There is no published list of these hashes: two numbers are comparable where theirs are equal.
NOTE = (
    "the hashes of captions, prompts and reference images were recorded as found, and not checked against a "
    "published list"
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Images, reference and feature network of a number. Field names are the keys of written files.

    Attributes:
        pictures: source of the images: `drawn` by the model, or `reconstructed` by its image tokenizer.
        prompt_ids: (image id, caption id) of each prompt, in order.
        prompts_cut: number of captions that were longer than the model's sequence takes, and were cut as in training.
        captions_sha256: of COCO's file of captions.
        reference_sha256: of all reference images.
        kid_reference: how many of them the subsets of KID are drawn from.
        native_size: side in pixels of decoded images; where it is not `size`, they were resized like the references.
        network_sha256: of the feature network's weights.
        weights: number format of the model's weights during sampling.
        compiled: whether sampling was compiled.
        fp8: whether layers multiplied in float8 during sampling.
        note: what was not verified.
    """

    pictures: str
    prompts: int
    prompts_per_picture: int = 1
    prompts_cut: int = 0
    prompt_seed: int
    prompts_sha256: str
    captions: int
    captions_sha256: str
    reference: str
    reference_pictures: int
    reference_sha256: str
    kid_reference: str = "all"
    size: int
    native_size: int
    crop: str
    resizer: str
    antialias: bool
    network: str
    network_sha256: str
    features: int
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    weights: str = "float32"
    compiled: bool = False
    fp8: bool = False
    seed: int = 0
    note: str = NOTE
    prompt_ids: list[list[int]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def differences(self) -> list[str]:
        """The fields that are not canonical, with both values."""
        own = asdict(self)
        lines = [f"{key}={own[key]!r} (not {value!r})" for key, value in CANONICAL.items() if own[key] != value]
        for key, content in HASHES.items():
            if not re.fullmatch("[0-9a-f]{64}", own[key]):
                lines.append(f"{key}={own[key]!r} (not the hash of {content})")
        return lines

    @property
    def title(self) -> str:
        """The name of the number."""
        if self.pictures != "drawn":
            return f"FID of {self.pictures} images, n={self.prompts}"
        return HEADLINE if not self.differences() else f"FID, n={self.prompts}, not {HEADLINE}"


# Guidance, temperature and seed are those of the model's own distribution, which the study compares. It is sampled in
# float32 without compilation, since other rounding gives other images. Only the form of hashes is checked, see `NOTE`.
CANONICAL: dict[str, Any] = {
    "pictures": "drawn",
    "prompts": 30_000,
    "prompts_per_picture": 1,
    "prompts_cut": 0,
    "prompt_seed": PROMPT_SEED,
    "captions": 202_654,
    "reference": "val2014",
    "reference_pictures": 40_504,
    "kid_reference": "all",
    "size": 256,
    "native_size": 256,
    "crop": "centre",
    "resizer": "lanczos",
    "antialias": False,
    "network": "inception-v3-compat",
    "network_sha256": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "features": 2048,
    "guidance": 1.0,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "weights": "float32",
    "compiled": False,
    "fp8": False,
    "seed": 0,
}
HASHES = {
    "prompts_sha256": "the prompts",
    "captions_sha256": "the file of captions",
    "reference_sha256": "the images",
}


def require_headline(card: Card) -> None:
    """Refuses any card but that of `COCO FID-30k`.

    Raises:
        ValueError: naming each field that differs.
    """
    if differences := card.differences():
        raise ValueError(f"this is not {HEADLINE}: {'; '.join(differences)}")
