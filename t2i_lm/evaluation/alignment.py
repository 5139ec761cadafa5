"""Report of an alignment: its rows, retrieval, and the nearest text tokens of every image id (Section 3.2)."""

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2i_lm.data.shards.parts import open_split
from t2i_lm.evaluation.parts import part
from t2i_lm.experiment.build import AlignmentExperiment
from t2i_lm.models.aligned_rows import FILE, write_aligned_rows
from t2i_lm.models.contrastive import Neighbors, hubness, nearest_text_tokens
from t2i_lm.modules.alignment import AlignmentModule
from t2i_lm.runtime.loggers import add_text
from t2i_lm.runtime.tables import markdown_table
from t2i_lm.storage.writing import atomic_file

TABLE = "nearest_text_tokens.csv"
# Rows of the table in TensorBoard's text tab: the most frequent image ids.
SHOWN = 200


@torch.no_grad()
def alignment_report(experiment: AlignmentExperiment, folder: Path, report: dict[str, Any]) -> None:
    """Writes the aligned rows and the table; reports retrieval accuracy, hubness and row norms."""
    module = experiment.module
    image_ID, text_VD = module.embedding.image, module.embedding.text
    assert image_ID is not None
    with part(report, "aligned_rows"):
        write_aligned_rows(image_ID, text_VD, folder / FILE, experiment.text.sha256, experiment.image.sha256)
    with part(report, "retrieval"):
        report["retrieval"] = _retrieval(experiment, module)
    with part(report, "nearest_text_tokens"):
        spelled_VD = text_VD[: experiment.text.vocab_size]  # a backbone may have more rows than its tokenizer pieces
        neighbors = nearest_text_tokens(image_ID, spelled_VD, experiment.config.align.neighbors)
        report["nearest_text_tokens"] = asdict(hubness(neighbors, len(spelled_VD)))
        with part(report, "table"):
            rows = _table(experiment, neighbors)
            with atomic_file(folder / TABLE) as own, own.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
            shown = sorted(rows[1:], key=lambda row: -int(row[1]))[:SHOWN]
            add_text(experiment.config, folder, "nearest text tokens", markdown_table(rows[0], shown))
    norms = {"image": image_ID.norm(dim=1).mean(), "text": text_VD.norm(dim=1).mean()}
    report["row_norms"] = {name: float(value) for name, value in norms.items()}
    report |= module.scalars()


def _retrieval(experiment: AlignmentExperiment, module: AlignmentModule) -> dict[str, Any]:
    """Top-1 accuracy in the first validation batch, both directions; pairs of one caption or image are all right."""
    size = experiment.config.data.batch_size
    batch = experiment.data.val_set.__getitems__([(0, index) for index in range(size)])
    on_device = {
        key: value.to(module.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }
    image_BD, text_BD = module.bags(on_device)
    cosine_BB = image_BD @ text_BD.T
    same_BB = (on_device["hashes_B2"][:, None] == on_device["hashes_B2"][None]).any(dim=-1)
    return {
        name: float(same_BB.gather(1, matrix_BB.argmax(dim=1, keepdim=True)).float().mean())
        for name, matrix_BB in (("image_to_text", cosine_BB), ("text_to_image", cosine_BB.T))
    } | {"candidates": size}


def _table(experiment: AlignmentExperiment, neighbors: Neighbors) -> list[list[Any]]:
    """Header and one row per image id: its count in the training split, its nearest tokens and their cosines."""
    uses = np.zeros(len(neighbors.ids_IK), dtype=np.int64)
    for rows in open_split(experiment.shards, "train").iter(batch_size=4096):
        uses += np.bincount(np.stack(rows["image_ids"]).ravel(), minlength=len(uses))
    count = neighbors.ids_IK.shape[1]
    header = ["image id", "uses", *(f"{name} {k + 1}" for k in range(count) for name in ("token", "cosine"))]
    table: list[list[Any]] = [header]
    pieces: dict[int, str] = {}
    for image_id, (ids, cosines) in enumerate(
        zip(neighbors.ids_IK.tolist(), neighbors.cosine_IK.tolist(), strict=True)
    ):
        row: list[Any] = [image_id, int(uses[image_id])]
        for token, cosine in zip(ids, cosines, strict=True):
            row += [pieces.setdefault(token, experiment.text.decode([token])), f"{cosine:.4f}"]
        table.append(row)
    return table
