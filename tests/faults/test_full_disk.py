"""A disk that is full at seeded moments and before every writer of a run: it ends with a named path or goes on.

The run lies on a small file system of its own, whose space is taken at an opening of a file for writing and given back
at a later one, or when the run has ended. T2I_LM_FAULTS is the number of random moments, at most 30.
"""

import fnmatch
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2i_lm import prepare, train
from t2i_lm.data.shards.format import data_hash, read_index
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from tests.callbacks.toy_run import server
from tests.disks import Ballast, small_disk
from tests.runs import PRETRAINED, curve, launch

COUNT = min(30, int(os.environ.get("T2I_LM_FAULTS", "1")))
# Writers of a run, by a pattern of their files.
WRITERS = {
    "owner.json": "*/owner.json",
    "config.yaml": "*/.config*",
    "env.json": "*/.env*",
    "groups.txt": "*/.groups*",
    "baseline of forgetting": "*/.forgetting*",
    "metrics.jsonl": "*/metrics.jsonl",
    "TensorBoard": "*/events.out.tfevents*",
    "samples": "*/samples/step-*",
    "checkpoint": "*/step-*.ckpt.tmp",
    "tokens.npz": "*/.tokens*",
    "grid of the report": "*/samples/.grid*",
    "completions": "*/.completions*",
    "report.json": "*/.report*",
}
# What a run requires: on a disk that stays full it ends.
REQUIRED = (
    "owner.json",
    "config.yaml",
    "env.json",
    "groups.txt",
    "baseline of forgetting",
    "checkpoint",
    "report.json",
)


@dataclass
class Fullness:
    """When the disk is full.

    Attributes:
        pattern: of files whose openings for writing are counted.
        at: at which opening the space is taken.
        left: bytes that are left.
        until: at which opening of any file it is given back; None: when the run has ended.
    """

    pattern: str = "*"
    at: int = 1
    left: int = 0
    until: int | None = None


def watch(disk: Path, fullness: Fullness, log: Path) -> None:
    """Takes and gives back the space of a disk at openings of this process."""
    ballast, counts = Ballast(disk), {"matching": 0, "since": 0}
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if event != "open" or busy or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, _, flags = arguments
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(f"{disk}/") or not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        busy = True
        try:
            if counts["since"]:
                counts["since"] += 1
                if fullness.until is not None and counts["since"] > fullness.until:
                    ballast.remove()
            elif fnmatch.fnmatch(name, fullness.pattern):
                counts["matching"] += 1
                if counts["matching"] == fullness.at:
                    counts["since"] = 1
                    ballast.fill(fullness.left)
            log.with_suffix(".count").write_text(str(counts["matching"]))
        finally:
            busy = False

    sys.addaudithook(hook)


def _process(arguments: list[str], disk: Path, fullness: Fullness | None, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if fullness is not None:
        watch(disk, fullness, log)
    code = train.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def run(arguments: list[str], disk: Path, fullness: Fullness | None, log: Path) -> int:
    """Trains in a process of its own; its exit code."""
    process = server.Process(target=_process, args=(arguments, disk, fullness, log))
    process.start()
    process.join(300)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode


@pytest.fixture(scope="module")
def overrides(tiny: list[str], probing: list[str]) -> list[str]:
    """A run with every writer."""
    own = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.checkpoint_interval=2"]
    return [*tiny, *probing, *own, "samples.interval=2", "samples.grid=2", "log.logger=tensorboard"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("full") / "disk", 64) as disk:
        yield disk


@pytest.fixture(scope="module")
def whole(overrides: list[str], disk: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int]:
    """An unbroken run, and its number of openings."""
    log = tmp_path_factory.mktemp("log") / "log"
    assert run([PRETRAINED, *overrides, f"run.dir={disk}/whole"], disk, Fullness(at=10**9), log) == 0, log.read_text()
    return read_run(run_folders(disk / "whole")[-1]), int(log.with_suffix(".count").read_text())


def points(found: Run) -> dict[str, list[int]]:
    """Steps of every tag in TensorBoard."""
    accumulator = EventAccumulator(str(found.folder / "tb"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def resuming(root: Path) -> list[str]:
    """What continues the newest run of a folder; a run without a checkpoint starts again."""
    begun = run_folders(root)
    resumable = begun and list((begun[-1] / "checkpoints").glob("*.ckpt"))
    return ["--resume", str(begun[-1])] if resumable else []


def survives(whole: Run, overrides: list[str], disk: Path, fullness: Fullness, log: Path) -> bool:
    """Runs on a disk that is full for a while, and checks what is left; whether the run went on to its end."""
    root = disk / "runs"
    arguments = [PRETRAINED, *overrides, f"run.dir={root}"]
    code = run(arguments, disk, fullness, log)
    printed = log.read_text()
    assert code in (0, 2), printed
    assert "Traceback" not in printed
    caught_up = not Ballast(disk).file.exists()
    Ballast(disk).remove()
    if code:
        assert re.search(rf"^error: .*{disk}/\S+: No space left on device \([\d.,]+ MB free\)", printed, re.MULTILINE)
        arguments = [PRETRAINED, *resuming(root), *overrides, f"run.dir={root}"]
        assert run(arguments, disk, None, log) == 0, log.read_text()
    found = read_run(run_folders(root)[-1])
    assert curve(found) == curve(whole)
    assert found.report is not None
    assert whole.report is not None
    assert found.report["steps"] == whole.report["steps"]
    if not code and caught_up:
        assert points(found) == points(whole)
    assert not [file for file in found.folder.rglob("*") if "tmp" in file.name.split(".")]
    return code == 0


@pytest.fixture(autouse=True)
def _empty(disk: Path) -> Iterator[None]:
    yield
    Ballast(disk).remove()
    shutil.rmtree(disk / "runs", ignore_errors=True)


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_disk_full_at_a_random_moment(
    seed: int, whole: tuple[Run, int], overrides: list[str], disk: Path, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    until = draw.choice([None, draw.randrange(1, 40)])
    fullness = Fullness("*", draw.randrange(1, whole[1]), draw.choice([0, 4096, 20_000]), until)
    went_on = survives(whole[0], overrides, disk, fullness, tmp_path / "log")
    print(f"{fullness}: {'went on' if went_on else 'ended'}")


@pytest.mark.parametrize("name", [*WRITERS] if COUNT == 30 else ["TensorBoard"])
@pytest.mark.parametrize("until", [5, None] if COUNT == 30 else [None])
def test_a_disk_full_before_a_writer(
    name: str, until: int | None, whole: tuple[Run, int], overrides: list[str], disk: Path, tmp_path: Path
) -> None:
    went_on = survives(whole[0], overrides, disk, Fullness(WRITERS[name], until=until), tmp_path / "log")
    print(f"{name}, {'for a while' if until else 'to the end'}: {'went on' if went_on else 'ended'}")
    if name in REQUIRED and until is None:
        assert not went_on
    assert (tmp_path / "log.count").exists()


@pytest.mark.skipif(COUNT < 30, reason="make test-faults")
@pytest.mark.parametrize("stays", [False, True])
def test_two_ranks_stop_or_go_on_together(
    stays: bool, whole: tuple[Run, int], overrides: list[str], disk: Path, tmp_path: Path
) -> None:
    own = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp", "data.batch_size=4"]
    process = launch(PRETRAINED, disk / "runs", *overrides, *own)
    while process.poll() is None and not list((disk / "runs").rglob("metrics.jsonl")):
        time.sleep(0.05)
    Ballast(disk).fill()
    if not stays:
        time.sleep(1)
        Ballast(disk).remove()
    printed, _ = process.communicate(timeout=300)
    Ballast(disk).remove()
    assert "Traceback" not in printed
    assert process.returncode in ((2, 1) if stays else (0, 1, 2)), printed
    if process.returncode:
        assert re.search(rf"error: .*{disk}/\S+: No space left on device", printed)
        again = launch(PRETRAINED, disk / "runs", *overrides, *own, *resuming(disk / "runs"))
        output, _ = again.communicate(timeout=300)
        assert again.returncode == 0, output


@pytest.mark.parametrize("mebibytes", [0.06, 0.12, 0.18] if COUNT == 30 else [0.12])
def test_a_disk_full_while_preparing(
    mebibytes: float, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data.train_size=400", "data.part_size=100"]
    assert prepare.main([PRETRAINED, *tiny, *data, f"data.cache_dir={tmp_path}/whole"]) == 0
    with small_disk(tmp_path / "disk", mebibytes) as disk:
        arguments = [PRETRAINED, *tiny, *data, f"data.cache_dir={disk}"]
        capsys.readouterr()
        assert prepare.main(arguments) == 2
        assert re.search(rf"^error: .*{disk}/\S+: No space left on device \(", capsys.readouterr().err, re.MULTILINE)
        assert os.system(f"mount -o remount,size=64m {disk}") == 0
        assert prepare.main(arguments) == 0
        hashes = {
            data_hash(index)
            for place in (tmp_path / "whole", disk)
            for folder in place.glob("*/index.json")
            if (index := read_index(folder.parent)) is not None
        }
        assert len(hashes) == 1
        assert not list(disk.rglob("*.work"))
