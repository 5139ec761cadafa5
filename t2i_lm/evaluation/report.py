"""The report of a finished run: final losses, and per task samples, prompt accuracy, caption preference, retrieval."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from callbacks import SampleBatch, WallTime
from callbacks.checkpoints import step_of
from t2i_lm.config.load import load_run
from t2i_lm.config.sections import SHARDED
from t2i_lm.data.scenes.scene import SIZE, scene_of
from t2i_lm.data.shards.parts import open_split
from t2i_lm.data.sources import SCENE_SPLITS
from t2i_lm.evaluation.alignment import TABLE, alignment_report
from t2i_lm.evaluation.forgetting import TABLE as COMPLETIONS
from t2i_lm.evaluation.forgetting import write_completions
from t2i_lm.evaluation.originals import originals, write_tokens
from t2i_lm.evaluation.parts import failed, measured, part
from t2i_lm.evaluation.scenes import accuracy_ceiling, caption_preference, loss_floors, prompt_accuracy
from t2i_lm.experiment.build import Experiment, ImageExperiment
from t2i_lm.experiment.restore import load_trained, load_trained_experiment, newest_checkpoint
from t2i_lm.experiment.shards import data_counts
from t2i_lm.generation.grid import captioned_grid, save_grid
from t2i_lm.generation.images import (
    ImageArray,
    caption_layout,
    decode,
    generate_images,
    generate_unconditional,
    seeds_of,
)
from t2i_lm.models.aligned_rows import FILE
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.token_rows import TokenRows
from t2i_lm.runtime.devices import uses_gpu
from t2i_lm.runtime.loggers import add_text
from t2i_lm.runtime.threads import default_threads
from t2i_lm.storage.run_folder import (
    ENVIRONMENT_DIGEST,
    METRICS_DIGEST,
    REPORT,
    TOKENS,
    VAL,
    Run,
    metrics_digest,
    read_environment,
    read_run,
    require_no_links,
)
from t2i_lm.storage.sealed import DIGEST, sealed
from t2i_lm.storage.writing import write_atomic

# Of the primary validation split; those of another split have its name appended.
GRID, ORIGINALS, RECONSTRUCTIONS = "samples/grid.png", "samples/originals.png", "samples/reconstructions.png"


def write_report(experiment: Experiment, folder: Path, steps: int, wall_s: float) -> dict[str, Any]:
    """Samples and measures as the task requires, writes report.json and prints the summary.

    A part that fails is `{"error": message}` in the report and one line on stderr; the others are computed.

    Args:
        experiment: the trained experiment.
        folder: its run folder.
        steps: optimizer steps taken.
        wall_s: seconds that training took over all sessions of the run, preparation left out.
    """
    run, config = read_run(folder), experiment.config
    last = run.metrics[-1] if run.metrics else {}
    report: dict[str, Any] = {
        "experiment": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "data_hash": experiment.index.get("data_hash"),
        **({"data": counts} if (counts := data_counts(experiment)) else {}),
        "steps": steps,
        "tokens_nominal": last.get("tokens_nominal"),
        "tokens_real": last.get("tokens_real"),
        "wall_s": round(wall_s, 1),
        **_last_validation(run),
    }
    if config.task in TASK_REPORTS:
        with part(report, config.task):
            TASK_REPORTS[config.task](experiment, folder, report)
    if run.records("forgetting"):
        report["forgetting"] = run.records("forgetting")[-1]["forgetting"]
        with part(report, "completions"):
            if tables := write_completions(run):
                add_text(config, folder, COMPLETIONS, tables[-1].read_text(encoding="utf-8"))
    digests = {METRICS_DIGEST: metrics_digest(folder), ENVIRONMENT_DIGEST: read_environment(folder).get(DIGEST)}
    report = sealed(report | {name: digest for name, digest in digests.items() if digest is not None})
    write_atomic(folder / REPORT, json.dumps(report, indent=2) + "\n")
    with part({}, "summary"):
        print_summary(report, folder)
    if parts := failed(report):
        again = f"python -m t2i_lm.evaluate --checkpoint {folder} --report"
        print(f"report: {', '.join(parts)} failed, all else is written; to compute it again: {again}", file=sys.stderr)
    return report


def _last_validation(run: Run) -> dict[str, Any]:
    """The last validation: `val`, or `val/NAME` for each of several splits."""
    names: list[str | None] = [*run.validation_splits] or [None]
    lines = {VAL if name is None else f"{VAL}/{name}": run.validations(name) for name in names}
    return {key: records[-1][VAL] if records else None for key, records in lines.items()}


def write_report_again(run: Path) -> dict[str, Any]:
    """Writes the report of a run that was trained to its last step, from its last checkpoint.

    Raises:
        ValueError: if steps remain, the last one has not been validated, or its data or tokenizers have changed.
    """
    require_no_links(run)
    checkpoint, config = newest_checkpoint(run), load_run(run)
    steps, last = step_of(checkpoint), config.trainer.max_steps
    validated = any(record["step"] == last for record in read_run(run).validations())
    if steps < last or not validated:
        left = (
            f"{checkpoint.name} is of step {steps:,} of {last:,}" if steps < last else f"step {last:,} is not validated"
        )
        raise ValueError(f"--report {run}: {left}; --resume finishes this run and writes its report")
    torch.set_num_threads(config.trainer.threads or default_threads())
    experiment = load_trained_experiment(run, checkpoint)
    if isinstance(experiment, ImageExperiment):
        experiment.module = load_trained(run, checkpoint).module
    if earlier := read_run(run).report:
        return write_report(experiment, run, steps, earlier["wall_s"])
    callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True).get("callbacks", {})
    seconds = (state["seconds"] for name, state in callbacks.items() if name.startswith(WallTime.__name__))
    return write_report(experiment, run, steps, next(seconds, 0.0))


def row_norms(decoder: Backbone) -> dict[str, float]:
    """Mean norm of the rows of every block: rows without gradient shrink under weight decay."""
    return {
        f"{matrix}.{block}": float(rows.detach().norm(dim=1).mean())
        for matrix in ("tok_embeddings", "output")
        for block in TokenRows.BLOCKS
        if (rows := getattr(getattr(decoder, matrix), block)) is not None
    }


def _for_sampling(experiment: ImageExperiment) -> None:
    """Puts the trained model into evaluation mode on the device that it was trained on."""
    settings = experiment.config.trainer
    experiment.module.eval()
    if uses_gpu(settings.accelerator):  # after training it lies on the CPU
        experiment.module.to("cuda")


def unconditional_report(experiment: ImageExperiment, folder: Path, report: dict[str, Any]) -> None:
    """Row norms and the floor of the loss; writes a grid of images sampled without a caption."""
    _for_sampling(experiment)
    config = experiment.config
    with part(report, "floors"):
        report |= loss_floors(config, experiment.text, experiment.layout.image_tokens)
    if count := min(config.samples.grid, config.samples.prompts):
        with part(report, "grid"):
            images_HW3 = generate_unconditional(experiment, seeds_of(config.seed, count))
            _save_grid(images_HW3, [""] * count, folder / GRID)
    with part(report, "row_norms"):
        report["row_norms"] = row_norms(experiment.decoder)


def text_to_image_report(experiment: ImageExperiment, folder: Path, report: dict[str, Any]) -> None:
    """Row norms, floors of the losses, and samples and measures of each validation split.

    Those of several splits are under their names (`iid`, `compositional`), those of one at the top level.
    """
    _for_sampling(experiment)
    report["text_floor_nll"] = None
    with part(report, "row_norms"):
        report["row_norms"] = row_norms(experiment.decoder)
    if "caption_tokens" in experiment.index["splits"]["train"]:  # streamed captions are not counted
        with part(report, "truncated_captions"):
            report["truncated_captions"] = truncated_share(experiment)
    with part(report, "floors"):
        report |= loss_floors(experiment.config, experiment.text, experiment.layout.image_tokens)
    first, *others = experiment.data.validation_splits
    if experiment.image.decodes and experiment.config.data.has_images:
        with part(report, "tokens"):
            write_tokens(experiment, first, folder / TOKENS)
    if not others:
        _split_report(experiment, folder, first, report, "")
    for split in (first, *others) if others else ():
        name = split.removeprefix(f"{VAL}/")
        with part(report, name):
            report[name] = {}
            _split_report(experiment, folder, split, report[name], "" if split == first else f"_{name}")


def _split_report(experiment: ImageExperiment, folder: Path, name: str, report: dict[str, Any], suffix: str) -> None:
    """Samples of a validation split's captions; for scenes, the measures that require a caption's meaning."""
    config, split = experiment.config, open_split(experiment.shards, name)
    count = min(config.samples.prompts, len(split))
    scenes = config.data.source == "scenes"
    checked = scenes and experiment.image.image_size == SIZE  # the only size that the checker reads
    grid, originals_grid, reconstructions = (
        folder / file.replace(".png", f"{suffix}.png") for file in (GRID, ORIGINALS, RECONSTRUCTIONS)
    )
    if count:
        rows = split[:count]
        captions = [experiment.text.decode(texts[0]) for texts in rows["text_ids"]]
        shown = min(config.samples.grid, count)
        with part(report, "samples"):
            images_HW3 = generate_images(experiment, captions, seeds_of(config.seed, count))
            report["samples"] = {"prompts": count}
            if shown:
                with part(report, "grid"):
                    _save_grid(images_HW3[:shown], captions[:shown], grid)
            if checked:
                meanings = [json.loads(str(text)) for text in rows["meaning"]]
                report["samples"]["accuracy"] = prompt_accuracy(images_HW3, meanings)
        if shown:
            with part(report, "reconstructions"):
                codes_BN = torch.from_numpy(np.stack(rows["image_ids"][:shown]).astype(np.int64))
                _save_grid(decode(experiment, codes_BN), captions[:shown], reconstructions)
            if config.data.has_images:
                with part(report, "originals"):
                    images_HW3 = originals(config, name, split[:shown], experiment.image.image_size)
                    _save_grid(images_HW3, captions[:shown], originals_grid)
    if scenes:
        if count and checked:
            with part(report, "ceiling"):
                scene_of(json.loads(str(split[0]["meaning"])))  # raises for scenes of an earlier version
                report["ceiling"] = accuracy_ceiling(experiment, SCENE_SPLITS[config.data.hold_out_pairs, name])
        with part(report, "preference"):
            held_out = split[: min(config.samples.preference_scenes, len(split))]
            report["preference"] = caption_preference(experiment, held_out["meaning"], held_out["image_ids"])


def _save_grid(images_HW3: Sequence[ImageArray], captions: Sequence[str], file: Path) -> None:
    if captions:
        file.parent.mkdir(exist_ok=True)
        save_grid(images_HW3, captions, file)


# By task: adds its parts to the report. Reports of other tasks have the losses only.
TASK_REPORTS: dict[str, Callable[[Any, Path, dict[str, Any]], None]] = {
    "text_to_image": text_to_image_report,
    "unconditional": unconditional_report,
    "align": alignment_report,
}


def sampler(experiment: Experiment) -> Callable[[], SampleBatch] | None:
    """Samples prompts of the primary split during training and scores scenes; None where there is nothing to sample."""
    config = experiment.config
    sharded = config.trainer.strategy in SHARDED  # no process has the whole model
    if sharded or config.task != "text_to_image" or not (config.samples.interval and config.samples.grid):
        return None
    assert isinstance(experiment, ImageExperiment)

    def draw() -> SampleBatch:
        rows = open_split(experiment.shards, experiment.data.validation_splits[0])[: config.samples.grid]
        captions = [experiment.text.decode(texts[0]) for texts in rows["text_ids"]]
        images_HW3 = generate_images(experiment, captions, seeds_of(config.seed, len(captions)))
        accuracy = {}
        if config.data.source == "scenes" and images_HW3[0].shape[0] == SIZE:
            meanings = [json.loads(str(text)) for text in rows["meaning"]]
            accuracy = {name: entry["right"] for name, entry in prompt_accuracy(images_HW3, meanings).items()}
        return SampleBatch(captioned_grid(images_HW3, captions), accuracy)

    return draw


def truncated_share(experiment: ImageExperiment) -> float:
    """Share of training captions longer than the text budget."""
    layout, _ = caption_layout(experiment)
    lengths = experiment.index["splits"]["train"]["caption_tokens"]
    over = sum(count for length, count in lengths.items() if int(length) > layout.text_budget)
    return float(over / max(1, sum(lengths.values())))


def print_summary(report: dict[str, Any], folder: Path) -> None:
    """Prints the final losses, the measured values, and the files of the run."""
    console = Console(markup=False, emoji=False)  # names may hold brackets
    table = Table(title=f"{report['experiment']} ({report['scale']}, seed {report['seed']})")
    names = [key.removeprefix(f"{VAL}/") for key in report if key.startswith(f"{VAL}/")]
    rows = [
        (f"{split} {name}".strip(), entry)
        for split in names or [""]
        for name, entry in (report[f"{VAL}/{split}" if split else VAL] or {}).items()
    ]
    losses = any(isinstance(entry, dict) for _, entry in rows)
    for column in ("validation", *(("nll (nats)", "perplexity", "targets") if losses else ("value",))):
        table.add_column(column, justify="left" if column == "validation" else "right")
    for label, entry in rows:
        if isinstance(entry, dict) and "nll" in entry:
            table.add_row(label, f"{entry['nll']:.4f}", f"{entry['ppl']:.2f}", f"{entry['count']:,}")
        elif not isinstance(entry, dict):
            table.add_row(label, f"{entry:.4f}")
    console.print(table)
    for modality in ("text", "image"):
        if (floor := report.get(f"{modality}_floor_nll")) is not None:
            console.print(f"floor of the {modality} loss (entropy of the generator): {floor:.4f} nats/token")
    for words, values in [(f", {name}", measured(report, name)) for name in names] or [("", report)]:
        right, preferred = measured(values, "samples").get("accuracy"), measured(values, "preference")
        if right:
            limits = measured(values, "ceiling").get("accuracy")
            _print_shares(console, f"right in samples{words} (at most)", right, "right", limits)
        if preferred:
            _print_shares(console, f"true caption preferred (chance 0.5){words}", preferred, "preferred")
    if note := measured(report, "forgetting").get("note"):
        console.print(f"forgetting: {note}", highlight=False, soft_wrap=True)
    for name in ("retrieval", "nearest_text_tokens"):
        if numbers := measured(report, name):
            console.print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    console.print(f"{report['steps']} steps in {report['wall_s']:.0f} s")
    grids = sorted(file.relative_to(folder).as_posix() for file in folder.glob(GRID.replace(".png", "*.png")))
    for name in (REPORT, "metrics.jsonl", *grids, TABLE, FILE):
        if (folder / name).exists():
            console.print(f"  {folder / name}", highlight=False, soft_wrap=True)


def _print_shares(
    console: Console, title: str, values: dict[str, Any], share: str, limits: dict[str, Any] | None = None
) -> None:
    """Prints one line: each value with its standard error, and its limit in brackets where there is one."""
    limit = {name: f" ({entry[share]:.0%})" for name, entry in (limits or {}).items()}
    parts = (f"{name} {entry[share]:.0%} +- {entry['se']:.0%}{limit.get(name, '')}" for name, entry in values.items())
    console.print(f"{title}: " + ", ".join(parts))
