"""A training step of our decoder against other projects' decoders with the same weights (goals G2 and G6).

A step is forward, loss, backward, clipping, fused AdamW and zeroing of gradients, on random ids without pads.
Ours is timed in both forms of training: eager, and compiled by block (`trainer.compile`).

Shapes: `B` batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import OURS, Contender, Report, compare, compiles, exit_code, gate, interleave, parser, rates

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.peers import Peer
    from t2i_lm.models.decoder import Decoder

EXAMPLE = "python -m benchmarks.train_step --shape demo --threads 2 --open-lm ../open_lm"
PEERS = ("transformers", "open_lm", "litgpt")
# Tolerances relative to the largest value: for the order of summation, in bfloat16 also for rounding.
LOGITS, GRADIENTS, LOSS_FP32, LOSS_BF16 = 1e-4, 1e-3, 1e-4, 1e-2
WARMUP = 3
GATE_ROWS = 2  # sequences per float32 check, for which a peer materializes its logits
# Sequences where the shape's own do not fit. Estimate for ours and one peer at the paper's 1.5B parameters, in GB:
#   weights 2 x 6, AdamW's state 2 x 12, bfloat16 weights 3 (later gradients: 6, as activations are freed)       39
#   activations under autocast, 24 layers x 109 kB per token (Llama's some 15 more), 8 x 1,152 tokens         24-28
#   a peer's logits, bfloat16 and float32 with gradients: 16 bytes each of 66,823 per token                      10
# Together 73 to 77 of an 80 GB card's 83. The 14 sequences of each of the paper's 64 GPUs would take about 100.
BATCH = {"paper": 8}

Loss = Callable[[], "Tensor"]


@dataclass(frozen=True)
class Form:
    """A decoder's mean loss in one form, to be timed.

    Attributes:
        name, family: as in `Contender`.
        module: the model to train.
        loss: the mean loss of the batch.
        precision: bf16 (autocast over float32 weights) or fp32.
    """

    name: str
    family: str
    module: Any
    loss: Loss
    precision: str


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("train_step", "Training steps of equal decoders, side by side.", EXAMPLE)
    arguments.add_argument("--shape", choices=("demo", "paper"), default="demo", help="default: %(default)s")
    arguments.add_argument("--batch", type=int, help="sequences (default: 16; 8 at the paper's shape)")
    arguments.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
    arguments.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all available")
    arguments.add_argument("--open-lm", type=Path, metavar="PATH", help="checkout of mlfoundations/open_lm")
    return arguments.parse_args(argv)


def measure(options: argparse.Namespace) -> None:
    """Checks, times, reports."""
    report = Report("train_step", options)
    import torch

    from benchmarks.peers import SHAPES, build_decoder
    from t2i_lm.models.flops import flop_per_token, peak_flops
    from t2i_lm.runtime.devices import multiplies_bfloat16

    name = "tiny" if options.quick else options.shape
    shape = replace(SHAPES[name], batch=options.batch or BATCH.get(name, SHAPES[name].batch))
    device = options.device
    options.precision = options.precision or ("bf16" if multiplies_bfloat16(device) else "fp32")
    decoder, vocab = build_decoder(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    all_BT = torch.randint(vocab.size, (shape.batch, shape.length + 1), generator=generator, device=device)
    ids_BT, target_BT = all_BT[:, :-1].contiguous(), all_BT[:, 1:].contiguous()
    peers = find_peers(options, shape, vocab, decoder)
    agreement = {peer.name: check_peer(decoder, peer, ids_BT[:GATE_ROWS], target_BT[:GATE_ROWS]) for peer in peers}

    forms = list(loss_forms(decoder, peers, ids_BT, target_BT, options.precision, compiles(options)))
    if name != "paper":
        forms.append(float32_form(decoder, peers, ids_BT, target_BT))
    agreement["losses"], first_seconds = check_forms(forms, expected_loss_and_norm(decoder, ids_BT, target_BT), device)
    contenders = []
    optimizers: dict[int, Any] = {}
    for form in forms:
        key = id(form.module)
        if key not in optimizers:  # eager and compiled forms share their weights: 1.5B parameters are 24 GB
            optimizers[key] = torch.optim.AdamW(form.module.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        contenders.append(Contender(form.name, form.family, training_step(form, optimizers[key], device)))
    seconds = interleave(contenders, options.rounds, 1 if options.quick else WARMUP, device)
    tokens = shape.batch * shape.length
    flop = flop_per_token(decoder, shape.length) * tokens
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    report.write(
        shape=vars(shape),
        parameters=sum(parameter.numel() for parameter in decoder.parameters()),
        gate=agreement,
        first_call_seconds=first_seconds,
        **compare(contenders, seconds),
        tokens_per_s=rates(seconds, tokens),
        tflop_per_s={name: float(f"{flop / median(values) / 1e12:.4g}") for name, values in seconds.items()},
        mfu=None if peak is None else {name: round(flop / median(v) / peak, 4) for name, v in seconds.items()},
    )


def find_peers(options: argparse.Namespace, shape: Any, vocab: Any, decoder: Decoder) -> list[Peer]:
    """The selected peers that are installed, with our weights."""
    from benchmarks import peers

    built: list[Peer | None] = []
    if "transformers" in options.peers:
        built.append(peers.build_llama(shape, vocab, options.device))
    if "open_lm" in options.peers and options.open_lm is not None:
        built.append(peers.build_open_lm(shape, vocab, options.device, options.open_lm))
    if "litgpt" in options.peers:
        built.append(peers.build_litgpt(shape, vocab, options.device))
    installed = [peer for peer in built if peer is not None]
    for name in sorted(set(options.peers) - {peer.name for peer in installed}):
        print(f"{name} is skipped: {'requires --open-lm' if name == 'open_lm' else 'not installed'}", file=sys.stderr)
    for peer in installed:
        peers.copy_weights(decoder, peer)
    return installed


def check_peer(decoder: Decoder, peer: Peer, ids_BT: Tensor, target_BT: Tensor) -> dict[str, float]:
    """Errors of a peer's logits, loss and gradients against ours, in float32.

    Raises:
        GateError: naming the difference.
    """
    import torch

    from benchmarks.peers import gradients

    name, model = peer.name, peer.model
    errors = {"logits": gate(f"{name}: logits", peer.logits(ids_BT), decoder(ids_BT), LOGITS)}
    ours = decoder.loss(ids_BT, target_BT).total / target_BT.numel()
    theirs = materialized(peer.logits, ids_BT, target_BT)
    errors["loss"] = gate(f"{name}: loss", theirs, ours, LOSS_FP32)
    torch.autograd.backward([ours, theirs])
    expected = peer.rename(gradients(decoder))
    errors["gradients"] = max(
        gate(f"{name}: gradient of {key}", parameter.grad, expected[key], GRADIENTS)
        for key, parameter in model.named_parameters()
    )
    decoder.zero_grad()
    model.zero_grad()
    return errors


def materialized(logits: Callable[[Tensor], Tensor], ids_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy of materialized logits, as in the peers' own training code."""
    import torch.nn.functional as F

    return F.cross_entropy(logits(ids_BT).flatten(0, 1), target_BT.flatten())


def loss_forms(
    decoder: Decoder, peers: list[Peer], ids_BT: Tensor, target_BT: Tensor, precision: str, compiled: bool
) -> Iterator[Form]:
    """All forms to time at one precision.

    A peer is compiled whole, including its loss; ours by block, as in a run.
    """
    import torch

    from benchmarks.peers import compiled_by_block

    count = target_BT.numel()
    yield Form(f"{OURS} eager", OURS, decoder, lambda: decoder.loss(ids_BT, target_BT).total / count, precision)
    if compiled:
        by_block = compiled_by_block(decoder)
        yield Form(f"{OURS} compiled", OURS, decoder, lambda: by_block.loss(ids_BT, target_BT).total / count, precision)
    for peer in peers:

        def whole(peer: Peer = peer) -> Tensor:
            return materialized(peer.logits, ids_BT, target_BT)

        yield Form(f"{peer.name} eager", peer.name, peer.model, whole, precision)
        if compiled:
            yield Form(f"{peer.name} compiled", peer.name, peer.model, torch.compile(whole), precision)


def float32_form(decoder: Decoder, peers: list[Peer], ids_BT: Tensor, target_BT: Tensor) -> Form:
    """open_lm's float32 step, by its own code if available. Not used at the paper's shape, for its memory."""
    upstream = next((peer for peer in peers if peer.name == "open_lm"), None)
    if upstream is not None:
        name, module, logits = "open_lm fp32 eager", upstream.model, upstream.logits
    else:  # the same operations by our own code
        name, module, logits = "our decoder fp32 eager, whole logits (stands in for open_lm)", decoder, decoder
    return Form(name, name, module, lambda: materialized(logits, ids_BT, target_BT), "fp32")


def expected_loss_and_norm(decoder: Decoder, ids_BT: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Our eager mean loss and its gradient norm in float32, a few sequences at a time to save memory."""
    import torch

    losses = []
    for start in range(0, len(ids_BT), GATE_ROWS):
        few = slice(start, start + GATE_ROWS)
        loss = decoder.loss(ids_BT[few], target_BT[few]).total / target_BT.numel()
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum(), take_norm(decoder)


def check_forms(
    forms: Sequence[Form], expected: tuple[Tensor, Tensor], device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Checks every form's loss and gradient norm against our eager float32 ones.

    Also triggers compilation. Returns the loss errors and the seconds of the first call.

    Raises:
        GateError: naming the form.
    """
    errors: dict[str, float] = {}
    first: dict[str, float] = {}
    for form in forms:
        tolerance = LOSS_FP32 if form.precision == "fp32" else LOSS_BF16
        start = time.perf_counter()
        loss, norm = loss_and_norm(form, device)
        errors[form.name] = gate(f"{form.name}: loss", loss, expected[0], tolerance)  # synchronizes
        first[form.name] = round(time.perf_counter() - start, 3)
        gate(f"{form.name}: gradient norm", norm, expected[1], 5 * tolerance)
    return errors, first


def loss_and_norm(form: Form, device: str) -> tuple[Tensor, Tensor]:
    """A form's loss and the norm of its gradients."""
    import torch

    with arithmetic(form.precision, device):
        loss = form.loss()
    torch.autograd.backward(loss)
    return loss.detach(), take_norm(form.module)


def take_norm(module: Any) -> Tensor:
    """The norm of all gradients, which are then cleared."""
    import torch

    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return norm


@contextmanager
def arithmetic(precision: str, device: str) -> Iterator[None]:
    """bf16 autocast over float32 weights, or float32."""
    import torch

    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


def training_step(form: Form, optimizer: Any, device: str) -> Callable[[], None]:
    """A complete step as a function."""
    import torch

    parameters = list(form.module.parameters())

    def step() -> None:
        with arithmetic(form.precision, device):
            loss = form.loss()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())
