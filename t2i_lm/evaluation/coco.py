"""The COCO measurement of `evaluate`: every rank's parts, then one number with its card, CLIP scores, and a grid.

Shapes: `B` images, `N` image tokens; of the scores `N` images.
"""

import sys
import time
from dataclasses import replace
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
from t2i_lm.evaluation.fid import Drawing, Reference, count_cut, distances, network_card
from t2i_lm.evaluation.protocol_card import CANONICAL, Card, require_headline
from t2i_lm.generation.grid import captioned_grid
from t2i_lm.generation.images import computing, decode, sampling_of
from t2i_lm.runtime.progress import log_progress
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.resumable import ResumableParts
from t2i_lm.storage.run_folder import environment

GRID = 16  # images shown
GRID_FILE, IMAGES_FOLDER = "grid.png", "pictures"


def measure_coco(subject: EvaluationContext, coco: Coco, prompts: list[Prompt]) -> dict[str, Any] | None:
    """FID, KID and where asked for CLIP score of drawn images and, unless left out, reconstructions; on rank 0.

    Raises:
        ValueError: if the model takes no captions, a file cannot be read or has another hash, the folder belongs to
            another evaluation, or only `COCO FID-30k` was wanted and this is not.
    """
    options, model = subject.options, subject.model
    cut = count_cut(model, coco, prompts, tell=subject.rank == 0)
    sampling = sampling_of(model.config.samples)
    if options.guidance is not None:
        sampling = replace(sampling, guidance=options.guidance)
    if sampling.guidance != 1 and not model.config.data.caption_dropout and subject.rank == 0:
        print("note: this run was trained with data.caption_dropout=0: it knows no empty caption", file=sys.stderr)
    network = Inception(resolve(options.weights), options.features, options.weights_sha256)
    clip = None if options.clip is None else Clip(options.clip)
    drawing = Drawing(model=model, coco=coco, prompts=prompts, sampling=sampling, seed=options.seed, cut=cut)
    if options.canonical:
        require_headline(drawing.card(network, "0" * 64))
    device = next(model.module.parameters()).device
    network.to(device)
    reference = Reference(coco, network, options.cache)
    drawn = _parts(subject, drawing, network, "drawn")
    rebuilt = None if options.no_floor else _parts(subject, drawing, network, "reconstructed")
    scored: dict[str, ResumableParts] = {}
    if clip is not None:
        clip.to(device)
        scored = {parts.folder.name: _scores(parts, clip) for parts in (drawn, rebuilt) if parts is not None}

    share = (subject.rank, subject.world)
    whole = len(coco.images)
    reference.parts.complete(reference.make, *share, log_progress("reference", whole, *share))
    if rebuilt is not None:
        told = log_progress("reconstruction", len(prompts), *share)
        rebuilt.complete(lambda span: drawing.reconstruct(span, network), *share, told)
    drawn.complete(lambda span: drawing.make(span, network), *share, log_progress("drawing", len(prompts), *share))
    for parts in (drawn, rebuilt):
        if clip is not None and parts is not None:
            told = log_progress(f"CLIP score, {parts.folder.name}", len(prompts), *share)
            scored[parts.folder.name].complete(partial(_score, drawing, parts, clip), *share, told)
    subject.wait()
    if subject.rank:
        return None

    reference_sha256 = reference.sha256()
    result: dict[str, Any] = {
        "run": subject.run.name,
        "checkpoint": subject.checkpoint.name,
        "checkpoint_sha256": drawn.identity["checkpoint_sha256"],
        **_number(drawing.card(network, reference_sha256), drawn, reference),
        **_clip_number(scored.get("drawn"), clip),
        "environment": environment(finished=time.strftime("%Y-%m-%dT%H:%M:%S")),
    }
    if rebuilt is not None:
        card = drawing.card(network, reference_sha256, "reconstructed")
        result["floor"] = _number(card, rebuilt, reference) | _clip_number(scored.get("reconstructed"), clip)
    _write_images(subject, drawing, drawn)
    _say(result)
    return result


def _parts(subject: EvaluationContext, drawing: Drawing, network: Inception, kind: str) -> ResumableParts:
    """Where the features of drawn or reconstructed images lie."""
    model, options = subject.model, subject.options
    assert model.image is not None
    identity = {
        "pictures": kind,
        "prompts_sha256": prompts_sha256(drawing.prompts),
        "image_tokenizer_sha256": model.image.sha256,
        "crop": CROP,
        "resizer": RESIZER,
        "size": SIZE,
        **network_card(network),
    }
    if kind == "drawn":
        identity |= {"checkpoint_sha256": file_sha256(subject.checkpoint), "seed": drawing.seed}
        identity |= vars(drawing.sampling)
        identity |= {key: value for key, value in computing(model).items() if value != CANONICAL[key]}
    return ResumableParts(subject.out / kind, identity, len(drawing.prompts), options.part)


def _scores(measured: ResumableParts, clip: Clip) -> ResumableParts:
    """Where the CLIP scores of measured images lie: a part for each of theirs, made by the same rank."""
    folder = measured.folder.with_name(f"{measured.folder.name}-clip")
    return ResumableParts(folder, {**measured.identity, **clip.card}, measured.items, measured.size)


def _score(drawing: Drawing, measured: ResumableParts, clip: Clip, span: range) -> dict[str, Tensor]:
    """Scores of one part's images, as FID sees them, with their prompts."""
    codes_BN = measured.read(span.start // measured.size)["codes"].long()
    images = [square(Image.fromarray(image)) for image in decode(drawing.model, codes_BN)]
    return {"scores": clip(stack_images(images), [drawing.prompts[number].text for number in span])}


def _clip_number(scored: ResumableParts | None, clip: Clip | None) -> dict[str, Any]:
    """Mean CLIP score, never below 0, with its standard error and the model that gave it."""
    if scored is None or clip is None:
        return {}
    scores_N = torch.cat([scored.read(number)["scores"] for number in range(len(scored))]).double()
    error = float(scores_N.std() / len(scores_N) ** 0.5)
    return {"clip": {"score": max(0.0, float(scores_N.mean())), "se": error, "n": len(scores_N), **clip.card}}


def _number(card: Card, measured: ResumableParts, reference: Reference) -> dict[str, Any]:
    """Distances with the card that they hold under."""
    found = distances(measured, reference.parts, reference.network.width)
    return {"title": card.title, **found, "differs": card.differences(), "card": card.as_dict()}


def _write_images(subject: EvaluationContext, drawing: Drawing, drawn: ResumableParts) -> None:
    """A captioned grid of the first images and, where asked for, all of them as the metric sees them."""
    shown = min(GRID, drawn.items)
    first_BN = torch.cat([drawn.read(number)["codes"] for number in range(-(-shown // drawn.size))])[:shown]
    captions = [prompt.text for prompt in drawing.prompts[:shown]]
    captioned_grid(decode(subject.model, first_BN.long()), captions).save(subject.out / GRID_FILE)
    if not subject.options.pictures:
        return
    folder = subject.out / IMAGES_FOLDER
    folder.mkdir(exist_ok=True)
    for number in range(len(drawn)):
        images = decode(subject.model, drawn.read(number)["codes"].long())
        for index, image in zip(drawn.span(number), images, strict=True):
            name = f"{index:05d}-{drawing.prompts[index].caption_id}.png"
            Image.fromarray(square(Image.fromarray(image))).save(folder / name)


def _say(result: dict[str, Any]) -> None:
    """The numbers, and what they may not be called."""
    for entry in (result, result.get("floor")):
        if entry is not None:
            print(f"{entry['title']}: {entry['fid']:.4f}; KID {entry['kid']:.6f} +- {entry['kid_std']:.6f}")
            if "clip" in entry:
                clip = entry["clip"]
                print(f"  CLIP score {clip['score']:.4f} +- {clip['se']:.4f} ({clip['clip_model']})")
    for line in result["differs"]:
        print(f"  {line}")
