"""Stall of training by a checkpoint in the background, against the time in which the same state is written.

A real Trainer with `RunCheckpoints` steps AdamW over a synthetic state between matrix products. Before timing, the
last file of a run is compared with that of a run that saved synchronously. With `--copy-only` nothing is written: the
stall of a state whose files would take minutes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rounds import Report, exit_code, gate, parser, spread

EXAMPLE = "python -m benchmarks.saves --gigabytes 2 --threads 2"
SAVES = 3  # of a run
GATE_INTERVAL = 5  # steps from save to save where nothing is timed
TENSORS = 192  # of the state that is only copied


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("saves", "What a checkpoint costs training, written in the background.", EXAMPLE)
    arguments.add_argument("--gigabytes", type=float, default=2.0, help="state in float32 (default: %(default)s)")
    arguments.add_argument(
        "--interval", type=int, default=80, help="steps from save to save, longer than a write (default: %(default)s)"
    )
    arguments.add_argument("--copy-only", action="store_true", help="only the copy that training waits for; no file")
    arguments.add_argument("--folder", type=Path, help="where to write (default: the folder of temporary files)")
    return arguments.parse_args(argv)


def measure(options: argparse.Namespace) -> None:
    """Measures and prints the JSON line."""
    report = Report("saves", options)
    if options.copy_only:
        measure_copy(options, report)
        return
    import torch

    gigabytes, interval = (0.004, 2) if options.quick else (options.gigabytes, options.interval)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        last = {}
        for background in (True, False):
            train(folder / "run", gigabytes, min(interval, GATE_INTERVAL), options.device, background)
            last[background] = torch.load(
                newest(folder / "run"), map_location="cpu", weights_only=True, mmap=background
            )
            remove(folder / "run")
        pairs = [
            *zip(last[True]["state_dict"].values(), last[False]["state_dict"].values(), strict=True),
            *zip(moments(last[True]), moments(last[False]), strict=True),
        ]
        agreement = max(gate("state", ours, theirs, 0.0) for ours, theirs in pairs)
        checkpoint = last[False]
        del last, pairs
        first, later, written, read_back, quiet, busy, extra = (list[float]() for _ in range(7))
        for _ in range(options.rounds):
            alone = train(folder / "run", gigabytes, interval, options.device, None)
            quiet.append(alone.seconds)
            run = train(folder / "run", gigabytes, interval, options.device, True)
            busy.append(run.seconds)
            first.append(run.stalls[0])
            later += run.stalls[1:SAVES]
            extra.append((run.peak - alone.peak) / (gigabytes * 1e9))
            remove(folder / "run")
            seconds = write(checkpoint, folder / "alone.ckpt")
            written.append(seconds[0])
            read_back.append(seconds[1])
            gc.collect()
    middle = spread(written)["median"]
    report.write(
        gate={"state": agreement},
        gigabytes=gigabytes,
        stall_seconds={"first": spread(first), "later": spread(later)},
        write_seconds={"write": spread(written), "read back": spread(read_back)},
        stall_percent=spread([100 * stall / middle for stall in first + later]),
        # What a save costs in all, also by the cores that it shares with training.
        cost_percent=spread([100 * (b - q) / SAVES / middle for b, q in zip(busy, quiet, strict=True)]),
        seconds_per_step=spread([seconds / ((SAVES + 1) * interval - 1) for seconds in quiet]),
        extra_memory=spread(extra),
    )


def measure_copy(options: argparse.Namespace, report: Report) -> None:
    """Measures the copies of a state to the host by `Staging`, of which training waits for each."""
    import torch

    from callbacks.files.staging import Staging, bytes_of

    gigabytes = 0.004 if options.quick else options.gigabytes
    size = max(1, int(gigabytes * 1e9 / 4 / TENSORS))
    generator = torch.Generator(options.device).manual_seed(0)
    state = [torch.randn(size, generator=generator, device=options.device) for _ in range(TENSORS)]
    staging, seconds = Staging(), list[float]()
    for number in range(options.rounds + 1):
        if options.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        if number == 0:
            staging.prepare(state)
        copy = staging.copy(state)
        seconds.append(time.perf_counter() - start)
    agreement = max(gate("copy", ours.to(theirs.device), theirs, 0.0) for ours, theirs in zip(copy, state, strict=True))
    extra = staging.size / bytes_of(state)
    del copy
    staging.release()
    report.write(
        gate={"copy": agreement},
        gigabytes=gigabytes,
        # In a run the memory is taken in the background, long before the first save.
        stall_seconds={"with memory to take": spread(seconds[:1]), "later": spread(seconds[1:])},
        extra_memory=extra,
    )


class Run:
    """A finished run.

    Attributes:
        seconds: of all steps, with the scheduled saves.
        stalls: of each save, the last being synchronous.
        peak: bytes of this process.
    """

    def __init__(self, seconds: float, stalls: list[float], peak: int) -> None:
        self.seconds, self.stalls, self.peak = seconds, stalls, peak


def train(folder: Path, gigabytes: float, interval: int, device: str, background: bool | None) -> Run:
    """Trains to one interval after the last scheduled save; saves nothing if `background` is None."""
    import lightning.pytorch as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from callbacks import DurableCheckpointIO, RunCheckpoints
    from callbacks.throughput import WaitClock

    parts = 64
    size = max(1, int(gigabytes * 1e9 / 12 / parts))  # parameters and two moments
    work = 64 if gigabytes < 0.1 else 768

    class Synthetic(pl.LightningModule):
        """Manual steps with a constant gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            generator = torch.Generator().manual_seed(0)
            rows = [torch.randn(size, generator=generator) for _ in range(parts)]
            self.rows = nn.ParameterList(nn.Parameter(row) for row in rows)
            self.work = torch.randn(work, work, generator=generator)
            self.starts: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.starts.append(time.perf_counter())
            for _ in range(4):
                self.work @ self.work
            for row in self.rows:
                row.grad = row.detach()[:1].expand_as(row).contiguous() if row.grad is None else row.grad
            optimizer: Any = self.optimizers()
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    total = (SAVES + 1) * interval
    gc.collect()
    reset_peak()
    module, clock = Synthetic(), WaitClock()
    trainer = pl.Trainer(
        max_steps=total,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler=clock,
        callbacks=[] if background is None else [RunCheckpoints(folder, interval, background=background)],
        enable_checkpointing=background is not None,
        plugins=[DurableCheckpointIO()],
    )
    trainer.fit(module, DataLoader(range(total), batch_size=1))  # type: ignore[arg-type]
    return Run(module.starts[-1] - module.starts[0], clock.take_stalls(), peak())


def write(checkpoint: dict[str, Any], path: Path) -> tuple[float, float]:
    """Seconds of writing with digest, sync and rename, and of reading back from the disk."""
    from callbacks import DurableCheckpointIO
    from callbacks.files.checkpoint_io import forget_cached, verify

    start = time.perf_counter()
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    middle = time.perf_counter()
    forget_cached(path)
    verify(path)
    end = time.perf_counter()
    DurableCheckpointIO().remove_checkpoint(path)
    return middle - start, end - middle


def moments(checkpoint: dict[str, Any]) -> list[Any]:
    """Moments of all parameters."""
    states = checkpoint["optimizer_states"][0]["state"].values()
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


def newest(folder: Path) -> Path:
    """The newest checkpoint of a scheduled save."""
    return sorted(folder.glob("*.ckpt"))[-2]


def remove(folder: Path) -> None:
    """Deletes a run."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def reset_peak() -> None:
    """Starts a new peak of this process's memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak() -> int:
    """Peak bytes of this process's memory; 0 if unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())
