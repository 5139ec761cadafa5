"""Greedy generation of image ids: our `generate` against transformers' on the same weights (goals G5 and G6).

Both generate the same number of ids after prompts of one length. Ours restricts ids to the image codes; for
transformers' the other output rows are zero and never win, so that it generates the same ids without extra work.

Shapes: `B` images, `T` prompt positions, `N` image tokens, `V` image codes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import (
    OURS,
    Contender,
    GateError,
    Report,
    compare,
    compiles,
    exit_code,
    gate,
    interleave,
    parser,
    rates,
)

if TYPE_CHECKING:
    from torch import Tensor

    Generation = Callable[[], Tensor]  # image codes (B, N)

EXAMPLE = "python -m benchmarks.generate --shape demo --batch 8 --threads 1"
LOGITS = 1e-4  # of the largest, in float32
# Each of two logits may be off by that much, so an id this far below the best may replace it.
TIE = 2 * LOGITS
GATE_ROWS = 8  # prompts to compare: a large batch's float32 cache may not fit where its bfloat16 cache does


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("generate", "Greedy generation by equal decoders, side by side.", EXAMPLE)
    arguments.add_argument("--shape", choices=("demo", "paper"), default="demo", help="default: %(default)s")
    arguments.add_argument("--batch", type=int, default=8, help="images per batch (default: %(default)s)")
    arguments.add_argument("--prompt", type=int, default=32, help="prompt positions (default: %(default)s)")
    arguments.add_argument("--tokens", type=int, default=256, help="ids per image (default: %(default)s)")
    arguments.add_argument("--alone", action="store_true", help="without peers, for batches that leave them no memory")
    arguments.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default="fp32",
        help="of the weights; ids are compared in float32 (default: %(default)s)",
    )
    return arguments.parse_args(argv)


def measure(options: argparse.Namespace) -> None:
    """Checks, times, reports."""
    report = Report("generate", options)
    import torch

    from benchmarks.peers import SHAPES, build_decoder, build_llama, copy_weights

    if options.quick:
        options.batch, options.prompt, options.tokens = 2, 6, 10
    shape = replace(SHAPES["tiny" if options.quick else options.shape], length=options.prompt + options.tokens)
    decoder, vocab = build_decoder(shape, options.device)
    with torch.no_grad():
        decoder.output.text.zero_()
        assert decoder.output.special is not None
        decoder.output.special.zero_()
    decoder.eval()
    llama = None
    if not options.alone:
        llama = build_llama(shape, vocab, options.device)
        copy_weights(decoder, llama)
        llama.model.eval()
    generator = torch.Generator(options.device).manual_seed(1)
    size = (options.batch, options.prompt)
    prompt_BT = torch.randint(vocab.size, size, generator=generator, device=options.device)

    def forms_of(prompt_BT: Tensor) -> dict[str, tuple[str, Generation]]:
        peer = None if llama is None else llama.model
        return generation_forms(decoder, peer, vocab, prompt_BT, options.tokens, compiles(options))

    few_BT = prompt_BT[:GATE_ROWS]
    forms = forms_of(few_BT)
    agreement: dict[str, Any] = {}
    if llama is not None:
        with torch.no_grad():
            agreement["logits"] = gate("transformers: logits", llama.logits(few_BT), decoder(few_BT), LOGITS)
    codes, first_seconds = generate_all(forms)
    agreement |= check(codes, lambda codes_BN: recompute(decoder, vocab, few_BT, codes_BN), options.device)
    if options.precision == "bf16":
        from t2i_lm.generation.images import round_weights

        for model in (decoder,) if llama is None else (decoder, llama.model):
            round_weights(model)
        # Rounding may swap an id, after which the images differ: reported, not refused.
        agreement["equal_ids_bf16"] = shares(generate_all(forms)[0])
    if len(few_BT) < len(prompt_BT):
        forms = forms_of(prompt_BT)
    contenders = [Contender(name, family, run) for name, (family, run) in forms.items()]
    seconds = interleave(contenders, options.rounds, 1, options.device)
    report.write(
        shape=vars(shape),
        gate=agreement,
        first_call_seconds=first_seconds,
        **compare(contenders, seconds),
        ids_per_s=rates(seconds, options.batch * options.tokens),
    )


def generation_forms(
    decoder: Any, llama: Any, vocab: Any, prompt_BT: Tensor, tokens: int, compiled: bool
) -> dict[str, tuple[str, Generation]]:
    """Name -> (family, generation); only ours if there is no Llama."""
    import torch

    from t2i_lm.models.generate import generate

    prompts = list(prompt_BT.cpu())

    def theirs(**settings: Any) -> Generation:
        def run() -> Tensor:
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            with torch.no_grad():
                ids_BT = llama.generate(
                    prompt_BT,
                    attention_mask=torch.ones_like(prompt_BT),
                    do_sample=False,
                    pad_token_id=vocab.pad,
                    **lengths,
                    **settings,
                )
            codes_BN: Tensor = ids_BT[:, prompt_BT.shape[1] :].cpu() - vocab.image_offset
            return codes_BN

        return run

    static = {"cache_implementation": "static"}
    graphs = ", CUDA graphs" if prompt_BT.is_cuda else ""
    forms: dict[str, tuple[str, Generation]] = {
        f"{OURS} eager{graphs}": (OURS, lambda: generate(decoder, vocab, prompts, tokens))
    }
    if llama is not None:
        forms["transformers eager, growing cache"] = ("transformers", theirs())
        forms["transformers eager, static cache"] = ("transformers", theirs(**static, disable_compile=True))
    if compiled:
        # As `--compile` of the commands. A shallow copy shares the weights.
        compiled_decoder = copy.copy(decoder)
        compiled_decoder.compile_steps()
        forms[f"{OURS} compiled{graphs}"] = (OURS, lambda: generate(compiled_decoder, vocab, prompts, tokens))
    if compiled and llama is not None:
        from transformers import CompileConfig

        # Its own automatic compilation of the decoding step, by default on GPUs only.
        mode: Any = CompileConfig(mode="reduce-overhead" if prompt_BT.is_cuda else "default", fullgraph=False)
        mode._compile_all_devices = True
        forms["transformers compiled, static cache"] = ("transformers", theirs(**static, compile_config=mode))
    return forms


def generate_all(forms: dict[str, tuple[str, Generation]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Image codes (B, N) of every form, and the seconds of its call: at the first with compilation and captures.

    Raises:
        GateError: if a form fails for another reason than GPU memory.
    """
    from t2i_lm.runtime.devices import is_gpu_full

    codes: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name, (_, run) in forms.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about itself
                start = time.perf_counter()
                codes[name] = run()  # on the CPU, thus complete
                seconds[name] = round(time.perf_counter() - start, 3)
        except (RuntimeError, TypeError) as error:
            if is_gpu_full(error):
                raise
            raise GateError(f"{name} cannot generate: {str(error).splitlines()[0]}") from error
    return codes, seconds


def shares(codes: dict[str, Tensor]) -> dict[str, float]:
    """Share of each form's ids that equal those of the first form, which is ours.

    Raises:
        GateError: if the numbers of ids differ, or all ids are the same.
    """
    import torch

    ours = next(iter(codes.values()))
    if len(torch.unique(ours)) == 1:
        raise GateError("all ids are the same: equal ids would prove nothing")
    for name, codes_BN in codes.items():
        if codes_BN.shape != ours.shape:
            raise GateError(f"{name} generated {tuple(codes_BN.shape)} ids, expected {tuple(ours.shape)}")
    return {name: float((codes_BN == ours).double().mean()) for name, codes_BN in codes.items()}


def recompute(decoder: Any, vocab: Any, prompt_BT: Tensor, codes_BN: Tensor) -> Tensor:
    """Our logits (B, N, V) of every image position, by one pass over the codes without a cache."""
    import torch

    ids_BT = torch.cat((prompt_BT, codes_BN[:, :-1].to(prompt_BT.device) + vocab.image_offset), dim=1)
    with torch.no_grad():
        x_BND = decoder.hidden(ids_BT)[:, prompt_BT.shape[1] - 1 :]
        logits_BNV: Tensor = decoder.output(x_BND, image_rows_only=True)
    return logits_BNV


def shortfall(logits_MV: Tensor, codes_M: Tensor) -> float:
    """Largest distance of a code's logit from the best, relative to its position's largest; M positions."""
    codes_M = codes_M.to(logits_MV.device)
    if not bool(((codes_M >= 0) & (codes_M < logits_MV.shape[1])).all()):
        return float("inf")  # not an image code
    chosen_M = logits_MV.gather(1, codes_M[:, None])[:, 0]
    return float(((logits_MV.amax(1) - chosen_M) / logits_MV.abs().amax(1)).max())


def check(codes: dict[str, Tensor], logits_of: Callable[[Tensor], Tensor], device: str) -> dict[str, Any]:
    """Our ids are the most likely ones of a full recomputation, and every form generates our ids.

    On a GPU, whose kernels sum in other orders, a form may diverge from ours at an id whose logit ties with the best.
    The rest of that row is another image and is not compared; the number of such rows is part of the result.

    Raises:
        GateError: naming the form whose ids differ.
    """
    equal, ours = shares(codes), next(iter(codes.values()))
    logits_BNV = logits_of(ours)
    own = shortfall(logits_BNV.flatten(0, 1), ours.flatten())
    if not own <= TIE:
        raise GateError(f"{OURS}: an id is {own:.1e} of the largest logit below the best one recomputed: not timed")
    diverged = {}
    for name, codes_BN in codes.items():
        differ_BN = codes_BN != ours
        rows_R = differ_BN.any(1).nonzero()[:, 0]
        diverged[name] = len(rows_R)
        if not len(rows_R):
            continue
        if device == "cpu":
            raise GateError(f"{name}: only {equal[name]:.1%} of its greedy ids equal ours: not timed")
        first_R = differ_BN[rows_R].int().argmax(1)
        below = shortfall(logits_BNV[rows_R, first_R], codes_BN[rows_R, first_R])
        if not below <= TIE:
            raise GateError(
                f"{name}: its first greedy id that differs is {below:.1e} of the largest logit below the best, "
                f"allowed is {TIE:.0e}: not timed"
            )
    return {"recomputed": own, "equal_ids": equal, "rows_that_part": diverged}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())
