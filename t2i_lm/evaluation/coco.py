"""`evaluate --coco`: zero-shot FID, KID and CLIP score on COCO's val2014, with the image tokenizer's floor."""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from t2i_lm.assets import PREFIX as ASSET
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import FID_FEATURES
from t2i_lm.data.coco import choose_prompts, prompts_sha256, read_coco
from t2i_lm.evaluation.base import EvaluationContext, Evaluator, read_result
from t2i_lm.evaluation.protocol_card import HEADLINE, PROMPT_SEED
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.hub import is_hub, require_model


class CocoEvaluator(Evaluator):
    """FID, KID and CLIP score of generated images and of the tokenizer's reconstructions, each with its card."""

    title = "FID, KID and CLIP score (require --coco)"

    def __init__(self, options: argparse.Namespace) -> None:
        """Reads the captions and chooses the prompts.

        Raises:
            ValueError: naming the wrong option, key or file.
        """
        for key, least in (("prompts", 2), ("part", 1), ("seed", 0)):
            if getattr(options, key) < least:
                raise ValueError(f"--{key} {getattr(options, key)}: expected at least {least}")
        if options.features not in FID_FEATURES:
            raise ValueError(f"--features {options.features}: expected one of {', '.join(map(str, FID_FEATURES))}")
        _require_weights(options.weights, options.weights_sha256)
        if options.clip is not None:
            if find_spec("transformers") is None:
                raise ValueError("--clip requires transformers: pip install 't2i_lm[clip]'")
            require_model(options.clip, "clip", "--clip")
        if options.bf16:
            self.alone = "--bf16 rounds the weights for all later evaluators: run those in a separate command"
        self.options = options
        self.coco = read_coco(options.coco)
        self.prompts = choose_prompts(self.coco, options.prompts, PROMPT_SEED)

    @staticmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        add("--coco", type=Path, metavar="PATH", help="COCO folder of val2014")
        add("--weights", metavar="FILE", help="weights of torch-fidelity's Inception (required)")
        add("--weights-sha256", metavar="HEX", help="expected hash of --weights")
        add("--features", type=int, default=2048, help="layer of the network, by its width (default: %(default)s)")
        add("--clip", metavar="MODEL", help="also the CLIP score, by a CLIP folder or hf://ORG/NAME[@REVISION]")
        add("--prompts", type=int, default=30_000, metavar="N", help="captions, one per image (default: %(default)s)")
        add("--guidance", "--cfg", type=float, metavar="S", help="classifier-free guidance scale (default: the run's)")
        add("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
        add("--compile", action="store_true", help=f"compile sampling; nearly tied ids may differ: not {HEADLINE}")
        add("--bf16", action="store_true", help=f"sample with weights in bfloat16: not {HEADLINE}")
        add("--no-floor", action="store_true", help="leave out the reconstruction FID of the tokenizer")
        add("--canonical", action="store_true", help=f"refuse to measure anything that is not {HEADLINE}")
        add("--images", "--pictures", action="store_true", help="also write every generated image as PNG")
        add("--part", type=int, default=256, metavar="N", help="prompts lost at most if killed (default: %(default)s)")
        add("--cache", type=Path, default=Path("cache"), help="folder of reference features (default: %(default)s)")

    def describe(self) -> str:
        options, prompts = self.options, self.prompts
        lines = [
            f"generate images of {len(prompts):,} captions of val2014 (sha256 {prompts_sha256(prompts)})",
            f"compare with {len(self.coco.images):,} images, center crop, lanczos to 256 pixels, no antialias "
            "in the metric",
            f"network: torch-fidelity's Inception, {options.features} features, {options.weights}",
            f"{-(-len(prompts) // options.part)} parts of {options.part} prompts; seed {options.seed}",
        ]
        if options.clip is not None:
            lines.append(f"CLIP score of the same images and captions, by {options.clip}")
        return "\n".join(lines)

    def identity(self, config: ExperimentConfig) -> dict[str, Any]:
        """Keys match the protocol card, so that results older than `made_with` can still be compared."""
        options = self.options
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": prompts_sha256(self.prompts),
            "captions_sha256": self.coco.captions_sha256,
            "features": options.features,
            "seed": options.seed,
            "guidance": config.samples.guidance if options.guidance is None else options.guidance,
            "weights": "bfloat16" if options.bf16 else "float32",
        }

    def run(self, context: EvaluationContext) -> dict[str, Any] | None:
        from t2i_lm.evaluation.coco_scores import measure_coco

        result = measure_coco(context, self.options, self.coco, self.prompts)
        file = context.out / "coco.json"
        if result is not None and file.is_file():
            _keep_earlier(read_result(file), result, file)
        return result


def _require_weights(path: str | None, sha256: str | None) -> None:
    """Refuses absent or other weights; those on a hub and shipped ones are checked when they are loaded."""
    if path is None:
        raise ValueError("--coco requires --weights, the file of torch-fidelity's Inception, see --help")
    if path.startswith(ASSET) or is_hub(path):
        return
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--weights {file}: no such file")
    if sha256 is not None and file_sha256(file) != sha256.lower():
        raise ValueError(f"--weights {file} has sha256 {file_sha256(file)}, expected {sha256}")


def _keep_earlier(earlier: dict[str, Any], result: dict[str, Any], file: Path) -> None:
    """Adds what an earlier command measured on the same images and this one did not: CLIP scores, and the floor.

    The floor of other reference images is left out.
    """
    added = []
    reference = earlier.get("floor", {}).get("card", {}).get("reference_sha256")
    if "floor" in earlier and "floor" not in result and reference == result["card"]["reference_sha256"]:
        result["floor"] = earlier["floor"]
        added.append("floor")
    for entry, before in ((result, earlier), (result.get("floor", {}), earlier.get("floor", {}))):
        if "clip" in before and "clip" not in entry:
            entry["clip"] = before["clip"]
            added.append("CLIP score")
    if added:
        print(f"note: {file} keeps its {' and '.join(dict.fromkeys(added))}", file=sys.stderr)
