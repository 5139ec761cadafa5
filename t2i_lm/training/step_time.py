"""Time of a training step on this machine: what a study costs before one of its runs is finished."""

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

MOST_FLOP = 1e13  # of a step that is timed: minutes on a laptop
STEPS = 3  # after one that is not timed


def step_seconds(config: ExperimentConfig) -> float | None:
    """Median seconds of a training step, forward and backward, on random weights and full sequences of random ids.

    With this process's threads. Optimizer, validation and saving are left out: some percent at the demo's size.

    Returns:
        None for a task without sequences of image tokens, or a model of more than MOST_FLOP a step.
    """
    planned = plan(config)
    if not isinstance(planned.model, Backbone) or planned.layout is None:
        return None
    tokens = config.data.batch_size * planned.layout.length
    if flop_per_token(planned.model, planned.layout.length) * tokens > MOST_FLOP:
        return None
    device = "cuda" if uses_gpu(config.trainer.accelerator) else "cpu"
    module = _with_random_weights(planned, config, device)
    ids_BT = torch.randint(0, planned.layout.vocab.size, (config.micro_batch, planned.layout.length), device=device)
    mixed = precision(config) == "bf16-mixed"
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        for _ in range(config.trainer.accumulate_grad_batches):
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                total, _, _ = module.sums(ids_BT)
            total.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _with_random_weights(
    planned: Plan, config: ExperimentConfig, device: str
) -> TextToImageModule | UnconditionalImageModule:
    decoder = planned.model.to_empty(device=device)
    assert isinstance(decoder, Backbone)
    with torch.no_grad():
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
    if isinstance(planned.layout, ImageLayout):
        return UnconditionalImageModule(decoder, config, planned.layout)
    assert isinstance(planned.layout, Layout)
    return TextToImageModule(decoder, config, planned.layout)
