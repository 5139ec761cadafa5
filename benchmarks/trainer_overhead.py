"""Overhead per step of Lightning's Trainer with all our callbacks over a hand-written loop (goals G1 and G3).

Both train the same module from the same weights on the same batches with the same optimizer, schedule, clipping and
precision; on a CPU losses and weights are bitwise equal. The measured time runs from the start of a step to the start
of the next, including loading, logging and callbacks, without setup, validation and checkpoints.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rounds import GateError, Report, compiles, exit_code, gate, parser, spread

EXAMPLE = "python -m benchmarks.trainer_overhead --shape demo --steps 60 --threads 2"
WARMUP = 5  # untimed steps of each repetition
IMAGE_TOKENS = {"tiny": 8, "demo": 64, "paper": 1024}
# On a GPU sums have no fixed order, and Adam turns gradients that are pure rounding into full steps: single weights may
# differ by as much as they moved. Tolerances: losses relative to the largest, weights relative to the norm of their
# change. In 10 steps of the tiny shape in bfloat16, 1 % noise in gradients gave 0.0003 and 0.08, a tenth of the
# learning rate 0.004 and 0.10.
LOSSES, CHANGE = 2e-3, 0.2


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("trainer_overhead", "Trainer with all callbacks against a hand-written loop.", EXAMPLE)
    arguments.add_argument("--shape", choices=("demo", "paper"), default="demo", help="default: %(default)s")
    arguments.add_argument("--steps", type=int, default=60, help="micro-batches per repetition (default: %(default)s)")
    arguments.add_argument(
        "--accumulate", type=int, default=1, help="micro-batches per optimizer step (default: %(default)s)"
    )
    arguments.add_argument("--compile", action="store_true", help="compile each block, as trainer.compile does")
    arguments.add_argument(
        "--precision", choices=("auto", "bf16-mixed", "32-true"), default="auto", help="default: %(default)s"
    )
    arguments.add_argument(
        "--logger", choices=("tensorboard", "csv", "none"), default="tensorboard", help="default: %(default)s"
    )
    return arguments.parse_args(argv)


@dataclass(frozen=True)
class Trained:
    """One repetition.

    Attributes:
        period: seconds per micro-batch.
        losses: of all micro-batches, one tensor.
        weights: final weights by name.
    """

    period: float
    losses: Any
    weights: dict[str, Any]


class Clock:
    """Start times of micro-batches in seconds, and their losses."""

    def __init__(self, device: str, steps: int, accumulate: int) -> None:
        """Times from the first to the last complete optimizer step after the warm-up."""
        self.device, self.steps = device, steps
        self.first, self.last = -(-WARMUP // accumulate) * accumulate, steps - accumulate
        self.starts: list[float] = []
        self.losses: list[Any] = []

    def tick(self) -> None:
        """Records the start of a micro-batch, synchronizing a GPU only where timing starts and ends."""
        if self.device == "cuda" and len(self.starts) in (self.first, self.last):
            import torch

            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def period(self) -> float:
        """Mean seconds per micro-batch after the warm-up."""
        assert len(self.starts) == self.steps
        return (self.starts[self.last] - self.starts[self.first]) / (self.last - self.first)


def train_by_trainer(module: Any, data: Any, config: Any, clock: Clock, folder: Path) -> None:
    """As `t2i_lm.train`, without the validation before the first step."""
    from lightning.pytorch.callbacks import Callback

    from callbacks import EventLog, RunCheckpoints
    from t2i_lm.experiment.build import Experiment
    from t2i_lm.training.trainer import build_trainer

    class Ticks(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.tick()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            clock.losses.append(outputs["loss"])

    experiment = Experiment(config=config, module=module, data=data)
    trainer = build_trainer(experiment, folder, EventLog(folder / "events.log"), resumed=True)
    # The last save of 18 GB at the paper's shape would take longer than the steps.
    others = [callback for callback in trainer.callbacks if not isinstance(callback, RunCheckpoints)]  # type: ignore[attr-defined]
    trainer.callbacks = [Ticks(), *others]  # type: ignore[attr-defined]
    trainer.fit(module, data)


def train_by_hand(module: Any, data: Any, config: Any, clock: Clock) -> None:
    """The same steps without a Trainer."""
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from t2i_lm.runtime.devices import precision

    module.to(clock.device).train()
    plan = module.configure_optimizers()
    optimizer, schedule = plan["optimizer"], plan["lr_scheduler"]["scheduler"]
    low = precision(config) == "bf16-mixed"
    accumulate = config.trainer.accumulate_grad_batches
    optimizer.zero_grad(set_to_none=True)
    for number, loaded in enumerate(data.train_dataloader()):
        clock.tick()
        batch = move_data_to_device(module.on_before_batch_transfer(loaded, 0), module.device)
        with torch.autocast(clock.device, dtype=torch.bfloat16) if low else nullcontext():
            loss = module.training_step(batch, number)["loss"] / accumulate
        loss.backward()
        clock.losses.append(loss.detach())
        if (number + 1) % accumulate:
            continue
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer, config.optim.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def measure(options: argparse.Namespace) -> None:
    """Checks, times, reports."""
    report = Report("trainer_overhead", options)
    import torch

    from benchmarks.peers import SHAPES, build_decoder
    from benchmarks.shards import experiment, open_alone, write_random_shards
    from t2i_lm.config.load import save_experiment
    from t2i_lm.data.datamodules import PairDataModule
    from t2i_lm.models.factory import prepare_blocks
    from t2i_lm.models.flops import flop_per_token
    from t2i_lm.modules.text_to_image import TextToImageModule
    from t2i_lm.storage.run_folder import CONFIG, ENVIRONMENT
    from t2i_lm.tokenizers.layout import Layout
    from t2i_lm.training.callbacks import peak

    name = "tiny" if options.quick else options.shape
    options.steps = WARMUP + 5 if options.quick else options.steps
    accumulate = options.accumulate
    least = -(-WARMUP // max(1, accumulate)) * accumulate + 2 * accumulate
    if accumulate < 1 or options.steps < least or options.steps % accumulate:
        raise ValueError(
            f"--steps={options.steps}: expected a multiple of --accumulate={accumulate}, at least {least}; the first "
            f"{least - 2 * accumulate} and the last {accumulate} are not timed"
        )
    shape = SHAPES[name]
    decoder, vocab = build_decoder(shape, options.device)
    # On the device too: drawing 1.5B weights on a CPU and copying them for every repetition takes a minute.
    weights = {key: tensor.clone() for key, tensor in decoder.state_dict().items()}
    config = experiment(
        shape.batch, shape.length, options.steps // accumulate, options.precision, options.logger, accumulate, name
    )
    accelerator = "gpu" if options.device == "cuda" else "cpu"
    compiled = options.compile and compiles(options)
    config = replace(config, trainer=replace(config.trainer, accelerator=accelerator, compile=compiled))
    prepare_blocks(decoder, config)
    layout = Layout(vocab, IMAGE_TOKENS[name], shape.length)
    samples = shape.batch * 32 * accumulate
    with tempfile.TemporaryDirectory() as place:
        shards = Path(place) / "shards"
        sizes = (samples, layout.image_tokens, shape.text_vocab, shape.image_codes, shape.length)
        write_random_shards(shards, *sizes)
        runs = 0

        def repeat(train: Callable[..., None], *more: Any) -> Trained:
            """Trains from the initial weights."""
            gc.collect()  # the previous repetition's optimizer, 12 GB at the paper's shape
            decoder.load_state_dict(weights)
            module = TextToImageModule(decoder, config, layout)
            data = PairDataModule(config, shards, layout)
            clock = Clock(options.device, options.steps, accumulate)
            if train is train_by_hand:
                open_alone(data)
            train(module, data, config, clock, *more)
            last = {key: tensor.detach().cpu().clone() for key, tensor in decoder.state_dict().items()}
            return Trained(clock.period(), torch.stack(clock.losses).cpu(), last)

        def by_trainer() -> Trained:
            nonlocal runs
            runs += 1
            folder = Path(place) / f"run-{runs}"
            folder.mkdir()
            save_experiment(config, folder / CONFIG)  # a validation's figures are drawn from both
            (folder / ENVIRONMENT).write_text(json.dumps({"data_hash": "random"}), encoding="utf-8")
            return repeat(train_by_trainer, folder)

        def by_hand() -> Trained:
            return repeat(train_by_hand)

        agreement = check(by_trainer(), by_hand(), weights, options.device)
        periods: dict[str, list[float]] = {"trainer": [], "loop": []}
        for number in range(options.rounds):
            order = (("trainer", by_trainer), ("loop", by_hand))
            for side, train in order if number % 2 == 0 else order[::-1]:
                periods[side].append(train().period)
    tokens = shape.batch * shape.length
    flop, peak_flop = flop_per_token(decoder, shape.length) * tokens, peak(config)
    ratios = [ours / loop for ours, loop in zip(periods["trainer"], periods["loop"], strict=True)]
    report.write(
        gate=agreement,
        shape=vars(shape),
        seconds_per_step={side: spread(values) for side, values in periods.items()},
        overhead_percent=spread([100 * (ratio - 1) for ratio in ratios]),
        overhead_ms=spread([1e3 * (a - b) for a, b in zip(periods["trainer"], periods["loop"], strict=True)]),
        tokens_per_s={side: spread([tokens / value for value in values]) for side, values in periods.items()},
        mfu=None if peak_flop is None else spread([flop / value / peak_flop for value in periods["trainer"]]),
        throughput_ratio=spread([1 / ratio for ratio in ratios]),
    )


def check(trained: Trained, looped: Trained, initial: dict[str, Any], device: str) -> dict[str, float]:
    """Differences of losses and final weights between both trainings: none on a CPU, small on a GPU.

    Raises:
        GateError: naming the difference, or if the weights did not change.
    """
    import torch

    ours, theirs = trained.weights, looped.weights
    if all(torch.equal(ours[key], initial[key].cpu()) for key in initial):
        raise GateError("the weights have not changed: equal weights would prove nothing")
    errors = {"losses": gate("loss", trained.losses, looped.losses, LOSSES if device == "cuda" else 0.0)}
    if device != "cuda":
        return errors | {"weights": max(gate(f"weight {key}", ours[key], theirs[key], 0.0) for key in initial)}
    part = distance(ours, theirs) / distance(theirs, initial)
    if not part <= CHANGE:
        raise GateError(f"weights: their changes differ by {part:.1%} of the norm, allowed is {CHANGE:.0%}: not timed")
    return errors | {"weight_change": part}


def distance(some: dict[str, Any], others: dict[str, Any]) -> float:
    """Norm of the difference over all weights."""
    squares = [float((some[key].cpu().double() - others[key].cpu().double()).square().sum()) for key in others]
    return float(sum(squares) ** 0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())
