"""What only generated scenes allow: is the picture what was asked, and does the model know its caption?

Shapes: `B` pictures, `N` image tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from t2i_lm.build import Experiment
from t2i_lm.data.captions import ATTRIBUTES, altered, describe
from t2i_lm.data.scene_checker import check
from t2i_lm.data.scenes import draw_scene, render, scene_from_meaning
from t2i_lm.data.tokenise import ENCODE_BATCH, stack_pictures
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.sequence import IMAGE, Layout, modality_of_target

# Sequences scored at once for caption preference.
SCORE_BATCH = 50


@dataclass(frozen=True)
class Scenes:
    """Captioned scenes: what they mean, and the ids of their pictures."""

    captions: list[str]
    meanings: list[dict[str, Any]]
    image_ids_BN: Any


def familiar_scenes(experiment: Experiment, size: int) -> Scenes:
    """New scenes of the colour-kind pairs that training shows; none equals a training scene.

    Validation scenes hold at least one pair that training never shows. These tell what is learnt of the training
    distribution, those what is composed.
    """
    data, image = experiment.config.data, experiment.image
    assert image is not None
    known = {draw_scene(data.seed, "train", index) for index in range(data.train_size or 0)}
    captions: list[str] = []
    meanings: list[dict[str, Any]] = []
    ids: list[Any] = []
    pictures: list[Any] = []
    for index in count(data.train_size or 0):
        if len(captions) == size:
            break
        scene, style = draw_scene(data.seed, "train", index), f"{data.seed}/train/{index}"
        if scene in known:
            continue
        captions.append(describe(scene, style).text)
        meanings.append(scene.meaning() | {"style": style})
        pictures.append(np.asarray(render(scene, image.image_size)))
    for start in range(0, len(pictures), ENCODE_BATCH):
        ids.append(image.encode(stack_pictures(pictures[start : start + ENCODE_BATCH])).cpu().numpy())
    return Scenes(captions, meanings, np.concatenate(ids) if ids else np.empty((0, 0), dtype=np.int64))


def prompt_accuracy(
    images: list[np.ndarray[Any, np.dtype[np.uint8]]], meanings: list[dict[str, Any]]
) -> dict[str, Any]:
    """Share of pictures right in each attribute that their caption asks for, and how many it asked."""
    right: dict[str, list[bool]] = {}
    for picture, meaning in zip(images, meanings, strict=True):
        caption = describe(scene_from_meaning(_scene_part(meaning)), meaning["style"])
        for name, value in check(picture, meaning, caption.mentioned).items():
            if value is not None:
                right.setdefault(name, []).append(value)
    return {name: {"right": sum(values) / len(values), "of": len(values)} for name, values in right.items()}


def caption_preference(experiment: Experiment, texts: Sequence[Any], image_ids: Any) -> dict[str, Any]:
    """How often a picture is likelier under its own caption than under one with one attribute altered.

    Over scenes given by the JSON of their meaning and their image ids, each attribute where the caption mentions
    it; chance is 0.5. The picture's likelihood is that of its image tokens alone.
    """
    meanings = [json.loads(str(text)) for text in texts]
    if not meanings:
        return {}
    image_ids_BN = np.stack(image_ids)
    described = [scene_from_meaning(_scene_part(meaning)) for meaning in meanings]
    own = [describe(scene, meaning["style"]).text for scene, meaning in zip(described, meanings, strict=True)]
    own_nll_B = picture_nll(experiment, own, image_ids_BN)
    result: dict[str, Any] = {}
    for attribute in track(ATTRIBUTES, description="caption preference", transient=True):
        members, others = [], []
        for number, (scene, meaning) in enumerate(zip(described, meanings, strict=True)):
            both = altered(scene, meaning["style"], attribute, "preference")
            if both is not None:
                members.append(number)
                others.append(both[1])
        if members:
            true_B, other_B = own_nll_B[members], picture_nll(experiment, others, image_ids_BN[members])
            # A tie counts half.
            wins = (true_B < other_B).double() + 0.5 * (true_B == other_B).double()
            result[attribute] = {"preferred": float(wins.mean()), "of": len(members)}
    return result


@torch.no_grad()
def picture_nll(experiment: Experiment, captions: list[str], image_ids_BN: Any) -> Tensor:
    """Summed nll (B,) in nats of each picture's image tokens under a caption."""
    layout, text = experiment.layout, experiment.text
    assert isinstance(layout, Layout)
    assert text is not None
    assert isinstance(experiment.module, TextToImageModule)
    totals = []
    for start in range(0, len(captions), SCORE_BATCH):
        batch = slice(start, start + SCORE_BATCH)
        text_ids = [np.array(text.encode(caption), dtype=np.int64) for caption in captions[batch]]
        ids_BT = layout.pack(text_ids, image_ids_BN[batch]).to(experiment.module.device)
        target_BT = ids_BT[:, 1:]
        image_BT = modality_of_target(target_BT, layout.vocab) == IMAGE
        nll_N = experiment.module.decoder(ids_BT[:, :-1], target_BT, image_BT).nll_N
        totals.append(nll_N.view(len(text_ids), layout.image_tokens).double().sum(dim=1).cpu())
    return torch.cat(totals)


def _scene_part(meaning: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meaning.items() if key != "style"}
