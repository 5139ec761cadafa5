"""What probes share: finished runs with their shards, models and sequences, and the form of a result.

Shapes: `S` sequences, `T` positions.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from callbacks.checkpoints import step_of
from callbacks.files.checkpoint_io import digests
from t2i_lm.comparison.comparability import ORDER, require_comparable
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.datamodules import PairBatches
from t2i_lm.data.shards.format import STREAM, read_index, validation_splits
from t2i_lm.data.shards.parts import Parts
from t2i_lm.data.shards.remote import is_url
from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.experiment.build import ImageModel
from t2i_lm.experiment.restore import image_config, load_initial, load_trained, newest_checkpoint
from t2i_lm.plots.panels import STYLE, ArmStyle, arm_style, numbered_style, remove_caption, save_figure
from t2i_lm.storage.run_folder import PROBES, Run, environment, find_run, read_run
from t2i_lm.storage.sealed import sealed
from t2i_lm.storage.writing import atomic_file, problem, write_atomic
from t2i_lm.tokenizers.layout import ImageLayout, Layout

State = Literal["initial", "trained"]
# Modalities that have rows, positions and losses of their own.
PROBED = ("text", "image")
LONGEST = 200  # characters of a folder's name
RECORD_DPI = 150


class NotAvailableError(ValueError):
    """A probe that these runs have nothing for."""


@dataclass(frozen=True)
class ProbedRun:
    """A finished run of task=text_to_image or unconditional.

    Attributes:
        label: its name in numbers and legends, unique among the runs.
        look: of its curves.
        checkpoint: the newest intact one.
    """

    label: str
    look: ArmStyle
    run: Run
    config: ExperimentConfig
    checkpoint: Path

    @cached_property
    def shards(self) -> Path:
        """The folder of its token shards; raises a NotAvailableError if there is none."""
        return find_shards(self.run, self.config)

    @property
    def step(self) -> int:
        """Optimizer steps of the checkpoint."""
        return step_of(self.checkpoint)

    @property
    def data_hash(self) -> str:
        """Of the shards."""
        return str(self.run.environment["data_hash"])

    @property
    def held_out(self) -> str:
        """The primary validation split."""
        return validation_splits(self.shards)[0]

    def model(self, state: State) -> ImageModel:
        """The model before its first step, or with the checkpoint's weights; evaluated in float32, not compiled.

        Raises:
            ValueError: if the files it is made of are gone or have changed.
        """
        folder = self.run.folder
        model = load_initial(folder) if state == "initial" else load_trained(folder, self.checkpoint)
        for part in model.decoder.modules():
            part._compiled_call_impl = None
        return model

    def split(self, name: str) -> Parts:
        """A split of the shards.

        Raises:
            NotAvailableError: if the run has no shards, or streamed the training split.
            ValueError: if there is none, or a shard is missing or damaged.
        """
        index = read_index(self.shards) or {}
        if STREAM in index and name == "train":
            raise NotAvailableError(
                f"{self.run.folder}: its training rows were made while training (data.source=hub_stream) and not kept"
            )
        if name in index.get("splits", {}):
            return Parts(self.shards, name)
        raise ValueError(f"{self.shards} has no split {name}")

    def sequences(self, layout: Layout | ImageLayout, count: int, split: str) -> Tensor:
        """At most `count` evenly spaced sequences of a split, as validation forms them: joint ids (S, T).

        Padded alike whatever the run's `data.pad_to_multiple_of`, so that runs have equal ones.
        """
        batches = PairBatches(self.split(split), layout, "first", self.config.seed, multiple=1)
        chosen = evenly_spaced_indices(len(batches), count)
        ids_ST: Tensor = batches.__getitems__([(0, index) for index in chosen])["ids_BT"]
        return ids_ST


@dataclass(frozen=True)
class Settings:
    """Sizes of probes.

    Attributes:
        sequences: held-out sequences whose states and attention are computed.
        batches: training batches whose gradients are computed, of at most `batch` sequences.
        rows: rows of the training split whose tokens are counted.
    """

    sequences: int = 64
    batches: int = 8
    batch: int = 8
    rows: int = 50_000


@dataclass(frozen=True)
class ProbeResult:
    """A probe's result.

    Attributes:
        title: of the figure.
        sentence: the result in words.
        how: sentences of the caption: what is shown, and of how much data.
        numbers: all values, JSON.
        draw: the figure with a caption.
    """

    title: str
    sentence: str
    how: str
    numbers: dict[str, Any]
    draw: Callable[[str], Figure]

    def caption(self, runs: Sequence[ProbedRun]) -> str:
        """Title, `how` and provenance."""
        made = "; ".join(f"{one.look.label}: {one.run.name}/{one.run.folder.name}, step {one.step:,}" for one in runs)
        revisions = sorted({str(one.run.environment.get("git") or "unknown")[:7] for one in runs})
        origin = f"data hash {runs[0].data_hash}, code of training {', '.join(revisions)}"
        return f"{self.title}. {self.how} Runs: {made}; {origin}."

    def write(
        self, folder: Path, name: str, runs: Sequence[ProbedRun], settings: Settings, varied: Sequence[str] = ()
    ) -> list[Path]:
        """Writes NAME.png, NAME.pdf and NAME.json, and a record in the first run's folder; returns their paths."""
        caption = self.caption(runs)
        figure = self.draw(caption)
        paths = save_figure(figure, folder / name, self.title, caption)
        content = sealed(
            finite(
                {
                    "probe": name,
                    "title": self.title,
                    "sentence": self.sentence,
                    "caption": caption,
                    "runs": {one.label: provenance(one) for one in runs},
                    "settings": vars(settings),
                    "varied": list(varied),
                    "made_with": environment(),
                    "numbers": self.numbers,
                }
            )
        )
        target = folder / f"{name}.json"
        write_atomic(target, json.dumps(content, indent=2, allow_nan=False) + "\n")
        return [*paths, target, *_write_record(record_folder([one.run.folder for one in runs]), name, figure, content)]


def record_folder(runs: Sequence[Path]) -> Path:
    """The folder, in the first run's, of the probes of some runs: named after the others."""
    first, *others = runs
    return first / PROBES / ("+".join(other.name for other in others)[:LONGEST] or "alone")


def _write_record(folder: Path, name: str, figure: Figure, content: dict[str, Any]) -> list[Path]:
    """Writes what `python -m t2i_lm.report` shows: the figure without its caption, then the numbers."""
    record, image = folder / f"{name}.json", folder / f"{name}.png"
    remove_caption(figure)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # never beside another figure
        with rc_context(STYLE), atomic_file(image) as own:
            figure.savefig(own, dpi=RECORD_DPI)
        write_atomic(record, json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n")
    except OSError as error:
        print(f"note: {problem(error)}; the report lacks this probe", file=sys.stderr)
        return []
    return [record]


def provenance(one: ProbedRun) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    known = one.run.environment
    return {
        "run": str(one.run.folder),
        "name": one.run.name,
        "init": one.config.init,
        "seed": one.config.seed,
        "step": one.step,
        "checkpoint": one.checkpoint.name,
        "checkpoint_sha256": next(iter(digests(one.checkpoint)), None),
        **{key: known.get(key) for key in ("data_hash", "tokenizers", "backbone", "git", "git_dirty")},
    }


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are null."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_runs(paths: Sequence[Path], varied: Sequence[str] = ()) -> list[ProbedRun]:
    """The runs at some paths, checked.

    Args:
        paths: run folders, or folders of runs, of which the newest is taken.
        varied: keys, beside the arm, in which they differ by design.

    Raises:
        ValueError: if a run is named twice, of another task or unfinished, has no checkpoint, or if runs cannot be
            compared.
    """
    folders = [find_run(path) for path in paths]
    if repeated := {folder for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1}:
        raise ValueError(f"{min(repeated)} is given twice")
    runs = [read_run(folder) for folder in folders]
    configs = [image_config(run.folder) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        if run.report is None:
            step = run.metrics[-1]["step"] if run.metrics else 0
            raise ValueError(
                f"{run.folder} is unfinished (step {step:,} of {config.trainer.max_steps:,}): only finished runs are "
                "probed; train it to its end with --resume"
            )
    looks = _looks(runs, configs)
    order = (ORDER,) if "seed" in varied else ()
    require_comparable(dict(zip(looks, runs, strict=True)), (*varied, *order))
    opened = [
        ProbedRun(label, look, run, config, newest_checkpoint(run.folder))
        for (label, look), run, config in zip(looks.items(), runs, configs, strict=True)
    ]
    if len({one.step for one in opened}) > 1 and "trainer.max_steps" not in varied:
        steps = ", ".join(f"{one.label} {one.step:,}" for one in opened)
        raise ValueError(f"the newest intact checkpoints are of different steps: {steps}")
    return opened


def _looks(runs: Sequence[Run], configs: Sequence[ExperimentConfig]) -> dict[str, ArmStyle]:
    """Label and look of each run: its arm, or its name and folder where several are of one arm."""
    arms = ["scratch" if config.init == "random" else config.init for config in configs]
    if len(set(arms)) == len(arms):
        return {arm: arm_style(arm) for arm in arms}
    labels = [f"{run.name}/{run.folder.name}" for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(run.folder) for run in runs]
    return {label: numbered_style(label, number) for number, label in enumerate(labels)}


def find_shards(run: Run, config: ExperimentConfig) -> Path:
    """The folder of a run's token shards, with its data hash: `data.path` of data.source=shards, or one in its cache.

    Nothing is prepared: shards made anew from data that has changed would not be those of the run.

    Raises:
        NotAvailableError: if there is none.
    """
    data = config.data
    expected = run.environment.get("data_hash")
    if expected is None:
        raise NotAvailableError(f"{run.folder}: its env.json has no data_hash, so its token shards cannot be found")
    stored = [Path(str(data.path))] if data.source == "shards" and not is_url(str(data.path)) else []
    cached = (file.parent for file in sorted(Path(data.cache_dir).glob("*/index.json")))
    for folder in (*stored, *cached):
        index = read_index(folder)
        if index is not None and index.get("data_hash") == expected:
            return folder
    if stored:
        raise NotAvailableError(
            f"{run.folder}: data.path={data.path} has no token shards of its data (data hash {expected}); restore them"
        )
    raise NotAvailableError(
        f"{run.folder}: data.cache_dir={data.cache_dir} has no token shards of its data (data hash {expected}); "
        "python -m t2i_lm.prepare makes them again where the data has not changed"
    )
