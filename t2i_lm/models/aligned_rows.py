"""Image rows trained by a contrastive alignment run, the initial values of `new_rows: aligned`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.storage.reading import reason
from t2i_lm.storage.resumable import share
from t2i_lm.storage.run_folder import run_folders
from t2i_lm.storage.tensor_files import read_tensors, tensors_sha256, write_tensors

FILE = "aligned_rows.safetensors"
TENSOR, TEXT_ROWS = "image", "text_rows_sha256"
# Values of `init` whose text rows are the language model's.
PRETRAINED_TEXT_ROWS = ("pretrained", "aligned", "embeddings_only")
# `aligned_rows: latest` is this experiment's newest run.
EXPERIMENT = "align"


def write_aligned_rows(rows_ID: Tensor, text_VD: Tensor, path: Path, text_sha256: str, image_sha256: str) -> None:
    """Writes image rows (I, D) in float32, with the hashes of both tokenizers and of the text rows."""
    hashes = {"text_tokenizer": text_sha256, "image_tokenizer": image_sha256}
    metadata = {"tokenizers": json.dumps(hashes), TEXT_ROWS: _sha256(text_VD)}
    write_tensors(path, {TENSOR: rows_ID.detach().float().cpu()}, metadata)
    share(path)


def _sha256(rows_VD: Tensor) -> str:
    return tensors_sha256({"text": rows_VD.detach().float().cpu()})


def find_aligned_rows(config: ExperimentConfig) -> Path:
    """Path of the file for `aligned_rows`: a file, a run folder, or `latest` for the newest alignment.

    Raises:
        ValueError: if there is none, with the command that makes one.
    """
    named = config.aligned_rows
    assert named is not None
    if named == "latest":
        runs = run_folders(Path(config.run.dir), EXPERIMENT, config.scale)
        files = [run / FILE for run in runs if (run / FILE).is_file()]
        if not files:
            raise ValueError(
                f"aligned_rows=latest: no finished run of {EXPERIMENT} at scale {config.scale} in {config.run.dir}; "
                f"to make one: python -m t2i_lm.train experiments/{EXPERIMENT}.yaml --scale {config.scale} "
                f"run.dir={config.run.dir}"
            )
        return files[-1]
    path = Path(named) / FILE if Path(named).is_dir() else Path(named)
    if not path.is_file():
        raise ValueError(f"aligned_rows={named}: no {path}; expected an {FILE}, an alignment's run folder, or latest")
    return path


def resolve_aligned_rows(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the file that `aligned_rows` means, which a run's config.yaml then names; same where unused.

    Raises:
        ValueError: if there is none.
    """
    used = config.image_rows == "aligned" and config.task in ("text_to_image", "unconditional")
    if not used or config.aligned_rows is None:
        return config
    return replace(config, aligned_rows=str(find_aligned_rows(config)))


def read_aligned_rows(config: ExperimentConfig, text_VD: Tensor, text_sha256: str, image_sha256: str) -> Tensor:
    """Reads the rows (I, D) of `aligned_rows`.

    Args:
        config: names them; with an `init` of pre-trained text rows they must have been aligned with `text_VD`.
        text_VD: the text rows of the model.
        text_sha256: of its text tokenizer.
        image_sha256: of its image tokenizer.

    Raises:
        ValueError: if there are none, or they were trained with other tokenizers or text rows.
    """
    path = find_aligned_rows(config)
    try:
        tensors, metadata = read_tensors(path)
        hashes = dict(json.loads(metadata.get("tokenizers", "{}")))
        rows_ID = tensors[TENSOR]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"aligned_rows: {path} cannot be read: {reason(error)}") from error
    for name, sha256 in (("text_tokenizer", text_sha256), ("image_tokenizer", image_sha256)):
        if hashes.get(name) != sha256:
            raise ValueError(
                f"aligned_rows: {path} was made with another {name} (sha256 {str(hashes.get(name))[:12]}, "
                f"this run's is {sha256[:12]}); align again with this one"
            )
    aligned_with = metadata.get(TEXT_ROWS)
    if aligned_with is None:
        print(f"note: aligned_rows: {path} does not say which text rows it was aligned with", file=sys.stderr)
    elif config.init in PRETRAINED_TEXT_ROWS and aligned_with != _sha256(text_VD):
        raise ValueError(
            f"aligned_rows: {path} was aligned with the text rows of another language model than "
            f"backbone.path={config.backbone.path}; align again with this one"
        )
    return rows_ID
