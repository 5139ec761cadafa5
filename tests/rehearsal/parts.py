"""Made-up parts of the paper's run, in the files and shapes of the real ones: random weights, few channels and layers.

`python -m tests.rehearsal.parts FOLDER PART [PART]` writes some of `PARTS` and prints what they are. Exact are the
50,432 text rows, the 50,277 ids of the text tokenizer, images of 256 pixels, the 16,384 codes and 1,024 ids per image.
"""

import argparse
import io
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from t2i_lm.config.forgetting import NONFICTION, NOVELS
from t2i_lm.config.presets import PRESETS
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.shards.tokenize import stack_images
from t2i_lm.data.text import read_documents
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.open_lm import decoder_config, open_lm_state_dict
from t2i_lm.tokenizers import movqgan
from t2i_lm.tokenizers.vq import PixelRange, VQAutoencoder
from tests.data.coco_folder import write_coco, write_weights
from tests.data.tar_file import write_tar
from tests.rehearsal.files import CHECKPOINT, COCO, CONFIG, INCEPTION, MOVQGAN, NEOX, OPEN_LM, PAIRS
from tests.rehearsal.upstream import find_upstream, save_by_upstream

PIXELS = 256
# GPT-NeoX-20B's ids: byte pairs, then runs of 24 to 2 spaces.
NEOX_PAIRS, NEOX_IDS = 50_254, 50_277
MERGED = 4_000  # pieces that are learned from the shipped texts; no text is encoded as one of the rest


@dataclass(frozen=True)
class Size:
    """Sizes that no format fixes.

    Attributes:
        width, layers, heads: of the language model.
        pairs: captioned images; a twentieth is held out.
        coco: images of val2014.
    """

    width: int
    layers: int
    heads: int
    pairs: int
    coco: int


DEFAULT, QUICK = Size(64, 2, 4, 240, 24), Size(32, 1, 2, 40, 6)


def write_backbone(folder: Path, size: Size) -> str:
    """An open_lm checkpoint: by upstream's own model and `save_checkpoint` if installed, else in the same format."""
    (folder / OPEN_LM).mkdir(parents=True, exist_ok=True)
    preset = PRESETS["open_lm_1b_old"]
    # The file has all keys of upstream's open_lm_1b_old.json.
    plain = {"post_embed_norm": False, "weight_tying": False, "qk_norm": False, "ffn_type": "swiglu"}
    sizes = {"hidden_dim": size.width, "n_layers": size.layers, "n_heads": size.heads}
    config = preset | sizes | plain | {"model_norm": "default_layer_norm"}
    (folder / CONFIG).write_text(json.dumps(config, indent=4))
    upstream = find_upstream()
    shape = f"{size.width} wide, {size.layers} layers, {config['vocab_size']:,} rows"
    if upstream is not None:
        save_by_upstream(upstream, folder / CONFIG, folder / OPEN_LM)
        return f"open_lm checkpoint, {shape}: model and file by upstream's own code"
    decoder = Decoder(decoder_config(config))
    decoder.reset_parameters(torch.Generator().manual_seed(0))
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in open_lm_state_dict(decoder).items())
    content = {"epoch": 1, "name": OPEN_LM, "state_dict": state, "evaluation_metrics": []}
    torch.save(content, folder / CHECKPOINT)
    return f"open_lm checkpoint, {shape}: by this suite's code in upstream's format (make open-lm: by upstream's)"


def write_text_tokenizer(folder: Path, size: Size) -> str:
    """A `tokenizer.json` of GPT-NeoX's kind and ids: byte pairs, two special tokens, added runs of spaces."""
    (folder / NEOX).parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    captions = (pair.captions[0] for pair in map(SceneSource(2000, "train", 0).__getitem__, range(2000)))
    texts = (text for path in (NOVELS, NONFICTION) for text in read_documents(path))
    tokenizer.train_from_iterator((text for source in (captions, texts) for text in source), trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    vocabulary |= {f"<unused {number}>": number for number in range(len(vocabulary), NEOX_PAIRS)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    runs = enumerate(range(24, 1, -1), start=NEOX_PAIRS)
    content["added_tokens"] += [{"id": number, "content": " " * length, **plain} for number, length in runs]
    (folder / NEOX).write_text(json.dumps(content))
    ids = Tokenizer.from_file(str(folder / NEOX)).get_vocab_size(with_added_tokens=True)
    assert ids == NEOX_IDS
    return f"tokenizer.json of {ids:,} ids, {MERGED:,} of them from text"


def sber_name(key: str, levels: int) -> str:
    """SBER's name of a tensor of diffusers' `VQModel`; the inverse of `movqgan.diffusers_name`."""
    key = re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", key)
    key = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda found: f"decoder.up.{levels - 1 - int(found[1])}.", key)
    for own, sbers in (
        (".mid_block.resnets.0.", ".mid.block_1."),
        (".mid_block.attentions.0.", ".mid.attn_1."),
        (".mid_block.resnets.1.", ".mid.block_2."),
        (".conv_shortcut.", ".nin_shortcut."),
        (".conv_norm_out.", ".norm_out."),
        (".downsamplers.0.conv.", ".downsample.conv."),
        (".upsamplers.0.conv.", ".upsample.conv."),
        (".group_norm.", ".norm."),
        (".spatial_norm.", ".norm."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".proj_out."),
    ):
        key = key.replace(own, sbers)
    return re.sub(r"\.attentions\.(\d+)\.", r".attn.\1.", re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key))


def sber_state(vq: nn.Module, levels: int) -> dict[str, Tensor]:
    """The tensors of a `VQModel` under SBER's names, matrices of attention as 1x1 convolutions."""
    state = {}
    for name, tensor in vq.state_dict().items():
        key = sber_name(name, levels)
        assert movqgan.diffusers_name(key, levels) == name, name
        state[key] = tensor[:, :, None, None] if re.search(r"\.(q|k|v|proj_out)\.weight$", key) else tensor
    return state


def write_image_tokenizer(folder: Path, size: Size) -> str:
    """A MoVQGAN checkpoint under SBER's names: 16,384 codes spread over the latents of generated images."""
    widths, blocks = [32 * factor for factor in movqgan.LEVELS], 1
    # From the shapes of this checkpoint, as for a real one.
    shapes = {f"encoder.down.{level}.block.0.conv1.weight": torch.empty(width) for level, width in enumerate(widths)}
    shapes |= {"encoder.down.3.attn.0.q.weight": torch.empty(1), "encoder.conv_out.weight": torch.empty(4)}
    shapes |= {"quantize.embedding.weight": torch.empty(movqgan.CODES, 4)}
    torch.manual_seed(0)
    vq: Any = VQModel(**movqgan.diffusers_config(shapes))
    scenes = SceneSource(8, "iid", 1, PIXELS)
    images_BCHW = stack_images([scenes[number].image for number in range(len(scenes))])
    with torch.no_grad():
        latents_BEhw = VQAutoencoder(vq).latents(PixelRange().to_model(images_BCHW))
        mean, deviation = latents_BEhw.mean((0, 2, 3)), latents_BEhw.std((0, 2, 3))
        vq.quantize.embedding.weight.copy_(mean + deviation * torch.randn(movqgan.CODES, 4))
    state = sber_state(vq, len(widths))
    # A training checkpoint has more: parts of the loss, and averages of the weights.
    state |= {"loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4), "model_ema.num_updates": torch.tensor(1)}
    torch.save({"state_dict": state, "epoch": 0, "global_step": 1}, folder / MOVQGAN)
    channels = "-".join(map(str, widths))
    return f"MoVQGAN checkpoint, {channels} channels, {blocks} block per level, {movqgan.CODES:,} codes"


def write_pairs(folder: Path, size: Size) -> str:
    """Tars of captioned images with the files that img2dataset writes beside them."""
    (folder / PAIRS).mkdir(parents=True, exist_ok=True)
    scenes, per_tar = SceneSource(size.pairs, "train", 0, PIXELS), 100
    for start in range(0, size.pairs, per_tar):
        shard = start // per_tar
        samples = {}
        for number in range(start, min(start + per_tar, size.pairs)):
            pair, file = scenes[number], io.BytesIO()
            pair.image.save(file, "JPEG", quality=95)
            key, caption = f"{shard:05d}{number - start:04d}", pair.captions[0]
            about = {"caption": caption, "key": key, "status": "success", "width": PIXELS, "height": PIXELS}
            content = {".jpg": file.getvalue(), ".json": json.dumps(about).encode(), ".txt": caption.encode()}
            samples[key] = content
        write_tar(folder / PAIRS / f"{shard:05d}.tar", samples)
        stats = {"count": len(samples), "successes": len(samples), "failed_to_download": 0}
        (folder / PAIRS / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return f"{size.pairs:,} captioned images of {PIXELS} pixels in {shard + 1} tars"


def write_evaluation(folder: Path, size: Size) -> str:
    """A folder in the layout of COCO's val2014, and random weights of torch-fidelity's Inception."""
    write_coco(folder / COCO, size.coco, width=320, height=240)
    write_weights(folder / INCEPTION)
    return f"{size.coco} images in the layout of COCO val2014, random weights of Inception"


PARTS: Mapping[str, Callable[[Path, Size], str]] = {
    "backbone": write_backbone,
    "text_tokenizer": write_text_tokenizer,
    "image_tokenizer": write_image_tokenizer,
    "data": write_pairs,
    "coco": write_evaluation,
}


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.rehearsal.parts")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("part", nargs="+", choices=PARTS)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in options.part:
        print(PARTS[part](options.folder, QUICK if options.quick else DEFAULT), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
