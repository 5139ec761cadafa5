"""Turns a finished run into files that load without Lightning: `python -m t2i_lm.export RUN --out FOLDER`."""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from t2i_lm.experiment.build import ImageExperiment, ImageTokenizerExperiment, TextExperiment

EXAMPLE = "example: python -m t2i_lm.export runs/text_lm/20260102-030405-demo --out my_lm"
# Openings of the completions shown on a language model's card.
OPENINGS = (
    "It was a dark and stormy night, and",
    "The old man looked at the sea and",
    "My dear sister,",
    "On the table there was a red",
    "She opened the door and saw",
    "In the year 1812, the army",
    "The colour of the sky was",
    '"I do not believe you," said',
    "There were three",
    "The house stood to the left of",
)
COMPLETION_TOKENS = 40
SCORE_BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, measures what was exported and writes a card; returns the exit code."""
    arguments = argparse.ArgumentParser(
        prog="python -m t2i_lm.export",
        description="Export a run's newest checkpoint as safetensors with a card of measured numbers.",
        epilog=EXAMPLE,
    )
    arguments.add_argument("run", type=Path, help="run folder, or a folder of runs: its newest is taken")
    arguments.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    options = arguments.parse_args(argv)
    try:
        card = export(options.run, options.out, options.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(card, indent=2))
    return 0


def export(run: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Exports a run folder and returns the card.

    Raises:
        ValueError: if there is no run or no whole checkpoint.
    """
    import torch

    from t2i_lm.config.load import load_experiment
    from t2i_lm.experiment.build import build
    from t2i_lm.experiment.restore import newest_checkpoint
    from t2i_lm.storage.run_folder import CONFIG, find_run, read_run

    run = find_run(run)
    checkpoint = newest_checkpoint(run)
    experiment = build(load_experiment(run / CONFIG))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    experiment.module.load_state_dict(state["state_dict"])
    experiment.module.eval()
    card: dict[str, Any] = {
        "experiment": experiment.config.name,
        "task": experiment.config.task,
        "seed": experiment.config.seed,
        "steps": int(state["global_step"]),
        "data_hash": experiment.index.get("data_hash"),
        "git": read_run(run).environment.get("git"),
        "dtype": dtype,
    }
    card |= EXPORTERS[experiment.config.task](experiment, out, getattr(torch, dtype), card)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def export_decoder(
    experiment: "ImageExperiment", out: Path, dtype: "torch.dtype", card: dict[str, Any]
) -> dict[str, Any]:
    """An expanded decoder under its library's names, its rows joined, with its id ranges."""
    from t2i_lm.models.decoder import Decoder
    from t2i_lm.models.huggingface import HuggingFaceDecoder, save_huggingface
    from t2i_lm.models.lora import merge_adapters
    from t2i_lm.models.open_lm import save_open_lm

    decoder, vocab = experiment.decoder, experiment.layout.vocab
    merge_adapters(decoder)
    if isinstance(decoder, HuggingFaceDecoder):
        save_huggingface(decoder, out, dtype)
    else:
        assert isinstance(decoder, Decoder)
        save_open_lm(decoder, out, dtype, {"experiment": str(card["experiment"])})
    return {"text_rows": vocab.text_size, "image_offset": vocab.image_offset, "rows": vocab.size}


def export_language_model(
    experiment: "TextExperiment", out: Path, dtype: "torch.dtype", card: dict[str, Any]
) -> dict[str, Any]:
    """A backbone with its tokenizer; held-out bits per byte and ten completions of the weights as shipped."""
    from t2i_lm.data.shards.format import open_split
    from t2i_lm.models.decoder import Decoder
    from t2i_lm.models.open_lm import load_open_lm, save_open_lm

    module, text = experiment.module, experiment.text
    assert isinstance(module.decoder, Decoder)
    save_open_lm(module.decoder, out, dtype, {"experiment": str(card["experiment"])})
    shutil.copyfile(text.path, out / f"text_tokenizer{text.path.suffix}")
    return language_model_numbers(load_open_lm(out), text, open_split(experiment.shards, "val"))


def language_model_numbers(decoder: Any, text: Any, split: Any) -> dict[str, Any]:
    """Held-out loss of a backbone and ten of its completions (drawn at temperature 0.8, fixed seeds)."""
    import torch

    from t2i_lm.models.generate import continue_text

    nll, bytes_, tokens = held_out_sums(decoder, split)
    completions = {}
    for seed, opening in enumerate(OPENINGS):
        ids = torch.tensor(text.encode(opening))
        room = min(COMPLETION_TOKENS, decoder.config.seq_len - len(ids))
        added = continue_text(decoder, ids, room, text.document_end, seed, temperature=0.8)
        completions[opening] = text.decode([*ids.tolist(), *added.tolist()])[len(opening) :]
    return {
        "held_out_nll": nll / tokens,
        "held_out_bits_per_byte": nll / math.log(2) / bytes_,
        "held_out_tokens": tokens,
        "held_out_bytes": bytes_,
        "window": int(split[:1]["text_ids"].shape[1]) - 1,
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        "tokenizer_sha256": text.sha256,
        "completions": completions,
    }


def held_out_sums(decoder: Any, split: Any) -> tuple[float, int, int]:
    """Summed nll in nats, bytes and tokens of a text split, each row a window of its own."""
    import numpy as np
    import torch
    from rich.progress import track

    nll, bytes_, tokens = 0.0, 0, 0
    with torch.no_grad():
        for start in track(range(0, len(split), SCORE_BATCH), description="held-out text"):
            rows = split[start : start + SCORE_BATCH]
            ids_BT = torch.from_numpy(np.stack(rows["text_ids"]).astype(np.int64))
            nll_N = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:]).nll_N
            nll += float(nll_N.double().sum())
            tokens += nll_N.numel()
            bytes_ += int(np.sum(rows["bytes"]))
    return nll, bytes_, tokens


def export_image_tokenizer(
    experiment: "ImageTokenizerExperiment", out: Path, dtype: "torch.dtype", card: dict[str, Any]
) -> dict[str, Any]:
    """An image tokenizer; reconstruction numbers of the weights as shipped."""
    from t2i_lm.tokenizers.vq import VQTokenizer, save_tokenizer

    module, size = experiment.module, experiment.config.image_tokenizer.size
    save_tokenizer(module.model, out, dtype)
    experiment.data.setup("fit")
    return tokenizer_numbers(VQTokenizer.from_folder(out, size), experiment.data.val_set)


def tokenizer_numbers(tokenizer: Any, images: Any) -> dict[str, Any]:
    """PSNR, codes used and, for scenes, what the checker still reads from reconstructions of held-out images."""
    import torch

    from t2i_lm.data.scenes.captions import ATTRIBUTES
    from t2i_lm.data.scenes.checker import check, shares_right
    from t2i_lm.data.scenes.source import SceneSource

    squares, images_seen = 0.0, 0
    used = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    read_back: list[dict[str, bool | None]] = []
    everything = frozenset(ATTRIBUTES)
    for start in range(0, len(images), SCORE_BATCH):
        indices = range(start, min(start + SCORE_BATCH, len(images)))
        images_BCHW = images.__getitems__([(0, index) for index in indices])["images_BCHW"]
        ids_BN = tokenizer.encode(images_BCHW)
        again_BCHW = tokenizer.decode(ids_BN)
        used += torch.bincount(ids_BN.flatten(), minlength=tokenizer.vocab_size)
        squares += float((images_BCHW.double() - again_BCHW.double()).square().mean(dim=(1, 2, 3)).sum()) / 255**2
        images_seen += len(indices)
        if isinstance(images.source, SceneSource):
            for index, image in zip(indices, again_BCHW.permute(0, 2, 3, 1).numpy(), strict=True):
                meaning = images.source[index].meaning
                assert meaning is not None
                asked = everything if meaning["family"] == "pair" else everything - {"relation"}
                read_back.append(check(image, meaning, asked))
    return {
        "pictures": images_seen,
        "psnr_db": -10 * math.log10(squares / images_seen),
        "codes_used": float((used > 0).double().mean()),
        "parameters": sum(parameter.numel() for parameter in tokenizer.model.parameters()),
        "checker_right": {name: entry["right"] for name, entry in shares_right(read_back).items()},
    }


EXPORTERS: dict[str, Callable[..., dict[str, Any]]] = {
    "text_to_image": export_decoder,
    "unconditional": export_decoder,
    "text": export_language_model,
    "image_tokenizer": export_image_tokenizer,
}

if __name__ == "__main__":
    sys.exit(main())
