"""What an image id tells of its cell of a scene: the measure of how much meaning the codes of a tokenizer carry.

Shapes: `R` images, `H`, `W` the grid of ids, `N` cells of all images.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t2i_lm.data.scenes.oracle import GROUNDS, SHAPES, SIDE, scene_ids
from t2i_lm.data.scenes.scene import COLOURS, KINDS, SIZES, Scene, scene_of
from t2i_lm.tokenizers.entropy import conditional_entropy
from t2i_lm.tokenizers.layout import IntArray


def scenes_of(meanings: Sequence[str]) -> list[Scene] | None:
    """Scenes from the column `meaning` of shards; None of other data, and of the first version of the scenes."""
    try:
        return [scene_of(json.loads(text)) for text in meanings]
    except ValueError:
        return None


def cell_names(scene: Scene) -> dict[str, npt.NDArray[np.int64]]:
    """Numbers (SIDE, SIDE) of what each cell shows, by attribute; -1 where it has none.

    `name` is the color of the ground, or size, color and kind of the shape; `ground` is of cells without a shape,
    `colour`, `kind` and `size` of cells of one. A cell of a shape may show its edge alone.
    """
    ids_HW = scene_ids(scene)
    shape_HW = np.where(ids_HW < len(GROUNDS), -1, (ids_HW - len(GROUNDS)) // 4)
    on_shape_HW = shape_HW >= 0
    numbers = [
        (list(COLOURS).index(colour), KINDS.index(kind), list(SIZES).index(size)) for colour, kind, size in SHAPES
    ]
    of_shape = dict(zip(("colour", "kind", "size"), np.array(numbers).T, strict=True))
    return {
        "name": np.where(on_shape_HW, len(GROUNDS) + shape_HW, ids_HW),
        "ground": np.where(on_shape_HW, -1, ids_HW),
        **{name: np.where(on_shape_HW, values[shape_HW], -1) for name, values in of_shape.items()},
    }


def code_meaning(ids_RHW: IntArray, scenes: Sequence[Scene]) -> dict[str, dict[str, Any]]:
    """For each attribute of `cell_names`, how much the id of a cell alone tells of it.

    Returns:
        Of each attribute: `bits`, its entropy; `explained`, the share of it that ids explain (mutual information over
        entropy, each with the Miller-Madow correction); `guessed`, the share of cells of every second image whose
        value is the most frequent one of their id in the other images, and `chance`, of the most frequent value of all;
        `cells` that have the attribute. One image has neither `guessed` nor `chance`.
    """
    assert ids_RHW.shape == (len(scenes), SIDE, SIDE)
    named = [cell_names(scene) for scene in scenes]
    fitted_R = np.arange(len(scenes)) % 2 == 0
    found = {}
    for attribute in named[0]:
        values_RHW = np.stack([names[attribute] for names in named])
        has_RHW = values_RHW >= 0
        values_N, ids_N = values_RHW[has_RHW], ids_RHW[has_RHW]
        fitted_N = np.broadcast_to(fitted_R[:, None, None], has_RHW.shape)[has_RHW]
        bits = conditional_entropy(values_N).bits
        left = min(conditional_entropy(values_N, ids_N).bits, bits)
        found[attribute] = {
            "bits": bits,
            "explained": 1 - left / bits if bits else 0.0,
            **({} if fitted_R.all() else _guesses(values_N, ids_N, fitted_N)),
            "cells": len(values_N),
        }
    return found


def _guesses(values_N: IntArray, ids_N: IntArray, fitted_N: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Shares of the cells outside the fitted ones that are guessed from their id, and without it."""
    counts = np.zeros((int(ids_N.max()) + 1, int(values_N.max()) + 1), dtype=np.int64)
    np.add.at(counts, (ids_N[fitted_N], values_N[fitted_N]), 1)
    most = int(counts.sum(axis=0).argmax())
    guess = np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), most)
    scored = ~fitted_N
    return {
        "guessed": float((guess[ids_N[scored]] == values_N[scored]).mean()),
        "chance": float((values_N[scored] == most).mean()),
    }
