"""Captioned images in tar files as img2dataset writes them (webdataset): `000.jpg`, `000.txt`, `000.json`, ...

Headers are read once; a sample's bytes are then read in place. Nothing is extracted to disk and nothing is unpickled:
images go to Pillow; captions are text, or `caption` or a list `captions` of a JSON object; others are passed over.
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
# Larger captions are taken for something else.
MAX_CAPTION_BYTES = 1_000_000


@dataclass
class Member:
    """Where the files of one sample lie: (offset, size) in bytes by suffix; `damage` tells why it cannot be read."""

    tar: Path
    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    damage: str | None = None


class TarFolder:
    """The samples of tar files, in the order of their names and places."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Pair:
        member = self.members[index]
        name = f"{member.tar.name}:{member.key}"
        if member.damage is not None:
            raise RejectedPairError("damaged tar", f"{member.tar} {member.damage}")
        image = next((suffix for suffix in IMAGES if suffix in member.files), None)
        if image is None:
            raise RejectedPairError("no image", name)
        with member.tar.open("rb") as tar:
            captions = captions_of(_caption(tar, member, name), name)
            return Pair(name, decode_image(io.BytesIO(_read(tar, *member.files[image])), name), captions, None)


def _read(tar: io.BufferedReader, offset: int, size: int) -> bytes:
    tar.seek(offset)
    return tar.read(size)


def _caption(tar: io.BufferedReader, member: Member, name: str) -> object:
    suffix = next((suffix for suffix in CAPTIONS if suffix in member.files), None)
    if suffix is None:
        return None
    offset, size = member.files[suffix]
    if size > MAX_CAPTION_BYTES:
        raise RejectedPairError(f"caption over {MAX_CAPTION_BYTES:,} bytes", name)
    try:
        text = _read(tar, offset, size).decode("utf-8")
        if suffix == ".txt":
            return text
        found = json.loads(text)
        return found["captions"] if "captions" in found else found["caption"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RejectedPairError("unreadable caption", name) from error


def _damage_after(path: Path, end: int) -> str | None:
    """What is wrong behind the last member that was read, which ends at byte `end`; tarfile itself just stops."""
    size = path.stat().st_size
    if size < end:
        return f"ends at byte {size} of {end}"
    block = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with path.open("rb") as tar:
        following = _read(tar, block, tarfile.BLOCKSIZE)
    if following != bytes(tarfile.BLOCKSIZE):  # a whole tar goes on with a block of zeros
        return f"is cut or damaged after byte {end}"
    return None


def scan(path: Path) -> Iterator[Member]:
    """The samples of one tar, by its headers; a damaged end is one more, unreadable member."""
    current: Member | None = None
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
                    current = Member(path, key)
                current.files[suffix] = (entry.offset_data, entry.size)
        damage = _damage_after(path, end)
    except tarfile.TarError as error:
        damage = f"after byte {end}: {error}"
    if current is not None and damage is None:
        yield current
    if damage is not None:  # its last sample is in doubt
        yield Member(path, "end", damage=damage)


def open_tars(path: Path, key: str = "data.path") -> TarFolder:
    """A tar file, or the tar files of a folder; `key` gave the path, for errors.

    Raises:
        ValueError: if there is none.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not tars:
        raise ValueError(f"{key}={path}: no tar file there")
    return TarFolder([member for tar in tars for member in scan(tar)])
