"""The stages of the rehearsal: the commands that a user of the paper's scale runs, and what must come out of each."""

import json
import os
import re
import shutil
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_lm.storage.run_folder import CHECKPOINTS, EVENTS, METRICS, Run, read_run, run_folders
from tests.rehearsal.files import CHECKPOINT, COCO, CONFIG, INCEPTION, MOVQGAN, NEOX, PAIRS
from tests.rehearsal.stages import Commands, SignalAtStep, Stage, StageError, training_lines

ROOT = Path(__file__).parents[2]
PRETRAINED, SCRATCH = (Path("experiments", f"{name}.yaml") for name in ("t2i_pretrained", "t2i_scratch"))
ROWS, TEXT_ROWS, IMAGE_IDS, LENGTH = 66_823, 50_432, 1_024, 1_152
PROMPT = "a large red circle on a white background"
JOB = "4711"
# Keys of a protocol card that differ from COCO FID-30k's where images, captions, weights and prompts are made up.
MADE_UP_CARD = {"prompts", "captions", "reference_pictures", "network_sha256"}


@dataclass(frozen=True)
class Length:
    """How long the rehearsal trains.

    Attributes:
        steps: of each arm.
        every: steps between checkpoints; points of curves come twice as often.
        stop: step at which a run is killed.
        prompts: captions of COCO that are drawn.
    """

    steps: int
    every: int
    stop: int
    prompts: int


DEFAULT, QUICK = Length(200, 20, 110, 16), Length(12, 4, 6, 4)


@dataclass(frozen=True)
class Rehearsal:
    """One rehearsal.

    Attributes:
        out: folder of its parts, runs and results.
        given: `key=value` of the user, which replace made-up parts and any value.
        quick: a few steps.
        gpus: whether processes run on GPUs.
        processes: of training, preparation and evaluation.
        coco, weights: the user's COCO folder and weights of Inception; None for made-up ones.
    """

    out: Path
    given: tuple[str, ...]
    quick: bool
    gpus: bool
    processes: int
    coco: Path | None
    weights: Path | None

    @property
    def length(self) -> Length:
        return QUICK if self.quick else DEFAULT

    def has(self, key: str) -> bool:
        """Whether the user gave a key."""
        return any(one.startswith(f"{key}=") for one in self.given)

    @property
    def made_up(self) -> dict[str, list[str]]:
        """The parts to make up, with the overrides that name them: those of which the user gave no path."""
        parts = self.out / "parts"
        overrides = {
            "backbone": [f"path={parts / CHECKPOINT}", f"config={parts / CONFIG}"],
            "text_tokenizer": [f"path={parts / NEOX}"],
            "image_tokenizer": [f"path={parts / MOVQGAN}", "expect=null"],
            "data": [f"path={parts / PAIRS}", "source=webdataset", "part_size=16"],
        }
        return {
            section: [f"{section}.{line}" for line in lines]
            for section, lines in overrides.items()
            if not self.has(f"{section}.path")
        }

    @property
    def parts(self) -> list[str]:
        """Names of the parts to make up."""
        return [*self.made_up, *(["coco"] if self.coco is None or self.weights is None else [])]

    def overrides(self) -> list[str]:
        """The changes to the paper's scale: parts, places, processes, and the number of steps; then the user's."""
        length, per_process = self.length, 14 if self.gpus else 1  # 896 sequences on 64 GPUs
        batch = self.processes * per_process
        lines = [
            *(line for lines in self.made_up.values() for line in lines),
            f"data.cache_dir={self.out}/cache",
            f"data.batch_size={batch}",
            f"trainer.devices={self.processes}",
            "trainer.num_nodes=1",
            f"trainer.max_steps={length.steps}",
            f"trainer.val_check_interval={length.steps // 2}",
            f"trainer.checkpoint_interval={length.every}",
            f"optim.warmup_steps={length.steps // 10}",
            f"log.interval={length.every // 2}",
            "samples.prompts=4",
            "samples.grid=4",
        ]
        if "data" not in self.made_up:  # a small part of the user's
            lines += [f"data.train_size={max(64, length.steps * batch // 2)}", "data.val_size=64"]
        return [*lines, *self.given]

    def python(self, module: str, *arguments: str | Path) -> list[str | Path]:
        """A command in one process."""
        return [sys.executable, "-m", module, *arguments]

    def torchrun(self, module: str, *arguments: str | Path) -> list[str | Path]:
        """A command in all processes."""
        many = ("--standalone", f"--nproc-per-node={self.processes}", "-m")
        return [sys.executable, "-m", "torch.distributed.run", *many, module, *arguments]

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def run(self) -> Path:
        """The run of the pre-trained arm."""
        return run_folders(self.runs, "t2i_pretrained")[-1]

    def stages(self) -> list[Stage]:
        """In order, with their seconds on two busy CPU cores (docs/rehearsal.md)."""
        return [
            Stage("parts", 70, self.make_parts),
            Stage("dry run", 45, self.dry_run),
            Stage("prepare", 210, self.prepare),
            Stage("train", 270, self.train),
            Stage("resume", 310, self.resume),
            Stage("Slurm job", 1090, self.slurm),
            Stage("sample", 75, self.sample),
            Stage("evaluate", 300, self.evaluate),
            Stage("export", 50, self.export),
            Stage("figures", 15, self.figures),
            Stage("report", 15, self.report),
        ]

    def make_parts(self, commands: Commands) -> str:
        if not self.parts:
            return "all parts are given"
        quick = ["--quick"] if self.quick else []
        output = commands.run(*self.python("tests.rehearsal.parts", self.out / "parts", *self.parts, *quick))
        shutil.rmtree(self.out / "cache", ignore_errors=True)  # of former parts
        lines = [line for line in output.splitlines() if re.match(r"open_lm|tokenizer|MoVQGAN|\d+ .*images", line)]
        require(len(lines) == len(self.parts), f"{len(self.parts)} parts, got {len(lines)}")
        return "; ".join(lines)

    def dry_run(self, commands: Commands) -> str:
        output = commands.run(
            *self.python("t2i_lm.train", PRETRAINED, "--scale", "paper", "--dry-run", *self.overrides())
        )
        found = re.search(r"vocabulary: ([\d,]+) rows .* a sequence has ([\d,]+) image ids", output)
        require(found is not None, "a line on the vocabulary")
        assert found is not None
        rows, ids = (int(number.replace(",", "")) for number in found.groups())
        if {"backbone", "image_tokenizer"} <= self.made_up.keys():
            require((rows, ids) == (ROWS, IMAGE_IDS), f"{ROWS:,} rows and {IMAGE_IDS:,} image ids, found {rows}, {ids}")
        missing = re.findall(r"^missing: (.*)", output, re.MULTILINE)
        require(not missing, f"all parts on this machine; missing: {', '.join(missing)}")
        parameters = re.findall(r"^parameters: ([\d,]+)", output, re.MULTILINE)
        return f"{parameters[0]} parameters, {rows:,} rows, {ids:,} ids per image, no part missing"

    def prepare(self, commands: Commands) -> str:
        output = commands.run(*self.torchrun("t2i_lm.prepare", PRETRAINED, "--scale", "paper", *self.overrides()))
        found = re.findall(r"^  (train|val\S*): ([\d,]+) rows; rejected: (.*)$", output, re.MULTILINE)
        require(len(set(found)) == len(found), f"one line per split, from one process: {found}")
        require({"train", "val"} <= {split for split, _, _ in found}, "rows of two splits")
        if "data" in self.made_up:
            require(all(rejected == "none" for _, _, rejected in found), f"no rejected pair: {found}")
        return "; ".join(f"{split}: {rows} pairs as ids, rejected: {rejected}" for split, rows, rejected in found)

    def _training(self, *arguments: str) -> list[str | Path]:
        own = ("--scale", "paper", f"run.dir={self.runs}")
        return self.torchrun("t2i_lm.train", PRETRAINED, *own, *arguments, *self.overrides())

    def train(self, commands: Commands) -> str:
        shutil.rmtree(self.runs, ignore_errors=True)
        kill = SignalAtStep(self.runs, "t2i_pretrained", self.length.stop, signal.SIGKILL)
        output = commands.run(*self._training(), code=None, watch=kill)
        run = self.run
        (self.out / "killed.jsonl").write_text(kill.text)
        saved = sorted(file.name for file in (run / CHECKPOINTS).glob("*.ckpt"))
        require(bool(saved), "a checkpoint before the kill")
        if self.processes > 1:
            named = re.search(r"error: rank 0 of \d+ .* has died.*continue with --resume latest", output)
            require(named is not None, "the other ranks name rank 0, which was killed, and how the run continues")
        killed = f"kill -9 of rank 0 after step {last_step(kill.text)}"
        return f"{killed}: the others end and name it; the newest checkpoint is {saved[-1]}"

    def resume(self, commands: Commands) -> str:
        run = self.run
        if read_run(run).report is None:
            commands.run(*self._training("--resume", "latest"))
        before = (self.out / "killed.jsonl").read_text(encoding="utf-8")
        resumed = re.search(r"resumed.*from (step-0*(\d+)\.ckpt|its start)", (run / EVENTS).read_text(encoding="utf-8"))
        require(resumed is not None, f"a line on the resumption in {run / EVENTS}")
        assert resumed is not None
        whole = read_run(run)
        self._require_all_steps(whole)
        after = dict(training_lines((run / METRICS).read_text(encoding="utf-8")))
        repeated, worst = 0, 0.0
        for step, losses in training_lines(before):
            repeated += step > int(resumed[2] or 0)
            for modality in ("text", "image", "all"):
                ours, theirs = losses[modality]["nll"], after[step][modality]["nll"]
                worst = max(worst, abs(ours - theirs) / abs(ours))
        most = 1e-2 if self.gpus else 0.0
        require(worst <= most, f"losses equal to those before the kill; they differ by {worst:.1e}")
        equal = "bit for bit" if worst == 0 else f"to {worst:.1e}"
        first, last = (after[step]["all"]["nll"] for step in (min(after), max(after)))
        return (
            f"from {resumed[1]}: every step once, losses equal {equal} to those before the kill, {repeated} of them "
            f"computed again; loss {first:.2f} to {last:.2f} nats/token; {self._speed(whole)}"
        )

    def _speed(self, run: Run) -> str:
        """Of the last interval of a run."""
        last = run.records("throughput")[-1]["throughput"]
        memory = f", {last['memory_mib'] / 1024:.1f} GiB of a GPU" if self.gpus else ""
        return f"{last['tokens_per_s']:,.0f} tokens/s{memory}"

    def _require_all_steps(self, run: Run) -> None:
        every, steps = self.length.every // 2, self.length.steps
        found = [record["step"] for record in run.records("train")]
        once = list(range(every, steps + 1, every))
        require(found == once, f"every {every} training steps once in metrics.jsonl, found {found}")
        validations = [record["step"] for record in run.validations()]
        expected = [0, steps // 2, steps]
        require(validations == expected, f"validations at {expected}, found {validations}")
        require(run.report is not None, "report.json")

    def slurm(self, commands: Commands) -> str:
        """The random arm under fsdp2 by the batch script, with stand-ins for Slurm's two commands."""
        place, runs = self.out, self.runs / JOB
        for former in (runs, self.runs / "t2i_scratch", place / "bin"):
            shutil.rmtree(former, ignore_errors=True)
        (place / "bin").mkdir()
        (place / "scontrol.txt").unlink(missing_ok=True)
        for name, target in ((".venv", Path(sys.prefix)), ("experiments", ROOT / "experiments")):
            (place / name).unlink(missing_ok=True)
            (place / name).symlink_to(target)
        for name, line in (
            ("srun", f'exec "{sys.executable}" -m tests.slurm "$@"'),
            ("scontrol", f'echo "$@" >> "{place}/scontrol.txt"'),
        ):
            (place / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (place / "bin" / name).chmod(0o755)
        job = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NAME": "t2i",
            "SLURM_NTASKS": str(self.processes),
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        script = ("bash", ROOT / "experiments" / "slurm" / "train.sbatch", "t2i_scratch", "paper")
        overrides = [*self.overrides(), *([] if self.has("trainer.strategy") else ["trainer.strategy=fsdp2"])]
        limit = SignalAtStep(runs, "t2i_scratch", self.length.stop, signal.SIGTERM, to_parent=True)
        commands.run(*script, *overrides, code=143, folder=place, watch=limit, **job)
        asked = (place / "scontrol.txt").read_text().splitlines()
        require(asked == [f"requeue {JOB}"], f"`scontrol requeue {JOB}` once, found {asked}")
        commands.run(*script, *overrides, folder=place, **job)
        require(not run_folders(runs), "the finished run in the folder of all runs")
        (folder,) = run_folders(self.runs, "t2i_scratch")
        run = read_run(folder)
        self._require_all_steps(run)
        resumed = re.search(r"resumed.*from step-0*(\d+)\.ckpt", (folder / EVENTS).read_text(encoding="utf-8"))
        require(resumed is not None, "the requeued job resumes its run")
        assert resumed is not None
        strategy = run.config["trainer"]["strategy"]
        return (
            f"train.sbatch, {strategy}: SIGTERM saves step {resumed[1]}, ends with 143 and requeues; "
            f"the second job resumes it, every step once; {self._speed(run)}"
        )

    def sample(self, commands: Commands) -> str:
        folder = self.out / "samples"
        shutil.rmtree(folder, ignore_errors=True)
        commands.run(*self.python("t2i_lm.sample", PROMPT, "--checkpoint", self.run, "--each", "2", "--out", folder))
        sizes = [png_size(file) for file in sorted(folder.glob("*.png")) if "grid" not in file.name]
        require(len(sizes) == 2, f"two images, found {sorted(file.name for file in folder.iterdir())}")
        return f"2 images of {sizes[0][0]} x {sizes[0][1]} pixels and their grid"

    def evaluate(self, commands: Commands) -> str:
        parts, length = self.out / "parts", self.length
        coco, weights = self.coco or parts / COCO, self.weights or parts / INCEPTION
        out = self.out / "coco"
        sizes = ("--prompts", str(length.prompts), "--part", str(-(-length.prompts // self.processes)))
        places = ("--coco", coco, "--weights", weights, "--out", out, "--cache", self.out / "cache")
        commands.run(*self.torchrun("t2i_lm.evaluate", "--checkpoint", self.run, *places, *sizes))
        result = json.loads((out / "coco.json").read_text(encoding="utf-8"))
        title = f"FID, n={length.prompts}, not COCO FID-30k"
        require(result["title"] == title, f"the title {title!r}, found {result['title']!r}")
        differing = {line.partition("=")[0] for line in result["differs"]}
        allowed = MADE_UP_CARD | ({"native_size"} if self.has("image_tokenizer.path") else set())
        require(differing <= allowed, f"a card that differs in {', '.join(sorted(allowed))} alone; {result['differs']}")
        return (
            f"{result['title']}: {result['fid']:.1f}, floor {result['floor']['fid']:.1f} (no result: "
            f"{length.prompts} images); its card differs from the protocol in {', '.join(sorted(differing))} alone"
        )

    def export(self, commands: Commands) -> str:
        folder = self.out / "export"
        shutil.rmtree(folder, ignore_errors=True)
        commands.run(*self.python("t2i_lm.export", self.run, "--out", folder))
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        rows, width = tensor_shapes(folder / "model.safetensors")["output.weight"]
        require(rows == card["rows"], f"{card['rows']} output rows, found {rows}")
        require(card["steps"] == self.length.steps, f"step {self.length.steps}, found {card['steps']}")
        return f"safetensors of {rows:,} x {width} rows, step {card['steps']}, with a card"

    def figures(self, commands: Commands) -> str:
        folder = self.out / "figures"
        shown = ("--figure", "3", "--figure", "4")
        output = commands.run(*self.python("t2i_lm.figures", "--runs", self.runs, *shown, "--out", folder))
        require("NOT CONTROLLED" not in output, "a controlled pair")
        for number in (3, 4):
            require((folder / f"figure{number}.png").is_file(), f"figure{number}.png")
        return "Figures 3 and 4 of both arms, a controlled pair"

    def report(self, commands: Commands) -> str:
        page = self.out / "report.html"
        commands.run(*self.python("t2i_lm.report", "--runs", self.runs, "--scale", "paper", "--out", page))
        return f"one page of {page.stat().st_size / 2**20:.1f} MiB"


def require(condition: bool, expected: str) -> None:
    """Raises the StageError of something that is not as it should be."""
    if not condition:
        raise StageError(f"expected {expected}")


def last_step(text: str) -> int:
    """The last training step of a metrics.jsonl."""
    return training_lines(text)[-1][0]


def png_size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    return width, height


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes by name in a safetensors file, from its header."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(size))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
