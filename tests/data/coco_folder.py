"""Synthetic COCO val2014 folders, and random weights of the feature network."""

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
COLORS = ("red", "green", "blue", "yellow")


def write_coco(path: Path, count: int, width: int = 80, height: int = 64) -> Path:
    """Writes `count` images of random blobs with two captions each."""
    (path / "annotations").mkdir(parents=True)
    (path / "val2014").mkdir()
    rng = np.random.default_rng(count)
    images, annotations = [], []
    for number in range(count):
        name = f"COCO_val2014_{number:012d}.jpg"
        blobs_HWC = rng.integers(0, 256, (4, 4 + number % 3, 3), dtype=np.uint8)
        image = Image.fromarray(blobs_HWC).resize((width, height), Image.Resampling.BILINEAR)
        image.save(path / "val2014" / name, quality=95)
        images.append({"id": number, "file_name": name})
        for which in range(2):
            caption = f"a {COLORS[number % 4]} circle and {which + 1} squares\n"
            annotations.append({"id": 10 * number + which, "image_id": number, "caption": caption})
    (path / CAPTION).write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


class _Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network without its download."""

    def __init__(self) -> None:
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__("untrained", ["64"], empty)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        return None


def write_weights(path: Path) -> Path:
    """Writes random weights, scaled so that activations have ordinary magnitudes."""
    torch.manual_seed(0)
    network = _Untrained()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path
