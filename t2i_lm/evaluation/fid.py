"""FID of drawn or reconstructed images against COCO's val2014: features in parts that survive a kill, then a number.

Shapes: `B` images, `N` image tokens, `H`, `W` pixels, `D` feature width.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
    generate_codes,
    numerics,
    sampling_of,
    seeds_of,
)
from t2i_lm.models.generate import Sampling
from t2i_lm.runtime.devices import local_rank
from t2i_lm.runtime.progress import log_progress
from t2i_lm.storage.resumable import ResumableParts

# Images that go through the feature network together, and images of one part of the reference.
NETWORK_BATCH, REFERENCE_PART = 32, 256


def count_cut(model: ImageModel, coco: Coco, prompts: Sequence[Prompt], tell: bool = True) -> int:
    """How many captions are longer than the model's sequence takes: they are cut, as training cuts its own.

    `tell` says on stderr which is the longest; the card keeps the number, and the result is then not canonical.

    Raises:
        ValueError: if the model takes no captions.
    """
    layout, text = caption_layout(model)
    lengths = [len(ids) for ids in text.encode_batch([prompt.text for prompt in prompts])]
    over = sum(length > layout.text_budget for length in lengths)
    if over and tell:
        longest = max(range(len(prompts)), key=lengths.__getitem__)
        print(
            f"note: {coco.path / CAPTIONS}: {over} of {len(prompts)} captions are cut to the {layout.text_budget} ids "
            f"that data.length={model.config.data.length} leaves; {prompts[longest].caption_id} has {lengths[longest]}",
            file=sys.stderr,
        )
    return over


def features_of(images: Sequence[ImageArray | Image.Image], network: Inception) -> Tensor:
    """Features (B, D) of images (H, W, 3) of any size, after the protocol's crop and resize."""
    found = []
    for start in range(0, len(images), NETWORK_BATCH):
        some = images[start : start + NETWORK_BATCH]
        opened = (image if isinstance(image, Image.Image) else Image.fromarray(image) for image in some)
        found.append(network(stack_images([square(image) for image in opened])))
    return torch.cat(found)


class Reference:
    """Features of all of val2014, kept in a cache: every run is compared with the same ones."""

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
class Drawing:
    """A model and the captions that it is to draw, `cut` of which are longer than its sequence takes."""

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
        """The card of a number that is made with this now."""
        drawn: dict[str, Any] = {}
        if images == "drawn":
            drawn = {**asdict(self.sampling), "prompts_cut": self.cut, **numerics(self.model)}
        return Card(
            images=images,
            prompts=len(self.prompts),
            prompt_seed=PROMPT_SEED,
            prompts_sha256=prompts_sha256(self.prompts),
            captions=self.coco.caption_count,
            captions_sha256=self.coco.captions_sha256,
            reference=IMAGES,
            reference_images=len(self.coco.images),
            reference_sha256=reference_sha256,
            size=SIZE,
            native_size=self.model.image.image_size,
            crop=CROP,
            resizer=RESIZER,
            seed=self.seed,
            prompt_ids=[[prompt.image_id, prompt.caption_id] for prompt in self.prompts],
            **network_card(network),
            **drawn,
        )

    def make(self, span: range, network: Inception) -> dict[str, Tensor]:
        """Codes and features of some prompts' drawn images."""
        codes_BN = self.codes(span)
        features_BD = features_of(decode(self.model, codes_BN), network)
        return {"codes": codes_BN.to(torch.int32), "features": features_BD}

    def reconstruct(self, span: range, network: Inception) -> dict[str, Tensor]:
        """The same of the prompts' real images, encoded and decoded: what no model of these codes can beat."""
        tokenizer = self.model.image
        real, _ = read_images(self.coco, [self.prompts[number].file for number in span])
        codes = [
            tokenizer.encode(stack_images([square(image, tokenizer.image_size) for image in real[start : start + 8]]))
            for start in range(0, len(real), 8)
        ]
        codes_BN = torch.cat(codes).cpu()
        return {"codes": codes_BN.to(torch.int32), "features": features_of(decode(self.model, codes_BN), network)}


def distances(measured: ResumableParts, reference: ResumableParts, width: int) -> dict[str, float]:
    """Frechet and kernel distance of features that lie in parts; summed in order, whoever made them.

    The subsets of the kernel distance are drawn from all measured and all reference images, as during training.
    """
    metric = FeatureDistance(width, sync_on_compute=False)
    kept: dict[bool, list[Tensor]] = {False: [], True: []}
    for parts, real in ((measured, False), (reference, True)):
        for number in range(len(parts)):
            features_BD = parts.read(number)["features"]
            metric.update(features_BD, real=real)
            kept[real].append(features_BD)
    kid, deviation = kernel_distance(torch.cat(kept[False]), torch.cat(kept[True]))
    return {"fid": float(metric.compute()), "kid": kid, "kid_std": deviation}


def training_fid(experiment: Experiment) -> tuple[FidTask, Inception] | None:
    """What `fid.interval` measures during training; None where it is null.

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
    cut = count_cut(experiment, coco, prompts, tell=local_rank() == 0)
    network = Inception(resolve(settings.weights), settings.features, settings.weights_sha256)
    sampling = sampling_of(config.samples)
    drawing = Drawing(model=experiment, coco=coco, prompts=prompts, sampling=sampling, seed=config.seed, cut=cut)
    reference = Reference(coco, network, Path(config.data.cache_dir))
    parts = reference.parts

    def draw(numbers: Sequence[int]) -> Tensor:
        experiment.image.to(experiment.module.device)
        images = decode(experiment, drawing.codes(numbers))
        experiment.image.to(torch.device("cpu"))  # leaves the GPU to training
        return stack_images([square(Image.fromarray(image)) for image in images])

    def features(network: Inception, rank: int, world: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        tell = log_progress("reference", parts.items, rank, world)
        for number in range(rank, len(parts), world):
            parts.complete_one(number, reference.make)
            tell(len(parts.span(number)))
            yield parts.span(number), parts.read(number)["features"]

    def card() -> dict[str, Any]:
        # Content hashes would need all images read before the first step: the listing's names the folder here.
        found = replace(drawing.card(network, ""), reference_sha256=f"listing {parts.identity['listing_sha256']}")
        return {"title": found.title, **found.as_dict()}

    return FidTask(len(prompts), draw, features, card), network
