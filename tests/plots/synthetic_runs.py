"""Synthetic run folders with curves from formulas, for tests of figures."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from t2i_lm.storage.run_folder import TOKENS

EXPERIMENTS = {"t2i_pretrained": "pretrained", "t2i_scratch": "random", "uncond_scratch": "random"}
EXPERIMENTS |= dict.fromkeys(
    ("uncond_pretrained", *(f"uncond_tune_{name}" for name in ("embed", "norm", "first_half", "ffn"))), "pretrained"
)
EXPERIMENTS |= {
    f"t2i_{name}": name for name in ("gaussian", "mimetic", "shuffled", "embeddings_only", "body_only", "aligned")
}
EXPERIMENTS |= dict.fromkeys(("remedy_replay", "remedy_l2_sp"), "pretrained")
EXPERIMENTS |= dict.fromkeys(("align", "align_shuffled"), "pretrained")
# Targets of each modality in a step of 32 sequences of 128 positions, and their loss: a floor, how
# far above it each initialization starts, and the steps in which that shrinks by e.
BATCH, LENGTH = 32, 128
RELEARNING_STEPS = [0, 5, 10]
CURVES: dict[str, tuple[int, float, dict[str, float], float]] = {
    "text": (610, 1.05, {"t2i_pretrained": 3.1, "t2i_scratch": 7.4}, 9.0),
    "image": (2048, 1.7, {"t2i_pretrained": 6.5, "t2i_scratch": 6.6}, 6.0),
    "boundary": (160, 0.01, {"t2i_pretrained": 8.0, "t2i_scratch": 8.5}, 4.0),
}


def write_run(
    root: Path,
    name: str,
    stamp: str = "20260115-093000",
    *,
    data_hash: str | None = "0123456789abcdef",
    config: dict[str, Any] | None = None,
    steps: int | None = None,
    finished: bool = True,
    floor: float | None = 1.0043,
    forgotten: float | None = None,
    splits: tuple[str, ...] = (),
) -> Path:
    """Writes a run folder like that of a training.

    Args:
        root: folder of runs.
        name: experiment.
        stamp: date and time that name the folder.
        data_hash: entry of env.json; None omits it.
        config: values by dotted key that differ from the defaults.
        steps: steps done; None for all of `trainer.max_steps`.
        finished: whether a report is written.
        floor: `text_floor_nll` of the report.
        forgotten: increase of the held-out text loss by the last step; None writes no measurement.
        splits: names of validation splits, whose losses differ; empty for one validation set.
    """
    settings = _config(name)
    for key, value in (config or {}).items():
        *parents, leaf = key.split(".")
        tree = settings
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[leaf] = value
    folder = root / name / f"{stamp}-{settings['scale']}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    environment = {"git": "a" * 40, "stream_hash": "b" * 64, "precision": "32-true"}
    if data_hash is not None:
        environment["data_hash"] = data_hash
    (folder / "env.json").write_text(json.dumps({**environment, "train_samples": 20000}))
    done = settings["trainer"]["max_steps"] if steps is None else steps
    lines = _lines(name, settings, done)
    if splits:
        for line in [line for line in lines if "val" in line]:
            val = line.pop("val")
            line |= {f"val/{split}": _harder(val, 1 + number / 20) for number, split in enumerate(sorted(splits)[::-1])}
    if forgotten is not None:
        for line, change in ((_head(0, settings), 0.0), (_head(done, settings), forgotten)):
            lines.append(line | {"forgetting": forgetting_entry(change)})
        lines.sort(key=lambda line: line["step"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if finished:
        val = [line for line in lines if any(key.startswith("val") for key in line)][-1]
        report = {"experiment": name, "steps": done, "text_floor_nll": floor}
        report |= {key: entry for key, entry in val.items() if key.startswith("val")}
        report |= {"image_floor_nll": 0.1} if splits else {}
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def write_tokens(folder: Path) -> None:
    """Two images with their ids and reconstructions, for Figure 1."""
    images = np.full((2, 64, 64, 3), 200, np.uint8)
    (folder / TOKENS).parent.mkdir(exist_ok=True)
    np.savez_compressed(
        folder / TOKENS,
        originals=images,
        ids=np.arange(128).reshape(2, 8, 8),
        reconstructions=images - 10,
        captions=np.array(["A red circle.", "A blue star."]),
        rows=np.array([4096, 512, 256]),
    )


def write_relearning(run: Path, start: float, **made_with: object) -> None:
    """Writes a result of `evaluate --relearn` whose curve begins at `start`."""
    curve = {"nll": [start, start - 2, start - 3], "se": [0.1] * 3}
    controls = {"random weights": {"nll": [8.8, 7.6, 7.0], "se": [0.1] * 3}}
    folder = run / "evaluations" / "last"
    folder.mkdir(parents=True)
    content = {
        "steps": RELEARNING_STEPS,
        "nll": {"run": curve, **controls},
        "made_with": {"text": "a.txt", **made_with},
    }
    (folder / "relearn.json").write_text(json.dumps(content))


def write_probe(runs: Mapping[str, Path], name: str, **changed: Any) -> Path:
    """Writes a record of `python -m t2i_lm.probe` on runs by label; `changed` are values of the last one's entry."""
    first, *others = runs.values()
    folder = first / "probes" / ("+".join(other.name for other in others) or "alone")
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    for label, run in runs.items():
        config = yaml.safe_load((run / "config.yaml").read_text())
        known[label] = {"run": str(run), **{key: config[key] for key in ("name", "init", "seed")}, "step": 300}
        known[label] |= {"checkpoint": "step-00000300.ckpt", "checkpoint_sha256": "1" * 64}
        known[label]["data_hash"] = json.loads((run / "env.json").read_text()).get("data_hash")
    known[label] |= changed
    content: dict[str, Any] = {"probe": name, "title": name.title(), "varied": []}
    content["sentence"] = f"{name} found (n = 7)."
    content |= {"caption": f"{name.title()}. 7 sequences.", "runs": known, "made_with": {"started": "2026-03-02"}}
    content |= {"settings": {"sequences": 64, "batches": 8}, "numbers": {}}
    Image.new("RGB", (80, 40), "white").save(folder / f"{name}.png")
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


def read_lines(folder: Path, key: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with a key, read without the package under test."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def _config(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "task": "text_to_image",
        "scale": "demo",
        "seed": 0,
        "init": EXPERIMENTS[name],
        "backbone": {"path": "asset:lm_rotary", "config": None},
        "text_tokenizer": {"path": "asset:text_tokenizer.model"},
        "image_tokenizer": {"path": "asset:image_tokenizer", "size": 64},
        "data": {
            "source": "scenes",
            "path": None,
            "train_size": 20000,
            "batch_size": BATCH,
            "length": LENGTH,
        },
        "optim": {"lr": 0.002, "warmup_steps": 20},
        "trainer": {"max_steps": 300, "val_check_interval": 100, "threads": 1},
        "log": {"interval": 5, "ema": 0.95},
        "run": {"dir": "runs"},
    }


def _lines(name: str, config: dict[str, Any], done: int) -> list[dict[str, Any]]:
    """A validation before training, then a line per interval and the due validations."""
    noise = random.Random(f"{name}/{config['seed']}")
    interval, alpha = config["log"]["interval"], config["log"]["ema"]
    averages: dict[str, float] = {}
    lines = [_head(0, config) | {"val": _split(name, 0, 1000 / BATCH, noise, 0.0)}]
    for step in range(1, done + 1):
        head = _head(step, config)
        if step % interval == 0:
            entries = _split(name, step - interval / 2, interval, noise, 0.02)
            for modality, entry in entries.items():
                old = averages.get(modality, 0.0)
                averages[modality] = alpha * old + (1 - alpha) * entry["nll"]
                entry["nll_ema"] = averages[modality] / (1 - alpha ** (step // interval))
                entry["ppl_ema"] = math.exp(entry["nll_ema"])
            scalars = {"scalars": {"logit_scale": min(100.0, 14.0 + step)}} if name.startswith("align") else {}
            lines.append(head | {"train": entries, "interval": interval, "ema": alpha, **scalars})
        if step % config["trainer"]["val_check_interval"] == 0:
            lines.append(head | {"val": _split(name, step, 1000 / BATCH, noise, 0.0)})
    return lines


def forgetting_entry(change: float) -> dict[str, Any]:
    """A measurement of two held-out texts and one task."""
    task = {"text_rows": {"accuracy": 0.6 - change / 20, "se": 0.05, "change": -change / 20, "change_se": 0.03}}
    completions = {"fact": {"prompt": "Simply put", "masked": f"it | {change}", "unmasked": "<image 3>" * 9}}
    return {
        "text": _heldout("novels", 4.0, change),
        "second_text": _heldout("nonfiction", 4.5, change),
        "tasks": {"copa": task | {"chance": 0.5}},
        "completions": completions,
    }


def _heldout(name: str, nll: float, change: float) -> dict[str, Any]:
    """Losses of a held-out text before training and `change` later."""
    rows = {
        rows: {"nll": nll + more + change, "ppl": math.exp(nll + more + change), "se": 0.05, "change": change}
        | {"change_se": 0.01 * change, "top1": 0.25 - change / 20, "top1_se": 0.01}
        | {"best_temperature": {"temperature": 1 + change, "nll": nll + more + change / 2, "se": 0.05}}
        for rows, more in (("text_rows", 0.0), ("all_rows", 0.1))
    }
    floors = {"uniform": 8.318, "unigram": 6.5, "random_weights": 8.8}
    return {**rows, "floors": {key: {"nll": value} for key, value in floors.items()}, "name": name, "targets": 512}


def _head(step: int, config: dict[str, Any]) -> dict[str, Any]:
    samples = step * config["data"]["batch_size"]
    tokens = samples * config["data"]["length"]
    return {
        "step": step,
        "samples": samples,
        "tokens_nominal": tokens,
        "tokens_real": int(0.79 * tokens),
        "lr": config["optim"]["lr"],
        "time": 1.8e9 + step,
    }


def _split(name: str, step: float, steps: float, noise: random.Random, spread: float) -> dict[str, dict[str, float]]:
    """Entries of each modality and of the two totals."""
    entries = {}
    for modality, (targets, floor, heights, pace) in CURVES.items():
        slow = (0.6 if name == "t2i_pretrained" else 0.63 + 0.2 * name.startswith("uncond_tune")) * math.exp(
            -step / 200
        )
        loss = floor + heights.get(name, 6.0) * math.exp(-step / pace) + slow * (modality != "boundary")
        count = int(targets * steps)
        entries[modality] = _entry(loss * (1 + spread * noise.gauss(0, 1)) * count, count)
    for total, parts in (("all", tuple(CURVES)), ("all_no_boundary", ("text", "image"))):
        sums = [sum(entries[part][key] for part in parts) for key in ("nll_sum", "count")]
        entries[total] = _entry(sums[0], int(sums[1]))
    return entries


def _harder(val: dict[str, Any], factor: float) -> dict[str, Any]:
    """A validation with losses multiplied by a factor."""
    return {name: _entry(factor * entry["nll_sum"], entry["count"]) for name, entry in val.items()}


def _entry(nll_sum: float, count: int) -> dict[str, float]:
    nll = nll_sum / count
    return {"nll_sum": nll_sum, "count": count, "nll": nll, "ppl": math.exp(nll)}
