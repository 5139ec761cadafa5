"""A folder shaped like COCO's val2014, and weights for the feature network: synthetic and random."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

CAPTION = "annotations/captions_val2014.json"
COLOURS = ("red", "green", "blue", "yellow")


def write_coco(path: Path, count: int, width: int = 80, height: int = 64) -> Path:
    """`count` images of random blobs with two captions each."""
    (path / "annotations").mkdir(parents=True)
    (path / "val2014").mkdir()
    draw = np.random.default_rng(count)
    images, annotations = [], []
    for number in range(count):
        name = f"COCO_val2014_{number:012d}.jpg"
        blobs_HWC = draw.integers(0, 256, (4, 4 + number % 3, 3), dtype=np.uint8)
        image = Image.fromarray(blobs_HWC).resize((width, height), Image.Resampling.BILINEAR)
        image.save(path / "val2014" / name, quality=95)
        images.append({"id": number, "file_name": name})
        for which in range(2):
            caption = f"a {COLOURS[number % 4]} circle and {which + 1} squares\n"
            annotations.append({"id": 10 * number + which, "image_id": number, "caption": caption})
    (path / CAPTION).write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


class _Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network without its download."""

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("untrained", ["64"], nothing)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        return None


def write_weights(path: Path) -> Path:
    """Random weights, scaled so that activations stay of ordinary size."""
    torch.manual_seed(0)
    network = _Untrained()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path
