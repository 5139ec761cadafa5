"""Files of a trained run that load without Lightning, with a card of numbers measured on the exported weights."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from callbacks.checkpoints import step_of
from t2i_lm.config.load import load_run
from t2i_lm.data.code_words import words_in_captions
from t2i_lm.data.images import ImageBatches
from t2i_lm.data.scenes.captions import ATTRIBUTES
from t2i_lm.data.scenes.cells import code_meaning
from t2i_lm.data.scenes.checker import check, shares_right
from t2i_lm.data.scenes.oracle import SIDE
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.shards.parts import open_split
from t2i_lm.data.shards.tokenize import stack_images, text_rows
from t2i_lm.data.text import read_documents
from t2i_lm.experiment.build import (
    Experiment,
    ImageModel,
    ImageTokenizerExperiment,
    TextExperiment,
)
from t2i_lm.experiment.restore import checkpoint_of_step, load_trained, load_trained_experiment, newest_checkpoint
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.factory import decoder_architecture, huggingface_folder
from t2i_lm.models.generate import continue_text
from t2i_lm.models.huggingface import HuggingFaceDecoder, require_transformers
from t2i_lm.models.huggingface_folder import load_huggingface, save_huggingface
from t2i_lm.models.lora import merge_adapters
from t2i_lm.models.open_lm import load_open_lm, save_open_lm
from t2i_lm.models.transformers_export import FORMAT, require_equivalent, save_transformers
from t2i_lm.runtime.progress import progress
from t2i_lm.storage.cards import write_card
from t2i_lm.storage.resumable import atomic_folder, require_new_folder, share
from t2i_lm.storage.run_folder import Run, find_run, read_run, require_checkpoints
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import document_start
from t2i_lm.tokenizers.exported import write_tokenizer
from t2i_lm.tokenizers.vq import VQTokenizer, save_tokenizer
from t2i_lm.tokenizers.words import WordVQ

# Openings of the completions on a language model's card.
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


def export(
    run: Path, out: Path, dtype: str, form: str = "native", other: Path | None = None, step: int | None = None
) -> dict[str, Any]:
    """Exports a checkpoint of a run and returns the card, which also lies in `out`.

    Args:
        run: a run folder, or a folder of runs, whose newest is used.
        out: the folder to write, new or empty; written whole or not at all.
        dtype: of the written weights.
        form: one of `FORMATS`.
        other: with a language model: held-out text of another domain, measured as well.
        step: of the checkpoint; None for the newest one.

    Raises:
        ValueError: if there is no run or no whole checkpoint (of the step), or the run has no export in this format.
    """
    run = find_run(run)
    require_checkpoints(run)
    config = load_run(run)
    exporters = FORMATS[form]
    if config.task not in exporters:
        raise ValueError(f"--format {form}: {run} is a run of task={config.task}; expected {', '.join(exporters)}")
    if other is not None and config.task != "text":
        raise ValueError(f"--other-text {other}: {run} is a run of task={config.task}; expected a language model's")
    documents = None if other is None else list(read_documents(str(other), "--other-text"))
    for key, value in (("modality_experts", config.modality_experts), ("lora.image_only", config.lora.image_only)):
        if value:
            raise ValueError(
                f"--format {form}: {run} has {key}=true: its weights depend on the modality of a position, which no "
                "format states; sample and evaluate it from its run folder"
            )
    require_new_folder(out)
    if form == "transformers":
        require_transformers(FORMAT)
        if huggingface_folder(config) is None:
            require_equivalent(decoder_architecture(config, config.data.length))
    checkpoint = newest_checkpoint(run) if step is None else checkpoint_of_step(run, step)
    trained: ImageModel | Experiment
    if config.task in ("text_to_image", "unconditional"):  # needs no data
        trained = load_trained(run, checkpoint)
        trained.module.cpu()
    else:
        trained = load_trained_experiment(run, checkpoint)
    found = read_run(run)
    environment = found.environment
    card: dict[str, Any] = {
        "experiment": config.name,
        "task": config.task,
        "seed": config.seed,
        "steps": step_of(checkpoint),
        "tokens": tokens_after(found, step_of(checkpoint)),
        "data_hash": environment.get("data_hash"),
        "git": environment.get("git"),
        "dtype": dtype,
    }
    with atomic_folder(out) as folder:
        card |= exporters[config.task](trained, folder, getattr(torch, dtype))
        if documents is not None:
            assert isinstance(trained, TextExperiment)
            decoder = trained.module.decoder
            written = load_huggingface(folder).eval() if form == "transformers" else _read_back(decoder, folder)
            card |= other_domain(written, trained.text, documents, config.data.length)
        card = write_card(folder, card)
        share(*(file for file in folder.rglob("*") if file.is_file()))
    return card


def tokens_after(run: Run, step: int) -> int | None:
    """Positions that a run has trained on after a step, equally many in each; None for an image tokenizer."""
    lines = [line for line in run.metrics if line["step"] and "tokens_nominal" in line]
    return int(lines[-1]["tokens_nominal"]) * step // int(lines[-1]["step"]) if lines else None


def export_decoder(model: ImageModel, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    """An expanded decoder under the names of open_lm or transformers, its rows joined, with its id ranges."""
    decoder, vocab = model.decoder, model.layout.vocab
    merge_adapters(decoder)
    _write_native(decoder, out, dtype, model.config.name)
    return {"text_rows": vocab.text_size, "image_offset": vocab.image_offset, "rows": vocab.size}


def export_language_model(experiment: TextExperiment, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A backbone with its tokenizer; held-out bits per byte and ten completions of the exported weights."""
    decoder, text = experiment.module.decoder, experiment.text
    _write_native(decoder, out, dtype, experiment.config.name)
    write_tokenizer(text, out, "text_tokenizer")
    return language_model_numbers(_read_back(decoder, out), text, open_split(experiment.shards, "val"))


def _read_back(decoder: Backbone, out: Path) -> Backbone:
    """A backbone as `_write_native` wrote it."""
    return load_huggingface(out).eval() if isinstance(decoder, HuggingFaceDecoder) else load_open_lm(out)


def other_domain(decoder: Backbone, text: TextTokenizer, documents: Iterable[str], length: int) -> dict[str, Any]:
    """Loss of a backbone on text of another domain, in windows of `length` ids."""
    nll, bytes_, tokens = held_out_sums(decoder, datasets.Dataset.from_list(list(text_rows(documents, text, length))))
    return {
        "other_domain_nll": nll / tokens,
        "other_domain_bits_per_byte": nll / math.log(2) / bytes_,
        "other_domain_bytes": bytes_,
    }


def _write_native(decoder: Backbone, out: Path, dtype: torch.dtype, experiment: str) -> None:
    if isinstance(decoder, HuggingFaceDecoder):
        save_huggingface(decoder, out, dtype)
    elif isinstance(decoder, Decoder):
        save_open_lm(decoder, out, dtype, {"experiment": experiment})
    else:
        raise ValueError(
            f"backbone {type(decoder).__name__} has no export format; expected open_lm's decoder or a model of "
            "transformers"
        )


def export_image_tokenizer(experiment: ImageTokenizerExperiment, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    """An image tokenizer; numbers of the exported weights."""
    model = experiment.module.model
    save_tokenizer(model, out, dtype, model.words if isinstance(model, WordVQ) else None)
    experiment.data.setup("fit")
    images = experiment.data.val_set
    assert isinstance(images, ImageBatches)
    return tokenizer_numbers(VQTokenizer.from_folder(out, experiment.config.image_tokenizer.size), images)


def export_transformers_decoder(model: ImageModel, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    """An expanded decoder and its text tokenizer for `transformers`, with its id ranges."""
    decoder, vocab = model.decoder, model.layout.vocab
    merge_adapters(decoder)
    keys = {"text_rows": vocab.text_size, "image_offset": vocab.image_offset}
    ends = {"bos_token_id": vocab.special("<doc>"), "eos_token_id": vocab.special("</doc>"), "pad_token_id": vocab.pad}
    _, library = _write_transformers(decoder, model.text, out, dtype, keys | ends)
    return {**keys, "rows": vocab.size, **library}


def export_transformers_language_model(experiment: TextExperiment, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A backbone and its tokenizer for `transformers`; the same numbers as `export_language_model`."""
    text, start = experiment.text, document_start(experiment.text)
    keys = {"eos_token_id": text.document_end} | ({} if start is None else {"bos_token_id": start})
    written, library = _write_transformers(experiment.module.decoder, text, out, dtype, keys, begin=True)
    return {**library, **language_model_numbers(written, text, open_split(experiment.shards, "val"))}


def _write_transformers(
    decoder: Backbone, text: TextTokenizer, out: Path, dtype: torch.dtype, keys: dict[str, int], begin: bool = False
) -> tuple[Backbone, dict[str, Any]]:
    """Writes model and tokenizer, all or nothing; the decoder as written, and entries of the card.

    With `begin`, `AutoTokenizer` puts the beginning of documents in front of a text.
    """
    with atomic_folder(out) as folder:
        written = save_transformers(decoder, folder, dtype, keys)
        if text.path.suffix == ".json":
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": decoder.config.seq_len}
            write_tokenizer(text, folder, "tokenizer", settings, begin)
            tokenizer = "tokenizer.json, for AutoTokenizer"
        else:
            name = write_tokenizer(text, folder, "text_tokenizer").name
            tokenizer = f"{name}, for sentencepiece.SentencePieceProcessor; AutoTokenizer does not read it"
        (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    library = {"architecture": architecture, "transformers": require_transformers(FORMAT).__version__}
    return written, library | {"text_tokenizer": tokenizer}


# Format -> task -> exporter.
FORMATS: dict[str, dict[str, Callable[[Any, Path, torch.dtype], dict[str, Any]]]] = {
    "native": {
        "text_to_image": export_decoder,
        "unconditional": export_decoder,
        "text": export_language_model,
        "image_tokenizer": export_image_tokenizer,
    },
    "transformers": {
        "text_to_image": export_transformers_decoder,
        "unconditional": export_transformers_decoder,
        "text": export_transformers_language_model,
    },
}


def language_model_numbers(decoder: Backbone, text: TextTokenizer, split: datasets.Dataset) -> dict[str, Any]:
    """Held-out loss of a backbone and ten of its completions (temperature 0.8, fixed seeds)."""
    nll, bytes_, tokens = held_out_sums(decoder, split)
    completions = {}
    for seed, opening in enumerate(OPENINGS):
        ids = torch.tensor(text.encode(opening))
        room = min(COMPLETION_TOKENS, decoder.config.seq_len - len(ids))
        added = continue_text(decoder, ids, room, text.document_end, seed, temperature=0.8)
        # Rows that pad a backbone's vocabulary have no piece in its tokenizer.
        pieces = [token for token in (*ids.tolist(), *added.tolist()) if token < text.vocab_size]
        completions[opening] = text.decode(pieces)[len(opening) :]
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


def held_out_sums(decoder: Backbone, split: datasets.Dataset) -> tuple[float, int, int]:
    """Summed nll in nats, bytes and tokens of a text split, each row a window of its own."""
    nll, bytes_, tokens = 0.0, 0, 0
    with torch.no_grad(), progress("measuring held-out text", len(split), unit="rows") as advance:
        for start in range(0, len(split), SCORE_BATCH):
            rows = split[start : start + SCORE_BATCH]
            ids_BT = torch.from_numpy(np.stack(rows["text_ids"]).astype(np.int64))
            nll_N = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:]).nll_N
            nll += float(nll_N.double().sum())
            tokens += nll_N.numel()
            bytes_ += int(np.sum(rows["bytes"]))
            advance(len(ids_BT))
    return nll, bytes_, tokens


def tokenizer_numbers(tokenizer: VQTokenizer, images: ImageBatches) -> dict[str, Any]:
    """PSNR and share of codes in use of held-out images; what words say, of a tokenizer whose codes are words.

    For scenes also what the checker reads from reconstructions, and what a code tells of its cell.
    """
    squares, images_seen = 0.0, 0
    used = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    read_back: list[dict[str, bool | None]] = []
    parts: list[torch.Tensor] = []
    captions: list[str] = []
    everything = frozenset(ATTRIBUTES)
    for start in range(0, len(images), SCORE_BATCH):
        indices = range(start, min(start + SCORE_BATCH, len(images)))
        read = [images.read(index) for index in indices]
        images_BCHW = stack_images([pixels for _, pixels in read])
        ids_BN = tokenizer.encode(images_BCHW)
        again_BCHW = tokenizer.decode(ids_BN)
        parts.append(ids_BN.cpu())
        if tokenizer.words is not None:
            captions += [pair.captions[0] for pair, _ in read]
        used += torch.bincount(ids_BN.flatten(), minlength=tokenizer.vocab_size)
        squares += float((images_BCHW.double() - again_BCHW.double()).square().mean(dim=(1, 2, 3)).sum()) / 255**2
        images_seen += len(indices)
        if isinstance(images.source, SceneSource):
            for (pair, _), image in zip(read, again_BCHW.permute(0, 2, 3, 1).numpy(), strict=True):
                meaning = pair.meaning
                assert meaning is not None
                asked = everything if meaning["family"] == "pair" else everything - {"relation"}
                read_back.append(check(image, meaning, asked))
    ids_RN = torch.cat(parts).numpy()
    told: dict[str, Any] = {}
    if tokenizer.words is not None:
        told["words_in_caption"] = words_in_captions(ids_RN, captions, tokenizer.words)
    if isinstance(images.source, SceneSource) and tokenizer.grid == (SIDE, SIDE):
        scenes = [images.source.scene(index) for index in range(len(images))]
        told["meaning"] = code_meaning(ids_RN.reshape(-1, SIDE, SIDE), scenes)
    return {
        "pictures": images_seen,
        **({"pictures_unusable": len(images.rejected)} if images.rejected else {}),
        "psnr_db": -10 * math.log10(squares / images_seen),
        "codes_used": float((used > 0).double().mean()),
        "parameters": sum(parameter.numel() for parameter in tokenizer.model.parameters()),
        "checker_right": {name: entry["right"] for name, entry in shares_right(read_back).items()},
        **told,
    }
