"""Measures that require a caption's meaning, for generated scenes: prompt accuracy and caption preference.

Shapes: `B` images, `H`, `W` pixels, `N` image tokens.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.scenes import captions as caption_code
from t2i_lm.data.scenes import checker
from t2i_lm.data.scenes import scene as scene_code
from t2i_lm.data.scenes import space as space_code
from t2i_lm.data.scenes.captions import ATTRIBUTES, altered, caption_nats, describe, picture_nats
from t2i_lm.data.scenes.checker import check, share_error, shares_right
from t2i_lm.data.scenes.scene import scene_of
from t2i_lm.data.scenes.source import SceneSource, paraphrases
from t2i_lm.data.scenes.space import SPLITS, scene_nats
from t2i_lm.data.shards.tokenize import encode_images
from t2i_lm.data.sources import SCENE_SPLITS
from t2i_lm.experiment.build import ImageExperiment
from t2i_lm.generation.images import ImageArray, caption_layout, decode
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.writing import write_atomic
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.layout import IMAGE, modality_of_target

# Sequences per pass for caption preference.
SCORE_BATCH = 50
# Scenes whose reconstructions give the ceiling of prompt accuracy.
CEILING_SCENES = 1000
# Captions whose mean length divides their entropy.
FLOOR_CAPTIONS = 19_200
_caption_lengths: dict[tuple[str, bool], float] = {}  # by tokenizer and data.hold_out_pairs, in this process
# Code that the ceiling depends on besides the tokenizer: another version of it is measured again.
CEILING_CODE = (scene_code, space_code, caption_code, checker)


def text_floor(text: TextTokenizer, hold_out_pairs: bool = True) -> float:
    """Lower bound of the text loss on new training scenes, in nats per text token, for whole captions.

    The entropy of a caption, exactly, over the mean length of `FLOOR_CAPTIONS` (standard error 0.2 %), which are the
    same whatever a run trains on. No bound on compositional scenes, which the training distribution does not hold.

    Args:
        text: the tokenizer of the captions.
        hold_out_pairs: `data.hold_out_pairs` of the run.
    """
    key = (text.sha256, hold_out_pairs)
    if key not in _caption_lengths:
        source = SceneSource(FLOOR_CAPTIONS, SCENE_SPLITS[hold_out_pairs, "train"], seed=0)
        _caption_lengths[key] = sum(len(text.encode(source.caption(one))) for one in range(len(source))) / len(source)
    return caption_nats(_training_space(hold_out_pairs)) / _caption_lengths[key]


def image_floor(image_tokens: int) -> float:
    """Lower bound of the image loss on scenes of any split, in nats per image token, with `image_tokens` in an image.

    The entropy of a picture given its caption, and so of its ids, as long as different pictures have different ids.
    """
    return picture_nats() / image_tokens


def loss_floors(config: ExperimentConfig, text: TextTokenizer, image_tokens: int) -> dict[str, float]:
    """`text_floor_nll` and `image_floor_nll`, as a report names them, on new training scenes.

    Empty for other data, and for captions joined by `data.text_ratio`, which tell more of an image than single ones.
    Without captions (`unconditional`) the floor of the image loss is the entropy of a picture.
    """
    data = config.data
    if data.source != "scenes" or paraphrases(data.text_ratio) > 1:
        return {}
    if config.task == "unconditional":
        return {"image_floor_nll": scene_nats(_training_space(data.hold_out_pairs)) / image_tokens}
    return {"text_floor_nll": text_floor(text, data.hold_out_pairs), "image_floor_nll": image_floor(image_tokens)}


def _training_space(hold_out_pairs: bool) -> str:
    return SPLITS[SCENE_SPLITS[hold_out_pairs, "train"]].space


def prompt_accuracy(images: Sequence[ImageArray], meanings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By attribute: the share of images that match the captions mentioning it, its standard error, their number."""

    def results() -> Iterator[dict[str, bool | None]]:
        for image, meaning in zip(images, meanings, strict=True):
            caption = describe(scene_of(meaning), meaning["style"])
            yield check(image, meaning, caption.mentioned)

    return shares_right(results())


def accuracy_ceiling(experiment: ImageExperiment, split: str) -> dict[str, Any]:
    """`prompt_accuracy` of the image tokenizer's reconstructions of scenes: the upper limit of samples.

    Samples are decoded from the same codes, so no model shows an attribute that the tokenizer blurs. Measured once per
    tokenizer, split and seed of the scenes, and cached in `data.cache_dir`.

    Args:
        experiment: with an image tokenizer of 64 pixels.
        split: `iid`, scenes of trained color-shape pairs, or `compositional`, each with one that training never shows.

    Returns:
        `scenes`, their number, and their `accuracy`.
    """
    data, image = experiment.config.data, experiment.image
    identity = {
        "image_tokenizer_sha256": image.sha256,
        "low_precision": image.low_precision,
        "scenes": CEILING_SCENES,
        "split": split,
        "seed": data.seed,
        "code": [file_sha256(Path(str(module.__file__))) for module in CEILING_CODE],
    }
    file = Path(data.cache_dir) / "ceilings" / f"{image.sha256[:12]}-{CEILING_SCENES}-{split}-seed{data.seed}.json"
    if file.is_file():
        cached: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if cached.pop("identity") == identity:
            return cached
    source = SceneSource(CEILING_SCENES, split, data.seed)
    pairs = [source[index] for index in range(len(source))]
    codes_BN = torch.from_numpy(encode_images(image, [np.asarray(pair.image) for pair in pairs]))
    accuracy = prompt_accuracy(decode(experiment, codes_BN), [pair.meaning or {} for pair in pairs])
    result = {"scenes": len(pairs), "accuracy": accuracy}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({**result, "identity": identity}, indent=2) + "\n")
    return result


def caption_preference(experiment: ImageExperiment, texts: Sequence[Any], image_ids: Any) -> dict[str, Any]:
    """Share of images that are likelier under their own caption than under one with one attribute altered.

    By attribute, over the scenes whose caption mentions it; chance is 0.5. The likelihood is that of the image tokens
    only. A tie counts half, so the binomial standard error `se` is then too large, never too small.

    Args:
        experiment: the model and its tokenizers.
        texts: JSON of each scene's meaning.
        image_ids: of each scene.
    """
    meanings = [json.loads(str(text)) for text in texts]
    if not meanings:
        return {}
    image_ids_BN = np.stack(image_ids)
    scenes = [scene_of(meaning) for meaning in meanings]
    own = [describe(scene, meaning["style"]).text for scene, meaning in zip(scenes, meanings, strict=True)]
    own_nll_B = image_nll(experiment, own, image_ids_BN)
    result: dict[str, Any] = {}
    for attribute in track(ATTRIBUTES, description="caption preference", transient=True):
        members, others = [], []
        for number, (scene, meaning) in enumerate(zip(scenes, meanings, strict=True)):
            other = altered(scene, meaning["style"], attribute, "preference")
            if other is not None:
                members.append(number)
                others.append(other)
        if members:
            true_B, other_B = own_nll_B[members], image_nll(experiment, others, image_ids_BN[members])
            wins = (true_B < other_B).double() + 0.5 * (true_B == other_B).double()
            preferred, of = float(wins.mean()), len(members)
            result[attribute] = {"preferred": preferred, "se": share_error(preferred, of), "of": of}
    return result


@torch.no_grad()
def image_nll(experiment: ImageExperiment, captions: list[str], image_ids_BN: Any) -> Tensor:
    """Summed nll (B,), in nats, of the image tokens of each image under its caption.

    Captions of similar length are computed together, and no position behind the last image token.
    """
    layout, text = caption_layout(experiment)
    decoder, backend = experiment.module.decoder, experiment.module.loss_backend
    text_ids = [np.array(text.encode(caption), dtype=np.int64) for caption in captions]
    order = sorted(range(len(captions)), key=lambda number: len(text_ids[number]))
    nll_B = torch.empty(len(captions), dtype=torch.float64)
    for start in range(0, len(captions), SCORE_BATCH):
        members = order[start : start + SCORE_BATCH]
        ids_BT = layout.pack([text_ids[number] for number in members], image_ids_BN[members])
        image_BT = modality_of_target(ids_BT[:, 1:], layout.vocab) == IMAGE
        end = int(image_BT.any(dim=0).nonzero().max()) + 1
        ids_BT, image_BT = (
            part_BT.to(experiment.module.device) for part_BT in (ids_BT[:, : end + 1], image_BT[:, :end])
        )
        index = decoder.target_index(image_BT)
        with torch.compiler.set_stance("force_eager"):  # blocks would be compiled again for the length of each batch
            nll_N = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:], index, backend=backend).nll_N
        nll_B[members] = nll_N.view(len(members), layout.image_tokens).double().sum(dim=1).cpu()
    return nll_B
