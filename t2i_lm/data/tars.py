"""Captioned images in tar files in the format of webdataset (img2dataset): `000.jpg`, `000.txt`, `000.json`, ...

A sample is the files whose names agree up to the first dot of the base name, folders included, wherever they are in the
archive. Headers are read once; the bytes of a sample are then read in place. Nothing is extracted to disk or unpickled:
images are decoded by Pillow; captions are a text file or a field of a JSON object; other files are counted and ignored.
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from t2i_lm.data.captions import caption_value, captions_of, parse_json
from t2i_lm.data.digests import image_digest
from t2i_lm.data.image_files import MAX_FILE_BYTES, TOO_MUCH
from t2i_lm.data.pairs import Pair, RejectedPairError, decode_image
from t2i_lm.data.splits import files_below, named_below
from t2i_lm.runtime.progress import Advance
from t2i_lm.storage.reading import reason, require_regular

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
TEXTS = (".txt", ".text", ".caption")
OBJECTS = (".json",)
# Larger files are not captions.
MAX_CAPTION_BYTES = 1_000_000
# Nor are headers larger, such as long names.
MAX_HEADER_BYTES = 65_536
# webdataset's rule: key and suffix are divided at the first dot of the base name.
_KEY = re.compile(r"((?:.*/|)[^./]+)(\.[^/]*)$")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class _ForwardMember(tarfile.TarInfo):
    """A member whose header moves forward through the file.

    `tarfile` of Python before 3.11.14 and 3.13.6 goes back by a negative size, and reads a member for ever.
    """

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.HeaderError("a member has a negative size")
        return super()._block(count)  # type: ignore[misc,no-any-return]

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*headers, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"a header has {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


@dataclass
class TarSample:
    """Location of one sample's files.

    Attributes:
        tar: the file.
        key: name of the sample; that of a second archive in the same file starts with its number.
        files: (offset, size) in bytes by suffix.
        repeated: suffixes that occur more than once.
        damage: why the sample is unreadable, if so.
        folder: of the file, with a slash, where those of a source lie in several.
    """

    tar: Path
    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    damage: str | None = None
    folder: str = ""

    @property
    def name(self) -> str:
        """File and key; bytes that are not UTF-8 are escaped."""
        return f"{self.folder}{self.tar.name}:{self.key}".encode("utf-8", "backslashreplace").decode()

    def member(self, kinds: Sequence[str], what: str) -> str | None:
        """The suffix of the only file of some kinds: the whole suffix counts more than its last part.

        Raises:
            RejectedPairError: if there are several.
        """
        whole = [suffix for suffix in self.files if suffix in kinds]
        found = whole or [suffix for suffix in self.files if f".{suffix.rpartition('.')[2]}" in kinds]
        if len(found) > 1:
            raise RejectedPairError(f"several {what}", f"{self.name} ({', '.join(found)})")
        return found[0] if found else None

    def unused(self) -> Iterator[str]:
        """Suffixes that are not read, since another file of their kind has the kind as its whole suffix."""
        for kinds in (IMAGES, TEXTS, OBJECTS):
            if any(suffix in kinds for suffix in self.files):
                yield from (suffix for suffix in self.files if suffix.endswith(kinds) and suffix not in kinds)

    def described(self) -> str:
        """Name and suffixes, for messages."""
        return f"{self.name} (it has {', '.join(self.files) or 'no files'})"


class TarFolder:
    """The samples of tar files, ordered by file name and position of their first files."""

    def __init__(self, samples: Sequence[TarSample], notes: Sequence[str] = ()) -> None:
        self.samples, self.notes = samples, list(notes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        sample = self.samples[index]
        image = _image_member(sample)
        with sample.tar.open("rb") as tar:
            captions = _captions(tar, sample)
            if sample.files[image][1] > MAX_FILE_BYTES:
                raise RejectedPairError(TOO_MUCH, f"{sample.name}{image}")
            content = _read(tar, *sample.files[image])
        return Pair(sample.name, decode_image(io.BytesIO(content), f"{sample.name}{image}"), captions, None)


def _image_member(sample: TarSample) -> str:
    if sample.damage is not None:
        raise RejectedPairError("damaged tar", f"{sample.tar} {sample.damage}")
    if sample.repeated:
        raise RejectedPairError("member occurs twice", f"{sample.name}{sample.repeated[0]}")
    image = sample.member(IMAGES, "images")
    if image is None:
        raise RejectedPairError("no image", sample.described())
    return image


def _read(tar: BinaryIO, offset: int, size: int) -> bytes:
    tar.seek(offset)
    return tar.read(size)


def _captions(tar: BinaryIO, sample: TarSample) -> list[str]:
    """Captions of the text file, or of the JSON object if there is no text or it is blank."""
    written, fields = sample.member(TEXTS, "captions"), sample.member(OBJECTS, "captions")
    if written is None and fields is None:
        raise RejectedPairError("no caption", sample.described())
    if written is not None:
        text = _caption_text(tar, sample, written)
        if text.strip() or fields is None:
            return captions_of(text, f"{sample.name}{written}")
    assert fields is not None
    name = f"{sample.name}{fields}"
    try:
        content = parse_json(_caption_text(tar, sample, fields))
    except ValueError as error:
        raise RejectedPairError("unreadable caption", f"{name} ({error})") from error
    if not isinstance(content, dict):
        raise RejectedPairError("unreadable caption", f"{name} (expected a JSON object, not {str(content)[:40]})")
    return captions_of(caption_value(content, name), name)


def _caption_text(tar: BinaryIO, sample: TarSample, suffix: str) -> str:
    name = f"{sample.name}{suffix}"
    offset, size = sample.files[suffix]
    if size > MAX_CAPTION_BYTES:
        raise RejectedPairError(f"caption over {MAX_CAPTION_BYTES:,} bytes", name)
    try:
        return _read(tar, offset, size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RejectedPairError("unreadable caption", f"{name} (not UTF-8: {error.reason})") from error


@dataclass
class TarScan:
    """The content of one tar file: its samples in order, numbers of ignored files by kind, and notes."""

    samples: list[TarSample] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def scan_tar(path: Path) -> TarScan:
    """The samples of one tar file, of several archives if they were joined; damage is an unreadable last sample.

    Raises:
        ValueError: if it is no tar file, or compressed.
    """
    require_regular(path)
    scan, start, number = TarScan(), 0, 0
    size = path.stat().st_size
    with path.open("rb") as file:
        _require_tar(path, file)
        while True:
            end, damage = _scan_archive(path, file, start, number, scan)
            following = _after_zeros(file, end)
            damage = damage or (f"after byte {end}: no header" if following <= start else None)
            if damage is not None:
                break
            start, number = following, number + 1
            if start >= size:
                return scan
            try:
                tarfile.TarInfo.frombuf(_read(file, start, tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
            except tarfile.TarError:
                scan.notes.append(f"{path}: the last {size - start:,} of {size:,} bytes are no tar and not used")
                return scan
    scan.notes.append(f"{path}: damaged: {damage}; what follows is not read")
    scan.samples.append(TarSample(path, "end", damage=damage))
    return scan


def _require_tar(path: Path, file: BinaryIO) -> None:
    start = _read(file, 0, tarfile.BLOCKSIZE)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is compressed ({name}); samples are read in place: decompress it first")
    if start == bytes(tarfile.BLOCKSIZE):
        return
    try:
        tarfile.TarInfo.frombuf(start, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar file: {error}; it starts with {start[:32]!r}") from error


def _scan_archive(path: Path, file: BinaryIO, start: int, number: int, scan: TarScan) -> tuple[int, str | None]:
    """Adds the samples of the archive that starts at byte `start`; returns its end, and what damages it."""
    found: dict[str, TarSample] = {}
    end, last = start, None
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_ForwardMember) as tar:
            for entry in tar:
                if entry.size < 0:
                    raise tarfile.HeaderError("a member has a negative size")
                end = entry.offset_data + (entry.size if entry.isfile() and not entry.issparse() else 0)
                match = _KEY.match(entry.name.removeprefix("./"))
                if not entry.isreg() or entry.issparse() or match is None:
                    if not entry.isdir():
                        scan.ignored["links or files without a key or suffix"] += 1
                    continue
                key, suffix = match[1], match[2].lower()
                if not suffix.endswith(IMAGES + TEXTS + OBJECTS):
                    scan.ignored[suffix] += 1
                    continue
                last = found.setdefault(key, TarSample(path, f"{number}/{key}" if number else key))
                if suffix in last.files:
                    last.repeated.append(suffix)
                last.files[suffix] = (entry.offset_data, entry.size)
            damage = _damage_after(file, path.stat().st_size, end, tar.offset)
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # `tarfile` raises many types on damaged headers
        damage = f"after byte {end}: {reason(error)}"
    # The sample that was being read when the damage came may be incomplete.
    scan.samples += [sample for sample in found.values() if damage is None or sample is not last]
    return end, damage


def _damage_after(file: BinaryIO, size: int, end: int, following: int) -> str | None:
    """Damage after byte `end`, the end of the last file that was read: there `tarfile` stops without an error.

    An intact archive continues with zeros at byte `following`.
    """
    if size < end:
        return f"ends at byte {size} of {end}"
    if _read(file, following, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        return f"is cut or damaged after byte {end}"
    return None


def _after_zeros(file: BinaryIO, end: int) -> int:
    """The first block from byte `end` on that has other bytes than zero; the end of the file if there is none."""
    position = end
    file.seek(position)
    while content := file.read(1 << 20):
        if left := content.lstrip(b"\0"):
            position += len(content) - len(left)
            return position // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(content)
    return position


def find_tars(folder: Path) -> list[Path]:
    """The tar files of a folder and its subfolders.

    Raises:
        ValueError: if there is none, or one is compressed.
    """
    files = files_below(folder, lambda name: name.lower().endswith((".tar", *_COMPRESSED_SUFFIXES)))
    for file in files:
        if not file.name.lower().endswith(".tar"):
            raise ValueError(f"{file} is compressed; samples are read in place: decompress it first")
    if not files:
        raise ValueError(f"no tar file in {folder} or its subfolders; {named_below(folder)}")
    return files


def open_tars(files: Sequence[Path], notes: Sequence[str] = ()) -> TarFolder:
    """The samples of tar files.

    Raises:
        ValueError: if a file is no tar, or compressed.
    """
    samples, ignored, said = list[TarSample](), Counter[str](), list(notes)
    root = os.path.commonpath([file.parent for file in files])
    for file in files:
        try:
            scan = scan_tar(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
        folder = os.path.relpath(file.parent, root)
        for sample in scan.samples:
            sample.folder = "" if folder == "." else f"{folder}/"
        samples += scan.samples
        ignored += scan.ignored
        for sample in scan.samples:
            ignored.update(sample.unused())
        said += scan.notes
    if ignored:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common(8))
        said.append(f"files in tars that are not read: {listed}")
    return TarFolder(samples, said)


def require_pairs(source: TarFolder, origin: str) -> None:
    """Raises a ValueError if no sample has an image and a caption by the names of its files, which it lists."""
    if any(_kinds(sample) == {"image", "caption"} or sample.damage for sample in source.samples):
        return
    found = Counter(suffix for sample in source.samples for suffix in sample.files)
    listed = ", ".join(f"{count:,} {suffix}" for suffix, count in found.most_common(8))
    raise ValueError(
        f"{origin}: no sample has an image ({', '.join(IMAGES[:4])}, ...) and a caption ({', '.join(TEXTS + OBJECTS)}) "
        f"under one key; files found: {listed or 'none'}" + "".join(f"; {note}" for note in source.notes)
    )


def _kinds(sample: TarSample) -> set[str]:
    return {"image" if suffix.endswith(IMAGES) else "caption" for suffix in sample.files}


def tar_digests(samples: Sequence[TarSample]) -> Callable[[Path, Advance], list[str | None]]:
    """Computes the digests of the images of a tar's samples, in order."""
    of_tar: dict[Path, list[TarSample]] = {}
    for sample in samples:
        of_tar.setdefault(Path(os.path.abspath(sample.tar)), []).append(sample)

    def compute(path: Path, advance: Advance) -> list[str | None]:
        digests: list[str | None] = []
        with path.open("rb") as tar:
            for sample in of_tar.get(path, ()):
                try:
                    offset, size = sample.files[_image_member(sample)]
                    content = _read(tar, offset, size) if size <= MAX_FILE_BYTES else b""
                    digests.append(image_digest(content))
                    advance(len(content))
                except RejectedPairError:
                    digests.append(None)
        return digests

    return compute
