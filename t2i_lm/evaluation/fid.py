"""FID of generated or reconstructed images against COCO's val2014: features in resumable parts, then one number.

Shapes: `B` images, `N` image tokens, `H`, `W` pixels, `D` feature width.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from callbacks import FeatureDistance, FidTask, Inception, kernel_distance
from t2i_lm.assets import resolve
from t2i_lm.data.coco import (
    CAPTIONS,
    CROP,
    IMAGES,
    RESIZER,
    SIZE,
    Coco,
    Prompt,
    choose_prompts,
    listing_sha256,
    prompts_sha256,
    read_coco,
    read_images,
    square,
)
from t2i_lm.data.shards.tokenize import stack_images
from t2i_lm.evaluation.protocol_card import CANONICAL, PROMPT_SEED, Card
from t2i_lm.experiment.build import Experiment, ImageExperiment, ImageModel
from t2i_lm.generation.images import (
    ImageArray,
    caption_layout,
    caption_prompts,
    decode,
    encode_captions,
    generate_codes,
    numerics,
    sampling_of,
    seeds_of,
)
from t2i_lm.models.generate import Sampling
from t2i_lm.runtime.launch import local_rank
from t2i_lm.runtime.progress import going_on, log_progress
from t2i_lm.storage.resumable import ResumableParts

# Images per pass of the feature network, and images per part of the reference.
NETWORK_BATCH, REFERENCE_PART = 32, 256


def count_cut(model: ImageModel, coco: Coco, prompts: Sequence[Prompt], log: bool = True) -> int:
    """Number of captions that are longer than the model's sequence takes: they are cut as in training.

    `log` prints the longest on stderr; the number is in the card, and the result is then not canonical.

    Raises:
        ValueError: if the model takes no captions.
    """
    layout, text = caption_layout(model)
    lengths = [len(ids) for ids in encode_captions(text, (prompt.text for prompt in prompts))]
    over = sum(length > layout.text_budget for length in lengths)
    if over and log:
        longest = max(range(len(prompts)), key=lengths.__getitem__)
        print(
            f"note: {coco.path / CAPTIONS}: {over} of {len(prompts)} captions are cut to the {layout.text_budget} ids "
            f"that data.length={model.config.data.length} leaves; {prompts[longest].caption_id} has {lengths[longest]}",
            file=sys.stderr,
        )
    return over


def features_of(images: Sequence[ImageArray | Image.Image], network: Inception) -> Tensor:
    """Features (B, D) of images (H, W, 3) of any size, after the protocol's crop and resize."""
    opened = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    batches = (opened[start : start + NETWORK_BATCH] for start in range(0, len(opened), NETWORK_BATCH))
    return torch.cat([network(stack_images([square(image) for image in batch])) for batch in batches])


class Reference:
    """Features of all images of val2014, cached for all runs."""

    def __init__(self, coco: Coco, network: Inception, cache: Path) -> None:
        self.coco, self.network = coco, network
        identity = {
            "reference": IMAGES,
            "listing_sha256": listing_sha256(coco),
            "size": SIZE,
            "crop": CROP,
            "resizer": RESIZER,
            **network_card(network),
        }
        folder = cache / "fid" / f"{identity['listing_sha256'][:12]}-{network.sha256[:12]}-{network.width}"
        self.parts = ResumableParts(folder, identity, len(coco.images), REFERENCE_PART)

    def make(self, span: range) -> dict[str, Tensor]:
        """Features and file hashes of some images."""
        images, digests = read_images(self.coco, self.coco.images[span.start : span.stop])
        hashes_B32 = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32).copy())
        return {"features": features_of(images, self.network), "sha256": hashes_B32}

    def sha256(self) -> str:
        """Hash of all images' names and bytes, in order, once all parts are there."""
        import hashlib

        digest = hashlib.sha256()
        for number in range(len(self.parts)):
            hashes = self.parts.read(number)["sha256"].numpy()
            for index, row_32 in zip(self.parts.span(number), hashes, strict=True):
                digest.update(self.coco.images[index].encode() + b"\0" + row_32.tobytes())
        return digest.hexdigest()


def network_card(network: Inception) -> dict[str, Any]:
    """The fields of a card that name the feature network."""
    return {
        "network": CANONICAL["network"],
        "network_sha256": network.sha256,
        "features": network.width,
        "antialias": False,
    }


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A model, the captions that it generates images of, and how.

    Attributes:
        prompts: chosen captions of `coco`.
        cut: how many of them are longer than the model's sequence takes.
    """

    model: ImageModel
    coco: Coco
    prompts: list[Prompt]
    sampling: Sampling
    seed: int
    cut: int = 0

    def codes(self, numbers: Sequence[int]) -> Tensor:
        """Image codes (B, N) of some prompts; each depends on its prompt, number and the seed, see `generate`."""
        seeds = seeds_of(self.seed, len(self.prompts))
        captions = [self.prompts[number].text for number in numbers]
        prompts = caption_prompts(self.model, captions)
        return generate_codes(self.model, prompts, [seeds[number] for number in numbers], self.sampling)

    def card(self, network: Inception, reference_sha256: str, images: str = "drawn") -> Card:
        """The protocol card of `drawn` or `reconstructed` images, as the model computes now."""
        generation: dict[str, Any] = {}
        if images == "drawn":
            generation = {**asdict(self.sampling), "prompts_cut": self.cut, **numerics(self.model)}
        return Card(
            pictures=images,
            prompts=len(self.prompts),
            prompt_seed=PROMPT_SEED,
            prompts_sha256=prompts_sha256(self.prompts),
            captions=self.coco.caption_count,
            captions_sha256=self.coco.captions_sha256,
            reference=IMAGES,
            reference_pictures=len(self.coco.images),
            reference_sha256=reference_sha256,
            size=SIZE,
            native_size=self.model.image.image_size,
            crop=CROP,
            resizer=RESIZER,
            seed=self.seed,
            prompt_ids=[[prompt.image_id, prompt.caption_id] for prompt in self.prompts],
            **network_card(network),
            **generation,
        )

    def make(self, span: range, network: Inception) -> dict[str, Tensor]:
        """Codes and features of images generated for some prompts."""
        codes_BN = self.codes(span)
        features_BD = features_of(decode(self.model, codes_BN), network)
        return {"codes": codes_BN.to(torch.int32), "features": features_BD}

    def reconstruct(self, span: range, network: Inception) -> dict[str, Tensor]:
        """Codes and features of the prompts' real images, encoded and decoded: the floor of every model."""
        tokenizer = self.model.image
        real, _ = read_images(self.coco, [self.prompts[number].file for number in span])
        codes = [
            tokenizer.encode(stack_images([square(image, tokenizer.image_size) for image in real[start : start + 8]]))
            for start in range(0, len(real), 8)
        ]
        codes_BN = torch.cat(codes).cpu()
        return {"codes": codes_BN.to(torch.int32), "features": features_of(decode(self.model, codes_BN), network)}


def distances(images: ResumableParts, reference: ResumableParts, width: int) -> dict[str, float]:
    """Frechet and kernel distance of features in parts, summed in the order of the images on any number of ranks.

    The subsets of the kernel distance are drawn from all images and all reference images, as during training.
    """
    metric = FeatureDistance(width, sync_on_compute=False)
    features: dict[bool, list[Tensor]] = {False: [], True: []}
    for parts, real in ((images, False), (reference, True)):
        for number in range(len(parts)):
            features_BD = parts.read(number)["features"]
            metric.update(features_BD, real=real)
            features[real].append(features_BD)
    kid, deviation = kernel_distance(torch.cat(features[False]), torch.cat(features[True]))
    return {"fid": float(metric.compute()), "kid": kid, "kid_std": deviation}


def training_fid(experiment: Experiment) -> tuple[FidTask, Inception] | None:
    """Task and network of `callbacks.CocoFID` during training; None where `fid.interval` is null.

    Raises:
        ValueError: if COCO or the weights cannot be used, or the model takes no captions.
    """
    config = experiment.config
    settings = config.fid
    if settings.interval is None:
        return None
    assert isinstance(experiment, ImageExperiment)
    assert settings.coco is not None
    assert settings.weights is not None
    coco = read_coco(Path(settings.coco))
    prompts = choose_prompts(coco, settings.prompts, PROMPT_SEED)
    cut = count_cut(experiment, coco, prompts, log=local_rank() == 0)
    network = Inception(resolve(settings.weights, "fid.weights"), settings.features, settings.weights_sha256)
    sampling = sampling_of(config.samples)
    prompt_set = PromptSet(model=experiment, coco=coco, prompts=prompts, sampling=sampling, seed=config.seed, cut=cut)
    reference = Reference(coco, network, Path(config.data.cache_dir))
    parts = reference.parts

    def draw(numbers: Sequence[int]) -> Tensor:
        experiment.image.to(experiment.module.device)
        images = decode(experiment, prompt_set.codes(numbers))
        experiment.image.to(torch.device("cpu"))  # leaves the GPU to training
        going_on()
        return stack_images([square(Image.fromarray(image)) for image in images])

    def features(network: Inception, rank: int, world: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        advance = log_progress("reference", parts.items, rank, world)
        for number in range(rank, len(parts), world):
            parts.complete_one(number, reference.make)
            advance(len(parts.span(number)))
            yield parts.span(number), parts.read(number)["features"]

    def card() -> dict[str, Any]:
        # Content hashes would need all images read before the first step: the listing's names the folder here.
        made = prompt_set.card(network, f"listing {parts.identity['listing_sha256']}")
        return {"title": made.title, **made.as_dict()}

    return FidTask(len(prompts), draw, features, card), network
