"""Writers of hostile files: each takes a folder and returns what is to be read."""

import base64
import io
import json
import os
import random
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from t2i_lm.config.image_tokenizer import VQModelConfig


def written(name: str, content: bytes | str) -> Callable[[Path], Path]:
    """A writer of one file of a given content."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def fifo(name: str, whole: bool = False) -> Callable[[Path], Path]:
    """A FIFO; with `whole`, the folder that holds it is read."""

    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder if whole else folder / name

    return make


def link(name: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def unix_socket(folder: Path) -> Path:
    here = os.getcwd()
    os.chdir(folder)
    socket.socket(socket.AF_UNIX).bind("x.jpg")
    os.chdir(here)
    return folder / "x.jpg"


def picture(kind: str, size: tuple[int, int] = (48, 40), mode: str = "RGB", **options: Any) -> bytes:
    draw = np.random.default_rng(0)
    small = size[0] * size[1] < 10_000
    image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), np.uint8)) if small else Image.new(mode, size)
    file = io.BytesIO()
    (image.convert(mode) if image.mode != mode else image).save(file, kind, **options)
    return file.getvalue()


def large(kind: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> Callable[[Path], Path]:
    return lambda folder: written(f"x.{kind.lower()}", picture(kind, size, mode, **options))(folder)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch PLANTED) (w) file\nshowpage\n"


def members(*files: tuple[str, bytes]) -> bytes:
    """A tar without its end."""
    file = io.BytesIO()
    tar = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115
    for name, content in files:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def tar_of(*files: tuple[str, bytes]) -> bytes:
    return members(*files) + END


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header whose size may be negative."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    signed = size.to_bytes(12, "big", signed=True)
    block[124:136] = signed if size < 0 else b"\x80" + signed[1:]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


PAIR = tuple(
    member
    for number in range(3)
    for member in ((f"{number}.jpg", picture("JPEG", (40 + number, 40))), (f"{number}.txt", b"a cat"))
)
END = bytes(10240)
PAX = header("x", 512, tarfile.XHDTYPE) + b"9 a=bbbb\n".ljust(512, b"\0")


def metadata(*odd: bytes, name: str = "metadata.jsonl", image: str = "0.png") -> Callable[[Path], Path]:
    """A folder of two images whose metadata has odd lines."""

    def make(folder: Path) -> Path:
        for number in range(2):
            (folder / f"{number}.png").write_bytes(picture("PNG", (20 + number, 20)))
        lines = [json.dumps({"file_name": f"{number}.png", "caption": "a"}).encode() for number in range(2)]
        (folder / name).write_bytes(b"\n".join([lines[0], *odd, lines[1]]))
        return folder

    return make


def table(rows: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), file)
    return file.getvalue()


def cells(first_path: str | None = None) -> dict[str, list[Any]]:
    """Columns of a table of four images, the first perhaps a path."""
    images: list[dict[str, Any]] = [{"bytes": picture("PNG", (20 + number, 20)), "path": None} for number in range(4)]
    if first_path is not None:
        images[0] = {"bytes": None, "path": first_path}
    return {"image": images, "caption": ["a"] * 4}


OPEN_LM = json.dumps(
    {"hidden_dim": 8, "n_layers": 1, "n_heads": 1, "seq_len": 8, "vocab_size": 9, "positional_embedding_type": "rotary"}
)


class Planted:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch PLANTED",)


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def run_folder(content: bytes) -> Callable[[Path], Path]:
    """A run whose checkpoint has a valid digest."""

    def make(folder: Path) -> Path:
        (folder / "checkpoints").mkdir()
        file = folder / "checkpoints" / "step-00000010.ckpt"
        file.write_bytes(content)
        digest = sha256(content).hexdigest()
        file.with_name(f"{file.name}.sha256").write_text(f"{digest}  {file.name}\n")
        return folder

    return make


def planted_link(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "config.yaml").write_text("name: x\n")
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.symlink_to("/tmp/hostile-target")
        return folder

    return make


def tokenizer(**parts: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = Tokenizer(models.BPE({chr(32 + number): number for number in range(95)}, []))
        for name, part in parts.items():
            setattr(made, name, part)
        made.save(str(folder / "tokenizer.json"))
        return folder / "tokenizer.json"

    return make


def precompiled(length: int) -> Any:
    charsmap = struct.pack("<I", 4) + bytes(4) + b"a" * length + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


def changed_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = tokenizer()(folder)
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return file

    return make


def sentencepiece_model(expansion: int = 0) -> bytes:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    words = iter(["the cat sat on a mat", "a dog ran over the hill"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    if not expansion:
        return model.getvalue()
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())  # type: ignore[attr-defined]
    proto.normalizer_spec.precompiled_charsmap += b"a" * expansion + b"\0"
    return bytes(proto.SerializeToString())


def vq_folder(folder: Path) -> Path:
    from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer

    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=32)), folder / "vq", torch.float32)
    return folder / "vq"


def transformers_vq(drop: str | None = None) -> Callable[[Path], Path]:
    """A Chameleon image tokenizer, perhaps without some tensors."""

    def make(folder: Path) -> Path:
        import transformers
        from safetensors.torch import load_file

        config = transformers.ChameleonVQVAEConfig(
            base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=1, num_embeddings=40, embed_dim=8,
            latent_channels=8, resolution=32,
        )  # fmt: skip
        transformers.ChameleonVQVAE(config).save_pretrained(folder / "vq")
        file = folder / "vq" / "model.safetensors"
        state = {name: value for name, value in load_file(file).items() if drop is None or drop not in name}
        save_file(state, file, {"format": "pt"})
        return folder / "vq"

    return make


def folder_of(**files: bytes | str) -> Callable[[Path], Path]:
    """A folder `model` with files; two underscores in a name stand for a dot."""

    def make(folder: Path) -> Path:
        (folder / "model").mkdir()
        for name, content in files.items():
            written(name.replace("__", "."), content)(folder / "model")
        return folder / "model"

    return make


def coco_of(captions: str, image: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A COCO folder of one image."""

    def make(folder: Path) -> Path:
        for name in ("annotations", "val2014"):
            (folder / name).mkdir()
        written("captions_val2014.json", captions)(folder / "annotations")
        image(folder / "val2014")
        return folder

    return make


def safetensors_of(length: int, text: str) -> bytes:
    return struct.pack("<Q", length) + text.encode()


def damaged(make: Callable[[Path], Path], seed: int, files: str = "*") -> Callable[[Path], Path]:
    """A valid file, or one of a folder, that is cut, or whose bytes are flipped, zeroed or doubled."""

    def damage(folder: Path) -> Path:
        path = make(folder)
        draw = random.Random(seed)
        chosen = path if path.is_file() else draw.choice(sorted(file for file in path.rglob(files) if file.is_file()))
        content = bytearray(chosen.read_bytes())
        for _ in range(draw.choice((1, 1, 10, 100))):
            at, length = draw.randrange(len(content)), draw.randint(1, 64)
            kind = draw.choice(("flip", "flip", "zero", "cut", "double"))
            if kind == "flip":
                content[at] ^= 1 << draw.randrange(8)
            elif kind == "zero":
                content[at : at + length] = bytes(len(content[at : at + length]))
            elif kind == "double":
                content[at:at] = content[at : at + length]
            elif len(content) > 16 and at > 8:
                del content[at:]
        chosen.write_bytes(content)
        return path

    return damage


def aliases(levels: int, width: int, start: str = "x") -> str:
    lines = [f"a0: &a0 [{start}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"
