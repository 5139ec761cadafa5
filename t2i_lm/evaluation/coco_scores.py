"""Measurement of `evaluate --coco`: every rank's part files, then one result with its card, CLIP scores, and a grid.

Shapes: `B` images, `N` image tokens; of CLIP scores `N` images.
"""

import argparse
import time
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from callbacks import Inception
from t2i_lm.assets import resolve
from t2i_lm.data.coco import CROP, RESIZER, SIZE, Coco, Prompt, prompts_sha256, square
from t2i_lm.data.shards.tokenize import stack_images
from t2i_lm.evaluation.base import EvaluationContext
from t2i_lm.evaluation.clip_score import Clip
from t2i_lm.evaluation.fid import PromptSet, Reference, count_cut, distances, network_card
from t2i_lm.evaluation.protocol_card import CANONICAL, Card, require_headline
from t2i_lm.generation.grid import captioned_grid
from t2i_lm.generation.images import chosen_sampling, decode, numerics, prepare_generation
from t2i_lm.runtime.progress import log_progress
from t2i_lm.storage.resumable import ResumableParts
from t2i_lm.storage.run_folder import environment
from t2i_lm.storage.writing import atomic_file

# Images in the grid.
GRID = 16
GRID_FILE, IMAGES_FOLDER = "grid.png", "pictures"


def measure_coco(
    context: EvaluationContext, options: argparse.Namespace, coco: Coco, prompts: list[Prompt]
) -> dict[str, Any] | None:
    """FID, KID and where requested CLIP score of generated images and, unless left out, reconstructions; on rank 0.

    Raises:
        ValueError: if the model takes no captions, a file cannot be read or has another hash, the folder belongs to
            another evaluation, or `--canonical` is given and the card is not that of `COCO FID-30k`.
    """
    model, share, first_rank = context.model, (context.rank, context.world), context.rank == 0
    prepare_generation(model, bf16=options.bf16, compiled=options.compile, images=len(prompts))
    cut = count_cut(model, coco, prompts, log=first_rank)
    sampling = chosen_sampling(model, guidance=options.guidance, log=first_rank)
    network = Inception(resolve(options.weights, "--weights"), options.features, options.weights_sha256)
    clip = None if options.clip is None else Clip(options.clip)
    prompt_set = PromptSet(model=model, coco=coco, prompts=prompts, sampling=sampling, seed=options.seed, cut=cut)
    if options.canonical:
        require_headline(prompt_set.card(network, "0" * 64))
    device = next(model.module.parameters()).device
    network.to(device)
    reference = Reference(coco, network, options.cache)
    generated = _feature_parts(context, prompt_set, network, "drawn", options.part)
    rebuilt = None if options.no_floor else _feature_parts(context, prompt_set, network, "reconstructed", options.part)
    images = [parts for parts in (generated, rebuilt) if parts is not None]
    scores: dict[str, ResumableParts] = {}
    if clip is not None:
        clip.to(device)
        scores = {parts.folder.name: _score_parts(parts, clip) for parts in images}

    reference.parts.complete(reference.make, *share, log_progress("reference", len(coco.images), *share))
    if rebuilt is not None:
        advance = log_progress("reconstruction", len(prompts), *share)
        rebuilt.complete(partial(prompt_set.reconstruct, network=network), *share, advance)
    advance = log_progress("sampling", len(prompts), *share)
    generated.complete(partial(prompt_set.make, network=network), *share, advance)
    for parts in images:
        if clip is not None:
            advance = log_progress(f"CLIP score, {parts.folder.name}", len(prompts), *share)
            scores[parts.folder.name].complete(partial(_score, prompt_set, parts, clip), *share, advance)
    context.wait()
    if not first_rank:
        return None

    reference_sha256 = reference.sha256()
    result: dict[str, Any] = {
        "run": context.run.name,
        "checkpoint": context.checkpoint.name,
        "checkpoint_sha256": context.checkpoint_sha256,
        **_distances(prompt_set.card(network, reference_sha256), generated, reference),
        **_clip_score(scores.get("drawn"), clip),
        "environment": environment(finished=time.strftime("%Y-%m-%dT%H:%M:%S")),
    }
    if rebuilt is not None:
        card = prompt_set.card(network, reference_sha256, "reconstructed")
        result["floor"] = _distances(card, rebuilt, reference) | _clip_score(scores.get("reconstructed"), clip)
    _write_images(context, prompt_set, generated, every=options.images)
    _print(result)
    return result


def _feature_parts(
    context: EvaluationContext, prompt_set: PromptSet, network: Inception, kind: str, size: int
) -> ResumableParts:
    """Part files of the features of `drawn` or `reconstructed` images."""
    model = context.model
    identity = {
        "pictures": kind,
        "prompts_sha256": prompts_sha256(prompt_set.prompts),
        "image_tokenizer_sha256": model.image.sha256,
        "crop": CROP,
        "resizer": RESIZER,
        "size": SIZE,
        **network_card(network),
    }
    if kind == "drawn":
        identity |= {"checkpoint_sha256": context.checkpoint_sha256, "seed": prompt_set.seed}
        identity |= vars(prompt_set.sampling)
        identity |= {key: value for key, value in numerics(model).items() if value != CANONICAL[key]}
    return ResumableParts(context.out / kind, identity, len(prompt_set.prompts), size)


def _score_parts(images: ResumableParts, clip: Clip) -> ResumableParts:
    """Part files of CLIP scores: one for each part of the images, made by the same rank."""
    folder = images.folder.with_name(f"{images.folder.name}-clip")
    return ResumableParts(folder, {**images.identity, **clip.card}, images.items, images.size)


def _score(prompt_set: PromptSet, parts: ResumableParts, clip: Clip, span: range) -> dict[str, Tensor]:
    """CLIP scores of one part's images, as the Inception network gets them, with their prompts."""
    codes_BN = parts.read(span.start // parts.size)["codes"].long()
    images = [square(Image.fromarray(image)) for image in decode(prompt_set.model, codes_BN)]
    return {"scores": clip(stack_images(images), [prompt_set.prompts[number].text for number in span])}


def _clip_score(scores: ResumableParts | None, clip: Clip | None) -> dict[str, Any]:
    """Mean CLIP score, never below 0, with its standard error and the model that computed it."""
    if scores is None or clip is None:
        return {}
    scores_N = torch.cat([scores.read(number)["scores"] for number in range(len(scores))]).double()
    error = float(scores_N.std() / len(scores_N) ** 0.5)
    return {"clip": {"score": max(0.0, float(scores_N.mean())), "se": error, "n": len(scores_N), **clip.card}}


def _distances(card: Card, parts: ResumableParts, reference: Reference) -> dict[str, Any]:
    """Distances to the reference with the card that they hold under."""
    values = distances(parts, reference.parts, reference.network.width)
    return {"title": card.title, **values, "differs": card.differences(), "card": card.as_dict()}


def _write_images(context: EvaluationContext, prompt_set: PromptSet, parts: ResumableParts, every: bool) -> None:
    """Writes a captioned grid of the first images and, with `every`, all of them as the metric gets them."""
    shown = min(GRID, parts.items)
    first_BN = torch.cat([parts.read(number)["codes"] for number in range(-(-shown // parts.size))])[:shown]
    captions = [prompt.text for prompt in prompt_set.prompts[:shown]]
    grid = captioned_grid(decode(context.model, first_BN.long()), captions)
    with atomic_file(context.out / GRID_FILE) as file:
        grid.save(file)
    if not every:
        return
    folder = context.out / IMAGES_FOLDER
    folder.mkdir(exist_ok=True)
    for number in range(len(parts)):
        images = decode(context.model, parts.read(number)["codes"].long())
        for index, image in zip(parts.span(number), images, strict=True):
            name = f"{index:05d}-{prompt_set.prompts[index].caption_id}.png"
            with atomic_file(folder / name) as file:
                Image.fromarray(square(Image.fromarray(image))).save(file)


def _print(result: dict[str, Any]) -> None:
    """Prints the numbers under the title that their card allows, and the fields that are not canonical."""
    for entry in (result, result.get("floor")):
        if entry is not None:
            print(f"{entry['title']}: {entry['fid']:.4f}; KID {entry['kid']:.6f} +- {entry['kid_std']:.6f}")
            if "clip" in entry:
                clip = entry["clip"]
                print(f"  CLIP score {clip['score']:.4f} +- {clip['se']:.4f} ({clip['clip_model']})")
    for line in result["differs"]:
        print(f"  {line}")
