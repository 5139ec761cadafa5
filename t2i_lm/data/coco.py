"""COCO val2014: the protocol's choice of captions and preprocessing of images.

Files: `PATH/annotations/captions_val2014.json` and `PATH/val2014/*.jpg`. Heavy imports are local, so that a wrong
folder is reported before torch is loaded. Shapes: `H`, `W` pixels.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.reading import reading, require_regular

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

CAPTIONS, IMAGES = Path("annotations", "captions_val2014.json"), "val2014"
SIZE, CROP, RESIZER = 256, "centre", "lanczos"


@dataclass(frozen=True)
class Prompt:
    """A caption and the image that it describes."""

    image_id: int
    caption_id: int
    text: str
    file: str


@dataclass(frozen=True)
class Coco:
    """Contents of a val2014 folder.

    Attributes:
        images: file names in the folder, sorted.
        captions: (caption id, text) pairs by image id.
        files: file name by image id.
    """

    path: Path
    images: list[str]
    captions: dict[int, list[tuple[int, str]]]
    files: dict[int, str]
    captions_sha256: str

    @property
    def caption_count(self) -> int:
        return sum(len(texts) for texts in self.captions.values())


def read_coco(path: Path) -> Coco:
    """Reads the captions and lists the images.

    Raises:
        ValueError: if a file or folder is missing or not in COCO's format.
    """
    file, folder = path / CAPTIONS, path / IMAGES
    if not file.is_file() or not folder.is_dir():
        missing = folder if file.is_file() else file
        raise ValueError(f"--coco {path}: expected {CAPTIONS} and {IMAGES}/*.jpg in it, found no {missing}")
    images = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".jpg")
    if not images:
        raise ValueError(f"--coco {path}: {folder} holds no .jpg")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        files = {int(image["id"]): image["file_name"] for image in content["images"]}
        if other := [name for name in files.values() if not isinstance(name, str)]:
            raise TypeError(f"file_name {other[0]} is of type {type(other[0]).__name__}, not a string")
        captions: dict[int, list[tuple[int, str]]] = {}
        for row in content["annotations"]:
            if not isinstance(row["caption"], str):
                raise TypeError(f"caption {row['id']} is of type {type(row['caption']).__name__}, not a string")
            captions.setdefault(int(row["image_id"]), []).append((int(row["id"]), row["caption"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is not a COCO caption file: {type(error).__name__} {error}") from error
    return Coco(path, images, captions, files, file_sha256(file))


def choose_prompts(coco: Coco, count: int, seed: int) -> list[Prompt]:
    """One caption for each of `count` images, in the order of a hash of seed and id.

    The choice is the same on every machine and version, and a smaller `count` gives a prefix of a larger one.

    Raises:
        ValueError: if there are fewer images with captions, a caption is empty, or its image is missing.
    """
    file = coco.path / CAPTIONS
    if count > len(coco.captions):
        raise ValueError(f"--prompts {count}: {file} has captions of {len(coco.captions)} images")
    chosen, present = [], set(coco.images)
    for image_id in sorted(coco.captions, key=lambda number: _order(seed, "picture", number))[:count]:
        caption_id, text = min(coco.captions[image_id], key=lambda caption: _order(seed, "caption", caption[0]))
        text = " ".join(text.split())  # some captions end in a line break
        if not text:
            raise ValueError(f"{file}: caption {caption_id} of image {image_id} is empty")
        name = coco.files.get(image_id, "")
        if name not in present:
            raise ValueError(f"{file}: image {image_id} ({name or 'no file name'}) is not in {coco.path / IMAGES}")
        chosen.append(Prompt(image_id, caption_id, text, name))
    return chosen


def _order(seed: int, kind: str, number: int) -> bytes:
    # `kind` is "picture" or "caption": part of the hash, and so of the protocol.
    return hashlib.sha256(f"{seed}/{kind}/{number}".encode()).digest()


def prompts_sha256(prompts: Iterable[Prompt]) -> str:
    """Hash of the ids and texts of a prompt list, in order."""
    rows = [[prompt.image_id, prompt.caption_id, prompt.text] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def listing_sha256(coco: Coco) -> str:
    """Hash of image names and file sizes, which identifies a folder without reading its 6 GB."""
    folder = coco.path / IMAGES
    rows = [f"{name}\0{(folder / name).stat().st_size}" for name in coco.images]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def square(image: "Image.Image", size: int = SIZE) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The protocol's preprocessing: center crop to the shorter side, then LANCZOS to `size`; (H, W, 3) uint8.

    Applied to generated and reference images alike; an image that already has this size is unchanged.
    """
    import numpy as np
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    if side != size:
        cropped = cropped.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(cropped, dtype=np.uint8)


def read_images(coco: Coco, names: Sequence[str]) -> "tuple[list[Image.Image], list[bytes]]":
    """Images of val2014 in RGB, and the sha256 of each file.

    Raises:
        ValueError: if a file cannot be read.
    """
    import io

    from t2i_lm.data.pairs import RejectedPairError, decode_image

    images, digests = [], []
    for name in names:
        file = coco.path / IMAGES / name
        with reading("COCO", file):
            require_regular(file)
            content = file.read_bytes()
        digests.append(hashlib.sha256(content).digest())
        try:
            images.append(decode_image(io.BytesIO(content), name))
        except RejectedPairError as error:
            raise ValueError(f"{file}: {error.reason}") from error
    return images, digests
