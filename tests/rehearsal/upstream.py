"""Checkpoints by open_lm's own code, from `make open-lm` or the checkout that `OPEN_LM` names."""

import argparse
import ast
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.open_lm_variants import stub_xformers


def find_upstream() -> Path | None:
    """The folder of upstream's package; None where it is not installed."""
    checkout = os.environ.get("OPEN_LM")
    if checkout and checkout not in sys.path:
        sys.path.insert(0, checkout)
    spec = find_spec("open_lm")
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def save_by_upstream(package: Path, config: Path, folder: Path) -> None:
    """Writes `folder`/epoch_1.pt with a model of upstream's `create_model`, of random weights.

    Args:
        package: from `find_upstream`.
        config: upstream's model JSON.
        folder: of the checkpoint.
    """
    stub_xformers()
    from open_lm import model as upstream
    from open_lm.params import add_model_args

    upstream.xops.SwiGLU = upstream.SwiGLUTorch  # the same tensors as those of xformers
    arguments = argparse.ArgumentParser()
    add_model_args(arguments)
    options = arguments.parse_args(["--attn-name", "torch_attn"])
    torch.manual_seed(0)
    model = upstream.create_model(argparse.Namespace(**vars(options), model=str(config)))
    # Upstream saves the wrapper of distributed training, whose names begin with `module.`.
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    settings = argparse.Namespace(
        logs="none", fsdp=False, save_logs=True, name=config.stem, epochs=1, save_frequency=1,
        checkpoint_path=str(folder), delete_previous_checkpoint=False,
    )  # fmt: skip
    _save_checkpoint(package)(settings, wrapped, optimizer, None, 1, [], step=None, is_final_checkpoint=True)
    for name in ("optimizer_1.pt", "stats_1.pt"):
        (folder / name).unlink()  # a model is released without them


def _save_checkpoint(package: Path) -> Any:
    """Upstream's function without the other imports of its file (ray, mosaicml, ...), which it does not use."""
    file = package / "main.py"
    found = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "save_checkpoint"
    ]
    names: dict[str, Any] = {"torch": torch, "os": os}
    exec(compile(ast.Module(found, []), str(file), "exec"), names)
    return names["save_checkpoint"]
