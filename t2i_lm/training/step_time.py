"""Time of a run on this machine's CPU by some training steps: what a study costs before one of its runs is finished."""

import math
import time
from statistics import median

import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.experiment.dry_run import Plan, plan
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.flops import flop_per_token
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.modules.unconditional import UnconditionalImageModule
from t2i_lm.runtime.devices import precision, uses_gpu
from t2i_lm.tokenizers.layout import ImageLayout, Layout
from t2i_lm.training.intervals import validation_interval

MOST_FLOP = 1e12  # of a step that is timed: some seconds
STEPS = 3  # after one that is not timed


def step_seconds(config: ExperimentConfig) -> float | None:
    """Median seconds of a training step, forward and backward, on random weights and full sequences of random ids.

    With this process's threads. The optimizer's and the loader's part is left out: some percent at the demo's size.

    Returns:
        None for a task without sequences of image tokens, a model of more than MOST_FLOP a step, and a GPU, whose
        context this process would keep.
    """
    planned = plan(config)
    if not isinstance(planned.model, Backbone) or planned.layout is None or uses_gpu(config.trainer.accelerator):
        return None
    length = planned.layout.length
    if flop_per_token(planned.model, length) * config.data.batch_size * length > MOST_FLOP:
        return None
    module = _with_random_weights(planned, config)
    ids_BT = torch.randint(0, planned.layout.vocab.size, (config.micro_batch, length))
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        for _ in range(config.trainer.accumulate_grad_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision(config) == "bf16-mixed"):
                total, _, _ = module.sums(ids_BT)
            total.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def steps_in_all(config: ExperimentConfig) -> float:
    """Steps of a run and its validations, in training steps: a forward pass takes a third of a step.

    Forgetting and samples are left out, and validation sets of unknown size.
    """
    steps, data = config.trainer.max_steps, config.data
    validations = 1 + math.ceil(steps / validation_interval(config.trainer))
    sets = 2 if data.source == "scenes" and data.hold_out_pairs else 1
    return steps + validations * sets * (data.val_size or 0) / data.batch_size / 3


def _with_random_weights(planned: Plan, config: ExperimentConfig) -> TextToImageModule | UnconditionalImageModule:
    decoder = planned.model.to_empty(device="cpu")
    assert isinstance(decoder, Backbone)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.02)
        for buffer in decoder.buffers():
            buffer.zero_()
    if isinstance(planned.layout, ImageLayout):
        return UnconditionalImageModule(decoder, config, planned.layout)
    assert isinstance(planned.layout, Layout)
    return TextToImageModule(decoder, config, planned.layout)
