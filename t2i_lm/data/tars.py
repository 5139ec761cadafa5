"""Captioned images in tar files in the format of img2dataset (webdataset): `000.jpg`, `000.txt`, `000.json`, ...

Headers are read once; the bytes of a sample are then read in place. Nothing is extracted to disk or unpickled: images
are decoded by Pillow; captions are a text file, or `caption` or a list `captions` of a JSON object; other files are
ignored.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from t2i_lm.data.pairs import Pair, RejectedPairError, captions_of, decode_image

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (".txt", ".json")
# Larger files are not captions.
MAX_CAPTION_BYTES = 1_000_000


@dataclass
class TarSample:
    """Location of one sample's files: (offset, size) in bytes by suffix; `damage` is why it is unreadable, if so."""

    tar: Path
    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    damage: str | None = None


class TarFolder:
    """The samples of tar files, ordered by file name and position."""

    def __init__(self, samples: list[TarSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        sample = self.samples[index]
        name = f"{sample.tar.name}:{sample.key}"
        if sample.damage is not None:
            raise RejectedPairError("damaged tar", f"{sample.tar} {sample.damage}")
        image = next((suffix for suffix in IMAGES if suffix in sample.files), None)
        if image is None:
            raise RejectedPairError("no image", name)
        with sample.tar.open("rb") as tar:
            captions = captions_of(_caption(tar, sample, name), name)
            return Pair(name, decode_image(io.BytesIO(_read(tar, *sample.files[image])), name), captions, None)


def _read(tar: io.BufferedReader, offset: int, size: int) -> bytes:
    tar.seek(offset)
    return tar.read(size)


def _caption(tar: io.BufferedReader, sample: TarSample, name: str) -> object:
    suffix = next((suffix for suffix in CAPTIONS if suffix in sample.files), None)
    if suffix is None:
        return None
    offset, size = sample.files[suffix]
    if size > MAX_CAPTION_BYTES:
        raise RejectedPairError(f"caption over {MAX_CAPTION_BYTES:,} bytes", name)
    try:
        text = _read(tar, offset, size).decode("utf-8")
        if suffix == ".txt":
            return text
        fields = json.loads(text)
        return fields["captions"] if "captions" in fields else fields["caption"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RejectedPairError("unreadable caption", name) from error


def _damage_after(path: Path, end: int) -> str | None:
    """Damage after byte `end`, the end of the last file that was read: there `tarfile` stops without an error."""
    size = path.stat().st_size
    if size < end:
        return f"ends at byte {size} of {end}"
    block = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with path.open("rb") as tar:
        following = _read(tar, block, tarfile.BLOCKSIZE)
    if following != bytes(tarfile.BLOCKSIZE):  # an intact tar continues with a block of zeros
        return f"is cut or damaged after byte {end}"
    return None


def scan_tar(path: Path) -> Iterator[TarSample]:
    """The samples of one tar, from its headers; damage replaces the last sample by an unreadable one."""
    current: TarSample | None = None
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                file = PurePosixPath(entry.name)
                suffix = file.suffix.lower()
                end = entry.offset_data + entry.size
                if not entry.isfile() or suffix not in IMAGES + CAPTIONS:
                    continue
                key = str(file.with_suffix(""))
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = TarSample(path, key)
                current.files[suffix] = (entry.offset_data, entry.size)
        damage = _damage_after(path, end)
    except tarfile.TarError as error:
        damage = f"after byte {end}: {error}"
    if damage is not None:  # the last sample may be incomplete
        yield TarSample(path, "end", damage=damage)
    elif current is not None:
        yield current


def open_tars(path: Path, key: str = "data.path") -> TarFolder:
    """The samples of a tar file or of the tar files of a folder; `key` is the config key of `path`, for errors.

    Raises:
        ValueError: if there is no tar file.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not tars:
        raise ValueError(f"{key}={path}: no tar file there")
    return TarFolder([sample for tar in tars for sample in scan_tar(tar)])
