"""Training steps of the language-modeling tasks: split loss, exact token mean, optimizer.

Where the split loss is computed:

1. `on_before_batch_transfer`: runs `find_targets` while the batch is on the host.
2. `find_targets`: `classify` assigns each target a modality; the counted targets become indices (`TargetIndex`).
3. `decoder.hidden_at` (models/backbone.py): hidden states at those indices.
4. `Output.loss` (models/token_rows.py): calls the loss there, since only there FSDP2 has the rows whole.
5. `linear_cross_entropy` (models/cross_entropy.py): negative log-likelihood of each target.
6. `split_sums` (below): sum and count per modality, returned by the step (`callbacks.base.contract`).
7. `EMASplitPerplexity` (callbacks/perplexity.py): reduces them over ranks, smooths, exponentiates.

The differentiated loss is the (weighted) mean over all tokens of the *global* batch, pads excluded, however the batch
is cut over ranks and micro-batches.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.cross_entropy import TokenLoss, loss_backend
from t2i_lm.models.float8 import use_float8
from t2i_lm.models.fsdp import shard
from t2i_lm.models.packing import TargetIndex
from t2i_lm.modules.l2_sp import Anchor
from t2i_lm.modules.optim import OPTIMIZERS, cosine_with_warmup

# Mesh dimensions: replicas, and the processes that share one replica.
MESH = ("replicate", "shard")


class OptimizedModule(pl.LightningModule):
    """A LightningModule with the optimizer, schedule and gradient clipping of the config's `optim` section.

    Attributes:
        gradient_norm: total norm of this step's gradient, 0-d, if a callback computed it (`callbacks.base.contract`).
        gradient_scale: factor of this step's gradient before clipping, 0-d; None for 1.
    """

    gradient_norm: Tensor | None = None
    gradient_scale: Tensor | None = None

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config

    def configure_optimizers(self) -> Any:
        config = self.config.optim
        optimizer = OPTIMIZERS[config.name](list(self.named_parameters()), config)
        schedule = cosine_with_warmup(optimizer, config, self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Multiplies the gradient by `gradient_scale` and clips its total norm, if at all, in one pass.

        Lightning's implementation refuses fused optimizers under mixed precision, since a float16 gradient scaler
        unscales inside the optimizer's step, after clipping. bfloat16 has no scaler.
        """
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if self.gradient_norm is None else self.gradient_norm
        scale = torch.ones_like(norm) if self.gradient_scale is None else self.gradient_scale
        # Equals torch.nn.utils.clip_grad_norm_ on the scaled gradient.
        factor = scale * (limit / (norm * scale + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        self.gradient_norm = self.gradient_scale = None


class Targets(NamedTuple):
    """The N counted targets of a batch, computed on the host, so that a step never waits for the device.

    Attributes:
        indices: their positions among all (B, T) targets.
        class_N: their classes.
        text: the text targets among them (`modules.distillation.TextTargets`); None without distillation.
    """

    indices: TargetIndex
    class_N: Tensor
    text: Any = None


class DecoderModule(OptimizedModule):
    """A decoder trained on next-token prediction.

    Subclasses set `modalities` and implement `classify`.
    """

    modalities: tuple[str, ...]
    # Loss weight of each modality; None where all are 1, which saves the multiplication.
    weight_M: Tensor | None
    # Softmax over the image rows alone; all valid targets must then be image tokens.
    image_rows_only = False

    def __init__(self, decoder: Backbone, config: ExperimentConfig) -> None:
        super().__init__(config)
        self.decoder = decoder
        self.loss_backend = partial(loss_backend(config.loss.backend), z_loss=config.loss.z)
        self._configured = False
        # Targets since the last optimizer step, on this rank, counted by weight.
        self._step_count: Tensor | None = None
        self.register_buffer("weight_M", None, persistent=False)
        self.anchor = Anchor(decoder, config.optim.l2_sp) if config.optim.l2_sp else None

    def set_weights(self, weights: Sequence[float]) -> None:
        """Sets the weights of `modalities` in the differentiated loss; reported losses stay unweighted."""
        assert len(weights) == len(self.modalities)
        self.weight_M = torch.tensor(weights)

    def configure_model(self) -> None:
        """Applies `trainer.fp8` and FSDP2 sharding, once, after the process group exists."""
        if self._configured:
            return
        self._configured = True
        if self.config.trainer.fp8:
            use_float8(self.decoder)
        mesh = self.device_mesh
        if mesh is None:
            return
        if self.config.trainer.strategy == "hsdp":
            trainer = self.config.trainer
            mesh = init_device_mesh(mesh.device_type, (trainer.num_nodes, trainer.devices), mesh_dim_names=MESH)
        else:
            mesh = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=MESH[1:])
        shard(self.decoder, mesh)

    def classify(self, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Class of each target in [0, M), and the mask of targets that count; both (B, T)."""
        raise NotImplementedError

    def find_targets(self, ids_BT: Tensor) -> Targets:
        """The counted targets of a batch. Synchronizes with the GPU if `ids_BT` is on one."""
        class_BT, valid_BT = self.classify(ids_BT[:, 1:])
        indices = self.decoder.with_inputs(self.decoder.target_index(valid_BT), ids_BT[:, :-1])
        return Targets(indices, indices.select(class_BT))

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Adds `targets` to the batch while its ids are on the host; pinned, so that the copy is asynchronous."""
        targets = self.find_targets(batch["ids_BT"])
        if self.device.type == "cuda":
            targets = apply_to_collection(targets, Tensor, Tensor.pin_memory)
        return batch | {"targets": targets}

    def sums(self, ids_BT: Tensor, targets: Targets | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of nll with gradient, then unweighted, detached nll_sum (M,) and count (M,).

        `targets` default to `find_targets(ids_BT)`.
        """
        if targets is None:
            targets = self.find_targets(ids_BT)
        weight_N = None if self.weight_M is None else self.weight_M[targets.class_N]
        loss = self.token_loss(ids_BT[:, :-1], ids_BT[:, 1:], targets, weight_N)
        nll_sum_M, count_M = split_sums(loss.nll_N, targets.class_N, len(self.modalities))
        return loss.total, nll_sum_M, count_M

    def token_loss(self, input_BT: Tensor, target_BT: Tensor, targets: Targets, weight_N: Tensor | None) -> TokenLoss:
        """Loss of the N counted targets, weighted in `total` (None: 1); subclasses may add terms to `total`."""
        index, backend = targets.indices, self.loss_backend
        return self.decoder.loss(input_BT, target_BT, index, self.image_rows_only, weight_N, backend)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss of one micro-batch; `on_before_optimizer_step` corrects its scale to the exact mean."""
        total, nll_sum_M, count_M = self.sums(batch["ids_BT"], batch.get("targets"))
        count = count_M.sum() if self.weight_M is None else (count_M * self.weight_M).sum()
        self._step_count = count if self._step_count is None else self._step_count + count
        # The nominal size keeps gradients at an ordinary magnitude until the exact count is known.
        return {"loss": total / batch["tokens_nominal"], **self._report(batch, nll_sum_M, count_M)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        _, nll_sum_M, count_M = self.sums(batch["ids_BT"], batch.get("targets"))
        return self._report(batch, nll_sum_M, count_M)

    def _report(self, batch: dict[str, Any], nll_sum_M: Tensor, count_M: Tensor) -> dict[str, Any]:
        return {
            "nll_sum": nll_sum_M,
            "count": count_M,
            "samples": batch["samples"],
            "tokens_nominal": batch["tokens_nominal"],
            "tokens_real": batch["tokens_real"],
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Sets `gradient_scale` so that the gradient is the mean over the global batch's tokens.

        Until then it is divided by `tokens_nominal` (equal in all micro-batches) in `training_step`, by
        `accumulate_grad_batches` in Lightning and by the number of ranks in DDP.
        """
        assert self._step_count is not None
        count = self._step_count.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
        nominal = self.config.data.batch_size * self.nominal_length
        self.gradient_scale = nominal / count
        self._step_count = None
        if self.anchor is not None:
            self.anchor.pull(optimizer)

    @property
    def nominal_length(self) -> int:
        """Positions per sequence, as counted in `tokens_nominal`."""
        return self.config.data.length


def split_sums(nll_N: Tensor, class_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum and count of `nll_N` per class; sums, since a mean of means would be wrong.

    Args:
        nll_N: negative log-likelihood of each target, nats.
        class_N: class of each target, int64 in [0, classes).
        classes: number of classes M.

    Returns:
        nll_sum_M (float64) and count_M (int64), detached, on the inputs' device. float64, so that the sums of a
        whole validation set do not depend on its order within printed precision.
    """
    nll_N = nll_N.detach().double()
    nll_sum_M = torch.zeros(classes, dtype=torch.float64, device=nll_N.device)
    count_M = torch.zeros(classes, dtype=torch.int64, device=nll_N.device)
    nll_sum_M.index_add_(0, class_N, nll_N)
    count_M.index_add_(0, class_N, torch.ones_like(class_N))
    return nll_sum_M, count_M
