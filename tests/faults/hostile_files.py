"""Hostile files by kind, and what reads each kind; as a program, reads each in a watched child: `guard.py`.

    python -m tests.faults.hostile_files FOLDER [quick]

prints one line of JSON per file.
"""

import json
import os
import pickle
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from t2i_lm.config.load import load_experiment
from tests.faults.file_readers import (
    read_backbone,
    read_checkpoint,
    read_coco,
    read_image,
    read_image_tokenizer,
    read_inception,
    read_plan,
    read_run_folder,
    read_source,
    read_text,
    read_text_tokenizer,
)
from tests.faults.file_writers import (
    END,
    EPS,
    ESCAPES,
    OPEN_LM,
    PAIR,
    PAX,
    Planted,
    aliases,
    cells,
    changed_tokenizer,
    chunk,
    coco_of,
    damaged,
    fifo,
    folder_of,
    header,
    large,
    link,
    members,
    merges,
    metadata,
    pickled,
    picture,
    planted_link,
    png,
    precompiled,
    run_folder,
    safetensors_of,
    sentencepiece_model,
    table,
    tar_of,
    tokenizer,
    transformers_vq,
    turned,
    unix_socket,
    vq_folder,
    written,
)
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
    good = json.dumps(
        {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    )
    jpg = written("0.jpg", picture("JPEG"))
    add("COCO", read_coco, quick=True)(
        fifo_as_an_image=coco_of(good, fifo("0.jpg")),
        endless_device_as_an_image=coco_of(good, link("0.jpg", "/dev/zero")),
        postscript_called_jpg=coco_of(good, written("0.jpg", EPS)),
        header_of_four_billion_pixels=coco_of(good, written("0.jpg", png(65535, 65535))),
        deep_captions=coco_of("[" * 10**5, jpg),
        list_as_captions=coco_of("[1]", jpg),
        endless_id=coco_of(good.replace('"id": 1', '"id": 1e999'), jpg),
        caption_as_a_list=coco_of(good.replace('"a cat"', "[]"), jpg),
        file_name_as_a_list=coco_of(good.replace('"0.jpg"', "[]"), jpg),
    )
    add("COCO", read_coco, refused=False)(valid=coco_of(good, jpg))
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
