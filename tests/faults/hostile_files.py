"""Hostile files by kind, and what reads each kind; as a program, reads each in a watched child: `guard.py`.

    python -m tests.faults.hostile_files FOLDER [quick]

prints one line of JSON per file.
"""

import base64
import io
import json
import os
import pickle
import random
import socket
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import BackboneConfig, DataConfig
from tests.faults.guard import watched

# Seeded damages of each valid file.
DAMAGES = 5


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Attributes:
        name: kind and what is wrong.
        make: writes it into a folder, and returns what is to be read.
        read: reads it, as a command would.
        refused: whether that must end in an error; None for damage that may leave a valid file.
        quick: whether it is among those of the normal test suite.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refused: bool | None = True
    quick: bool = False


# Readers


def read_image(path: Path) -> None:
    from t2i_lm.data.pairs import RejectedPairError, center_crop, decode_image

    try:
        center_crop(decode_image(str(path), str(path)), 256)
    except RejectedPairError as error:
        raise ValueError(str(error)) from None


def read_source(kind: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        from t2i_lm.data.pairs import RejectedPairError
        from t2i_lm.data.sources import open_source, print_notes

        folder = path if path.is_dir() else path.parent
        data = DataConfig(source=kind, path=str(path), cache_dir=str(folder / "cache"))
        source = open_source(data, "train", 16)
        print_notes(source)
        for number in range(len(source)):
            try:
                source[number]
            except RejectedPairError as error:
                print(f"reject: {error}")

    return read


def read_text(path: Path) -> None:
    from t2i_lm.data.text import read_documents

    list(read_documents(str(path)))


def read_plan(path: Path) -> None:
    from t2i_lm.comparison.study_plan import read_study

    read_study(path)


def read_run_folder(path: Path) -> None:
    from t2i_lm.config.load import load_run
    from t2i_lm.storage.run_folder import read_run, require_no_links

    require_no_links(path)
    read_run(path)
    load_run(path)


def read_checkpoint(path: Path) -> None:
    from t2i_lm.experiment.restore import _load_weights, newest_checkpoint

    _load_weights(torch.nn.Linear(2, 2), newest_checkpoint(path))


def read_text_tokenizer(path: Path) -> None:
    from t2i_lm.tokenizers.text import open_text_tokenizer

    text = open_text_tokenizer(path)
    text.encode_batch(["a cat " * 1000, "aaaa" * 1000])


def read_image_tokenizer(path: Path) -> None:
    from t2i_lm.tokenizers.image import open_image_tokenizer

    open_image_tokenizer(path, 32).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def read_backbone(path: Path) -> None:
    from t2i_lm.models.factory import pretrained_backbone

    config = ExperimentConfig()
    pretrained_backbone(replace(config, backbone=BackboneConfig(path=str(path)), data=replace(config.data, length=8)))


def read_inception(path: Path) -> None:
    from callbacks.metrics.inception import Inception

    Inception(path, 64)


def read_coco(path: Path) -> None:
    from t2i_lm.data.coco import read_coco as read
    from t2i_lm.data.coco import read_images

    coco = read(path)
    read_images(coco, coco.images)


# Writers


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


def cases() -> list[Case]:
    """All hostile files, of fixed seeds."""
    found: list[Case] = []

    def add(kind: str, read: Callable[[Path], object], refused: bool | None = True, quick: bool = False) -> Any:
        def of(**makers: Callable[[Path], Path]) -> None:
            for name, make in makers.items():
                found.append(Case(f"{kind}: {name.replace('_', ' ')}", make, read, refused, quick))

        return of

    add("image", read_image, quick=True)(
        postscript_called_jpg=written("x.jpg", EPS),
        fifo=fifo("x.jpg"),
        endless_device=link("x.png", "/dev/zero"),
        header_of_four_billion_pixels=written("x.png", png(65535, 65535)),
        sixteen_bit_60_megapixels=large("PNG", (6000, 10000), "I;16", compress_level=1),
        escapes_in_its_name=written(f"x{ESCAPES}.jpg", b"hello"),
        empty=written("x.jpg", b""),
    )
    add("image", read_image)(
        socket=unix_socket,
        binary_postscript=written("x.eps", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS),
        portable_document=written("x.png", b"%PDF-1.7\n" + EPS),
        photoshop=written("x.jpg", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(300)),
        icon=written("x.jpg", picture("ICO", (16, 16))),
        fits=written("x.jpg", b"SIMPLE  =                    T".ljust(80) + b" " * 2800),
        x_bitmap=written("x.jpg", b"#define x_width 8\n#define x_height 8\nstatic char x_bits[] = {\n0x00 };"),
        windows_metafile=written("x.jpg", b"\xd7\xcd\xc6\x9a" + bytes(60)),
        web_page=written("x.jpg", "<svg onload='x()'/>"),
        folder=lambda folder: folder,
        passwords=link("x.png", "/etc/passwd"),
        webp_60_megapixels=large("WEBP", (7500, 8000), quality=0, method=0),
        one_bit_60_megapixels=large("PNG", (6000, 10000), "1"),
        gray_60_megapixels=large("PNG", (6000, 10000), "L", compress_level=1),
        alpha_60_megapixels=large("PNG", (6000, 10000), "RGBA", compress_level=1),
        wide_alpha=large("PNG", (7_000_000, 8), "RGBA", compress_level=1),
        progressive_60_megapixels=large("JPEG", (6000, 10000), progressive=True, subsampling=0),
        float_25_megapixels=large("TIFF", (5000, 5200), "F"),
        slow_portable_bitmap=lambda folder: written("x.pgm", b"P5 4000 4000 1000\n" + bytes(32 * 10**6))(folder),
        avif_16_megapixels=large("AVIF", (4000, 4000), speed=10),
        jpeg_2000_16_megapixels=large("JPEG2000", (4000, 4000)),
        cut_in_the_middle=written("x.jpg", picture("JPEG", (90, 90))[:1000]),
        long_text_chunk=written("x.png", png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**7))))),
        long_profile=written("x.png", png(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 * 10**7))))),
        tags_in_a_circle=written("x.tif", b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8)),
    )
    add("image", read_image, False)(
        rgb_60_megapixels=large("PNG", (6000, 10000), compress_level=1),
        jpeg_60_megapixels=large("JPEG", (6000, 10000)),
        jpeg_60_megapixels_turned=large("JPEG", (6000, 10000), exif=turned()),
        jpeg_25_megapixels_progressive=large("JPEG", (5000, 5000), progressive=True, subsampling=0),
        webp_16_megapixels=large("WEBP", (4000, 4000), quality=0, method=0),
        gif_49_megapixels=large("GIF", (7000, 7000), "P"),
        palette_with_alpha_49_megapixels=large("PNG", (7000, 7000), "P", transparency=0),
        cmyk_30_megapixels=large("JPEG", (5000, 6000), "CMYK"),
        gray_alpha_30_megapixels=large("PNG", (5000, 6000), "LA", compress_level=1),
        png_turned_33_megapixels=large("PNG", (5600, 5900), exif=turned(), compress_level=1),
        sixteen_bit_40_megapixels=large("PNG", (5000, 8000), "I;16", compress_level=1),
        tiff_in_one_strip=large("TIFF", (4500, 4500), compression="tiff_adobe_deflate", strip_size=2**31 - 1),
        jpeg_2000_10_megapixels=large("JPEG2000", (3200, 3200)),
    )
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        for seed in range(DAMAGES):
            valid = written(f"x.{kind.lower()}", picture(kind))
            add("image", read_image, None)(**{f"damaged_{kind}_{seed}": damaged(valid, seed)})

    tars = read_source("webdataset")
    add("tar", tars, quick=True)(
        fifo=fifo("x.tar"),
        fifo_in_a_folder=fifo("x.tar", whole=True),
        no_tar=written("x.tar", b"hello" * 1000),
        escapes_in_a_key=written("x.tar", tar_of((f"{ESCAPES}.dat", b"x"), (f"{ESCAPES}.bin", b"x"))),
    )
    add("tar", tars, False, quick=True)(
        member_that_ends_before_it_begins=written("x.tar", members(*PAIR) + header("a.jpg", -1024) + END),
        member_that_leads_to_itself=written("x.tar", members(*PAIR) + header("a.jpg", -512) + END),
        deep_json=written("x.tar", tar_of(*PAIR, ("3.jpg", PAIR[0][1]), ("3.json", b"[" * 10**5))),
        huge_integer=written("x.tar", tar_of(*PAIR, ("3.jpg", PAIR[0][1]), ("3.json", b'{"a": ' + b"1" * 5000 + b"}"))),
        caption_that_is_a_number=written("x.tar", tar_of(*PAIR, ("3.jpg", PAIR[0][1]), ("3.json", b'{"caption": 7}'))),
        captions_in_an_object=written(
            "x.tar", tar_of(*PAIR, ("3.jpg", PAIR[0][1]), ("3.json", b'{"caption": {"a": 1}}'))
        ),
    )
    add("tar", tars)(
        compressed=written("x.tar", b"\x1f\x8b" + bytes(1000)),
        socket=unix_socket,
        endless_device=link("x.tar", "/dev/zero"),
        starts_with_a_negative_size=written("x.tar", header("a.jpg", -1024) + END),
    )
    add("tar", tars, None)(
        long_names_in_a_row=written("x.tar", (header("x", 512, tarfile.GNUTYPE_LONGNAME) + b"a" * 512) * 3000 + END),
        pax_headers_in_a_row=written("x.tar", members(*PAIR) + PAX * 3000),
        pax_header_of_a_gigabyte=written("x.tar", header("x", 2**30, tarfile.XHDTYPE) + bytes(4096)),
        sparse_file_that_is_cut=written("x.tar", header("x", 512, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" * 30),
        member_of_a_terabyte=written("x.tar", members(*PAIR) + header("a.jpg", 2**40) + END),
        names_that_lead_out=written("x.tar", tar_of(("../../0.jpg", PAIR[0][1]), ("../../0.txt", b"a"), *PAIR)),
    )
    for seed in range(2 * DAMAGES):
        add("tar", tars, None)(**{f"damaged_{seed}": damaged(written("x.tar", tar_of(*PAIR)), seed)})

    folders = read_source("image_folder")
    add("metadata", folders, False, quick=True)(
        deep_json=metadata(b'{"file_name": ' + b"[" * 10**5),
        huge_integer=metadata(b'{"file_name": "0.png", "caption": "a", "id": ' + b"1" * 5000 + b"}"),
        nan=metadata(b'{"file_name": "0.png", "caption": NaN}'),
        captions_in_an_object=metadata(b'{"file_name": "0.png", "caption": {"a": 1}}'),
        image_that_leads_out=metadata(b'{"file_name": "../../../../etc/passwd", "caption": "a"}'),
        endless_device=metadata(b'{"file_name": "/dev/zero", "caption": "a"}'),
        address=metadata(b'{"file_name": "http://127.0.0.1:9/x.png", "caption": "a"}'),
        escapes=metadata(json.dumps({"file_name": f"{ESCAPES}.png", "caption": ESCAPES}).encode()),
        line_separators=metadata('{"file_name": "0.png", "caption": "a\u2028b\x85c"}'.encode()),
    )
    add("metadata", folders)(
        fifo=fifo("metadata.jsonl", whole=True),
        latin_1=metadata('{"file_name": "0.png", "caption": "é"}'.encode("latin-1")),
        open_quote=metadata(b'file_name,caption\n0.png,"a', name="metadata.csv"),
    )
    for seed in range(DAMAGES):
        add("metadata", folders, None)(**{f"damaged_{seed}": damaged(metadata(), seed, "*.jsonl")})

    parquet = read_source("parquet")
    add("Parquet", parquet, quick=True)(fifo=fifo("x.parquet"), no_table=written("x.parquet", b"PAR1hello"))
    add("Parquet", parquet, False)(
        path_that_leads_out=written("x.parquet", table(cells(first_path="/dev/zero"))),
        numbers_and_nulls=written("x.parquet", table(cells() | {"caption": ["a", None, "b", "c"]})),
    )
    for seed in range(DAMAGES):
        add("Parquet", parquet, None)(**{f"damaged_{seed}": damaged(written("x.parquet", table(cells())), seed)})

    add("text", read_text, quick=True)(fifo=fifo("x.txt"), device=link("x.txt", "/dev/zero"))
    add("text", read_text)(
        latin_1=written("x.txt", "é".encode("latin-1")), no_gzip=written("x.txt.gz", b"\x1f\x8bhello" * 9)
    )

    add("config", load_experiment, quick=True)(
        aliases_that_multiply=written("x.yaml", aliases(12, 9)),
        merges_that_multiply=written("x.yaml", merges(40)),
        alias_of_itself=written("x.yaml", "name: &a [*a]\n"),
        deep=written("x.yaml", "[" * 10**4),
        object=written("x.yaml", "name: !!python/object/apply:os.system ['touch PLANTED']\n"),
        name_that_leads_out=written("x.yaml", "name: ../../x\n"),
        absolute_name=written("x.yaml", "name: /tmp/x\n"),
        scale_that_leads_out=written("x.yaml", "scale: ../x\n"),
        code_without_leave=written("x.yaml", "data: {source: 'code:os:system'}\n"),
        megabytes=written("x.yaml", "a: [" + "x, " * 10**6 + "]\n"),
        infinite_rate=written("x.yaml", "optim: {lr: .inf}\n"),
    )
    add("config", load_experiment, False)(
        resolver=written("x.yaml", "name: ${oc.env:HOME}\n"), markup=written("x.yaml", "name: '[/x]'\n")
    )
    add("plan", read_plan)(
        aliases_that_multiply=written("x.yaml", aliases(12, 9)),
        object=written("x.yaml", "seeds: !!python/object/apply:os.system ['touch PLANTED']\n"),
        name_that_leads_out=written("x.yaml", "comparisons: {../../x: {}}\n"),
    )
    add("run", read_run_folder)(
        aliases_that_multiply=lambda folder: written("config.yaml", aliases(12, 9))(folder).parent,
        log_that_leads_out=planted_link("events.log"),
        report_that_leads_out=planted_link("report.json"),
        samples_that_lead_out=planted_link("samples"),
        dashboard_that_leads_out=planted_link("tb"),
        grid_that_leads_out=planted_link("samples/step-00000001.png"),
    )
    add("checkpoint", read_checkpoint)(
        object=run_folder(pickled({"state_dict": Planted()})),
        bare_pickle=run_folder(pickle.dumps(Planted())),
        no_weights=run_folder(pickled({"a": 1})),
        list=run_folder(pickled([1, 2])),
        other_weights=run_folder(pickled({"state_dict": {"a": torch.zeros(2)}})),
        text=run_folder(b"hello"),
    )

    valid = tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel())
    add("tokenizer", read_text_tokenizer, quick=True)(
        replacements_that_multiply=tokenizer(normalizer=normalizers.Sequence([normalizers.Replace("a", "a" * 10)] * 9)),
        regular_expression=tokenizer(pre_tokenizer=pre_tokenizers.Split(Regex("(a+)+$"), "isolated")),
        fifo=fifo("tokenizer.json"),
    )
    add("tokenizer", read_text_tokenizer)(
        prefixes_that_multiply=tokenizer(normalizer=normalizers.Sequence([normalizers.Prepend("a" * 20)] * 8)),
        pattern_in_a_normalizer=tokenizer(normalizer=normalizers.Replace(Regex("(a|aa)+$"), "b")),
        decoder_that_multiplies=tokenizer(decoder=decoders.Sequence([decoders.Replace("a", "a" * 10)] * 9)),
        compiled_map=changed_tokenizer(lambda content: content.update(normalizer=precompiled(10**6))),
        model_of_no_kind=changed_tokenizer(lambda content: content.update(model={"type": "Shell"})),
        deep=written("tokenizer.json", "[" * 10**5),
        sentencepiece_that_multiplies=lambda folder: written("x.model", sentencepiece_model(10**6))(folder),
        no_sentencepiece=written("x.model", b"hello"),
        empty=written("x.model", b""),
    )
    for seed in range(DAMAGES):
        add("tokenizer", read_text_tokenizer, None)(
            **{
                f"damaged_json_{seed}": damaged(valid, seed),
                f"damaged_sentencepiece_{seed}": damaged(
                    lambda folder: written("x.model", sentencepiece_model())(folder), seed
                ),
            }
        )

    vq = read_image_tokenizer
    add("image tokenizer", vq, quick=True)(
        object=written("x.ckpt", pickled({"state_dict": Planted()})), fifo=fifo("x.ckpt")
    )
    add("image tokenizer", vq)(
        missing_codebook=transformers_vq("quantize"),
        missing_encoder=transformers_vq("encoder.down.0"),
        fifo_in_a_folder=fifo("config.json", whole=True),
        own_code=folder_of(
            config__json=json.dumps({"model_type": "x", "auto_map": {"AutoModel": "planted.X"}}),
            planted__py="import os; os.system('touch PLANTED')",
        ),
        unknown_keys=folder_of(config__json=json.dumps({"model": {"codes": 10**12}}), model__safetensors=b""),
    )
    add("image tokenizer", vq, False)(whole_folder_of_transformers=transformers_vq())
    for seed in range(DAMAGES):
        add("image tokenizer", vq, None)(**{f"damaged_{seed}": damaged(vq_folder, seed)})

    add("backbone", read_backbone)(
        object=written("x.pt", pickled({"state_dict": Planted()})),
        fifo_in_a_folder=fifo("config.json", whole=True),
        own_code=folder_of(
            config__json=json.dumps({"model_type": "planted", "auto_map": {"AutoModelForCausalLM": "planted.X"}}),
            planted__py="import os; os.system('touch PLANTED')",
            model__safetensors=b"",
        ),
        pickled_weights=folder_of(
            config__json=json.dumps(
                {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9, "n_positions": 9}
            ),
            pytorch_model__bin=pickled({"transformer.wte.weight": Planted()}),
        ),
        header_of_exabytes=folder_of(config__json=OPEN_LM, model__safetensors=safetensors_of(2**60, "{}")),
        tensor_beyond_the_file=folder_of(
            config__json=OPEN_LM,
            model__safetensors=safetensors_of(64, '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64)),
        ),
        deep_header=folder_of(config__json=OPEN_LM, model__safetensors=safetensors_of(10**5, "[" * 10**5)),
        object_of_open_lm=folder_of(config__json=OPEN_LM, x__pt=pickled({"state_dict": Planted()})),
        text_of_open_lm=folder_of(config__json=OPEN_LM, x__pt=b"hello"),
        deep_config=folder_of(config__json="[" * 10**5, model__safetensors=b""),
        list_as_a_config=folder_of(config__json="[1]", model__safetensors=b""),
        layers_as_text=folder_of(config__json=OPEN_LM.replace(": 1,", ': "9",'), model__safetensors=b""),
        rows_beyond_memory=folder_of(config__json=OPEN_LM.replace("9", str(10**13)), model__safetensors=b""),
    )
    add("Inception", read_inception)(
        object=written("x.pth", pickled(Planted())), text=written("x.pth", b"hello"), fifo=fifo("x.pth")
    )
    return found


def main(root: Path, quick: bool) -> None:
    """Reads each file in a child of its own."""
    Image.init()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import transformers  # noqa: F401

    import t2i_lm.data.sources
    import t2i_lm.experiment.restore
    import t2i_lm.tokenizers.image  # noqa: F401

    for number, case in enumerate(case for case in cases() if case.quick or not quick):
        folder = root / f"{number:03d}"
        folder.mkdir(parents=True)
        os.chdir(folder)  # a planted command would leave its mark here
        maker = os.fork()  # so that what it takes to write a large file is not counted
        if maker == 0:
            code = 1
            try:
                path = case.make(folder)
                (root / f"{number:03d}.path").write_text(str(path))
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(maker, 0)[1]) == 0, case.name
        path = Path((root / f"{number:03d}.path").read_text())
        outcome = watched(lambda case=case, path=path: case.read(path), folder)  # type: ignore[misc]
        mark = (folder / "PLANTED").exists()
        found = {"name": case.name, "refused": case.refused, "path": str(path), "mark": mark, **asdict(outcome)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] == ["quick"])
