"""A training step never waits for the device: targets are computed before the batch is moved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, DistilConfig, LossConfig, OptimConfig
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.packing import TargetIndex
from t2i_lm.modules.base import DecoderModule, Targets
from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.optim import OPTIMIZERS
from t2i_lm.modules.text import TextModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.modules.unconditional import UnconditionalImageModule
from t2i_lm.tokenizers.layout import ImageLayout, Layout
from tests.decoders import tiny_decoder
from tests.marks import needs_gpu
from tests.runs import PRETRAINED, QUICK, train

TEXT, IMAGES, LENGTH, END = 50, 12, 20, 2
KINDS = ("plain", "weighted", "replay", "distil", "replay distil", "image", "image rows", "text")
WAYS = [(kind, packing) for kind in KINDS for packing in (False, True)]
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
WAITING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class NoWaiting(TorchDispatchMode):
    """Fails at an operation that would wait: its result or its size depends on values on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in INDEXED:  # indices determine the size, a mask does not
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask waits"
        else:
            assert not WAITING & set(func.tags), f"{func} waits"
        return func(*args, **(kwargs or {}))


def make(kind: str, packing: bool) -> tuple[DecoderModule, dict[str, Any]]:
    """A module and a batch of one kind, as a loader gives it."""
    decoder = tiny_decoder(seed=1, seq_len=LENGTH, vocab_size=TEXT)
    if packing:
        decoder.enable_packing()
    replay = "replay" in kind
    config = ExperimentConfig(
        task="unconditional" if kind.startswith("image") else "text_to_image",
        data=DataConfig(length=LENGTH, batch_size=4, replay_ratio=0.25 if replay else 0.0),
        loss=LossConfig(text_weight=0.5) if kind == "weighted" else LossConfig(),
        distil=DistilConfig(weight=0.7 if "distil" in kind else 0.0),
        optim=OptimConfig(l2_sp=0.1 if kind == "weighted" else 0.0),
        loss_rows="image" if kind == "image rows" else "all",
    )
    generator = torch.Generator().manual_seed(3)
    plain_BT = torch.randint(3, TEXT, (4, LENGTH), generator=generator)
    module: DecoderModule
    if kind == "text":
        module, ids_BT = TextModule(decoder, config), plain_BT
    else:
        vocab = expand_vocabulary(decoder, IMAGES, torch.Generator().manual_seed(2))
        codes_BN = torch.randint(IMAGES, (4, 4), generator=generator).numpy()
        if kind.startswith("image"):
            layout = ImageLayout(vocab, 4)
            module, ids_BT = UnconditionalImageModule(decoder, config, layout), layout.pack([], codes_BN)
        else:
            pairs = Layout(vocab, 4, LENGTH)
            texts = [plain_BT[row, :size].numpy() for row, size in enumerate((5, 8, 0, 3))]
            ids_BT = pairs.pack(texts, codes_BN)
            if replay:
                ids_BT[2] = plain_BT[2]
            module = TextToImageModule(decoder, config, pairs)
            if "distil" in kind:
                module = DistilledModule(decoder, config, pairs, END)
    return module, {"ids_BT": ids_BT, "samples": 4, "tokens_nominal": ids_BT.numel(), "tokens_real": torch.tensor(1)}


def step(module: DecoderModule, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    """A whole step of a batch that has been moved."""
    optimizer.zero_grad()
    module.training_step(batch, 0)["loss"].backward()
    module.on_before_optimizer_step(optimizer)
    module.configure_gradient_clipping(optimizer, 1.0)
    optimizer.step()


@pytest.mark.parametrize(("kind", "packing"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operation_of_a_step_waits(kind: str, packing: bool, dtype: torch.dtype) -> None:
    module, batch = make(kind, packing)
    optimizer = OPTIMIZERS["adamw"](list(module.named_parameters()), module.config.optim)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    batch = module.on_before_batch_transfer(batch, 0)
    with NoWaiting(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        step(module, optimizer, batch)
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_a_batch_without_computed_targets_would_wait() -> None:
    for kind, packing in WAYS:
        module, batch = make(kind, packing)
        with NoWaiting(), pytest.raises(AssertionError, match="waits"):
            module.training_step(batch, 0)


@pytest.mark.parametrize("operation", [lambda x: x[x > 0], lambda x: float(x[0]), lambda x: bool(x.sum() > 0)])
def test_waiting_operations_are_recognized(operation: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        operation(torch.ones(3))
    with NoWaiting():
        assert len(torch.ones(3)[torch.tensor([0, 2])]) == 2


@pytest.mark.parametrize(("kind", "packing"), WAYS)
def test_a_mask_and_computed_indices_give_the_same_loss(kind: str, packing: bool) -> None:
    module, batch = make(kind, packing)
    ids_BT = batch["ids_BT"]
    found = module.on_before_batch_transfer(batch, 0)["targets"]
    for mine, other in zip(module.sums(ids_BT, found), module.sums(ids_BT), strict=True):
        assert torch.equal(mine, other)
    class_BT, valid_BT = module.classify(ids_BT[:, 1:])
    assert torch.equal(found.class_N, class_BT[valid_BT])
    input_BT, target_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    masked = module.decoder.loss(input_BT, target_BT, TargetIndex.from_mask(valid_BT), module.image_rows_only)
    placed = module.decoder.loss(input_BT, target_BT, found.indices, module.image_rows_only)
    assert torch.equal(masked.nll_N, placed.nll_N)
    x_ND = module.decoder.hidden_at(input_BT, found.indices)
    assert torch.allclose(x_ND, module.decoder.hidden(input_BT)[valid_BT], atol=1e-6)


def test_targets_move_with_their_batch() -> None:
    module, batch = make("replay distil", packing=True)
    moved: Targets = move_data_to_device(module.on_before_batch_transfer(batch, 0), torch.device("meta"))["targets"]
    assert moved.indices.packed is not None
    for part in (moved.indices.packed, moved.indices, moved, moved.text):
        tensors = [value for value in part if isinstance(value, Tensor)]
        assert tensors
        assert all(tensor.is_meta for tensor in tensors), type(part)


def test_a_run_computes_the_targets_of_every_batch_before_it_is_moved(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, found = DecoderModule.sums, []

    def watched(self: DecoderModule, ids_BT: Tensor, targets: Targets | None = None) -> Any:
        found.append(targets is not None)
        return sums(self, ids_BT, targets)

    monkeypatch.setattr(DecoderModule, "sums", watched)
    train(PRETRAINED, tmp_path, *tiny, *QUICK, "trainer.max_steps=4")
    assert found
    assert all(found)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize(("kind", "packing"), WAYS)
def test_the_host_never_waits_for_a_gpu(kind: str, packing: bool) -> None:
    module, batch = make(kind, packing)
    module.cuda()
    optimizer = OPTIMIZERS["adamw"](list(module.named_parameters()), module.config.optim)
    batch["ids_BT"], batch["tokens_real"] = batch["ids_BT"].pin_memory(), batch["tokens_real"].pin_memory()
    for mode in ("default", "error"):  # libraries may wait when they are first used
        torch.cuda.set_sync_debug_mode(mode)
        try:
            moved = move_data_to_device(module.on_before_batch_transfer(batch, 0), module.device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                step(module, optimizer, moved)
        finally:
            torch.cuda.set_sync_debug_mode("default")
