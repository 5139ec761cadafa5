"""Training a small image tokenizer: autoencoder, then k-means for the codebook, then quantized."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.contrastive import clamp_log_scale
from t2i_lm.modules.base import OptimizedModule
from t2i_lm.modules.caption_term import CaptionTerm
from t2i_lm.tokenizers.vq import PatchedVQ, to_uint8, to_unit
from t2i_lm.tokenizers.words import WordVQ

# Number of latest encoder outputs in the buffer for k-means and for re-seeding unused codes.
RECENT = 32_768
# Entry of a checkpoint: the first quantized step.
QUANTIZE_FROM = "quantize_from"


class ImageTokenizerModule(OptimizedModule):
    """Trains a `PatchedVQ` on images.

    For `warmup_fraction` of the steps the decoder's input is continuous latents. Then k-means of recent latents
    initializes the codebook, which avoids collapse, and the rest of the run is quantized with a straight-through
    gradient. Codes unused for `restart_every` steps are re-seeded from recent latents. A resumed run that takes more or
    fewer steps stays quantized where it was.

    With a `CaptionTerm`, the codes of an image are to tell its caption among those of the batch. Of a `WordVQ`, k-means
    gives the places of the words instead, and no code is re-seeded: that would untie it from its word.
    """

    recent: Tensor
    used: Tensor

    def __init__(self, model: PatchedVQ, config: ExperimentConfig, captions: CaptionTerm | None = None) -> None:
        super().__init__(config)
        self.model, self.captions = model, captions
        self.settings = config.image_tokenizer
        self.quantize_from = int(self.settings.warmup_fraction * config.trainer.max_steps)
        # In the checkpoint, so that a resumed run re-seeds from the same latents as an uninterrupted one.
        self.register_buffer("recent", torch.zeros(RECENT, model.config.code_dim))
        self.register_buffer("used", torch.zeros(model.config.codes, dtype=torch.int64))
        self._val: dict[int, dict[str, Tensor]] = {}  # sums by number of the validation loader
        # Step in progress, and what training steps change besides gradients, as it was before, by name in the state.
        self._begun: tuple[int, dict[str, Tensor]] = (-1, {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the first quantized step and the codes that any rank used; every rank must call it.

        Amid a step, which a resumed run repeats, the buffers and the codebook are those before it.
        """
        checkpoint[QUANTIZE_FROM] = self.quantize_from
        state: dict[str, Tensor] = checkpoint["state_dict"]
        step, before = self._begun
        if step == checkpoint["global_step"]:
            state |= before
        if dist.is_available() and dist.is_initialized():
            state["used"] = state["used"].clone()
            dist.all_reduce(state["used"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the phase that a run is in, whatever its number of steps is now.

        A run that is not quantized yet will be after `warmup_fraction` of the new number, or at once if that is past.
        """
        step, before = checkpoint["global_step"], checkpoint.get(QUANTIZE_FROM, self.quantize_from)
        self.quantize_from = before if step > before else max(step, self.quantize_from)
        if self.global_rank > 0:  # the saved counts are those of all ranks
            checkpoint["state_dict"]["used"] = torch.zeros_like(self.used)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.config.trainer.accumulate_grad_batches == 0:
            changed = {"recent": self.recent, "used": self.used}
            changed |= {f"model.{name}": tensor for name, tensor in self.model.codebook_state().items()}
            self._begun = self.global_step, {name: tensor.detach().clone() for name, tensor in changed.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss of a batch of uint8 images `images_BCHW`."""
        pixels_BCHW = to_unit(batch["images_BCHW"])
        latents_BEhw = self.model.latents(pixels_BCHW)
        self._remember(latents_BEhw)
        quantized = self.global_step >= self.quantize_from
        commit = latents_BEhw.new_zeros(())
        coded_BEhw = latents_BEhw
        if quantized:
            if self.global_step == self.quantize_from and batch_idx % self.config.trainer.accumulate_grad_batches == 0:
                self._seed_codebook()
            ids_Bhw = self.model.nearest(latents_BEhw.detach())
            self.used += torch.bincount(ids_Bhw.flatten(), minlength=len(self.used))
            codes_BEhw = self.model.embed(ids_Bhw)
            commit = F.mse_loss(codes_BEhw, latents_BEhw.detach())
            commit = commit + self.settings.commitment * F.mse_loss(latents_BEhw, codes_BEhw.detach())
            coded_BEhw = latents_BEhw + (codes_BEhw - latents_BEhw).detach()
        output_BCHW = self.model.pixels(coded_BEhw)
        l1, mse = F.l1_loss(output_BCHW, pixels_BCHW), F.mse_loss(output_BCHW, pixels_BCHW)
        edge = edge_loss(output_BCHW, pixels_BCHW)
        loss = l1 + mse + commit + self.settings.edge_weight * edge
        metrics = {"loss": loss, "l1": l1, "mse": mse, "commit": commit, "edge": edge}
        if self.captions is not None:
            caption = self.captions.nll(self.captions.images_of_codes(coded_BEhw), batch).mean()
            loss = loss + self.settings.caption_weight * caption
            metrics |= {"caption_nll": caption, "logit_scale": self.captions.log_scale.exp()}
            if isinstance(self.model, WordVQ):
                mismatch = self.captions.mismatch(self.model.codebook, self.model.rows_KD)
                loss = loss + self.settings.caption_weight * mismatch
                metrics["mismatch"] = mismatch
            metrics["loss"] = loss
        return {
            "loss": loss,
            "metrics": {name: value.detach() for name, value in metrics.items()},
            "samples": len(pixels_BCHW),
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.captions is not None:
            clamp_log_scale(self.captions.log_scale, self.config.align)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Re-seeds unused codes every `restart_every` steps of the quantized phase, except in the run's last tenth.

        Codes that are words keep their words.
        """
        if isinstance(self.model, WordVQ):
            return
        step, last = self.global_step, 0.9 * self.config.trainer.max_steps
        since = step - self.quantize_from
        if since > 0 and since % self.settings.restart_every == 0 and step < last:
            self._restart_unused()

    @torch.no_grad()
    def _remember(self, latents_BEhw: Tensor) -> None:
        fresh = latents_BEhw.detach().permute(0, 2, 3, 1).flatten(0, 2).float()[:RECENT]
        self.recent.copy_(torch.cat([self.recent[len(fresh) :], fresh]))

    @torch.no_grad()
    def _seed_codebook(self) -> None:
        centers = torch.empty_like(self.model.codebook)
        if self.global_rank == 0:
            finite = self.recent.isfinite().all(dim=1)
            points_NE = self.recent[finite].cpu().double().numpy()
            means, _ = kmeans2(
                points_NE, spread_out(points_NE, len(centers), self.config.seed), minit="matrix", missing="warn"
            )
            centers.copy_(torch.from_numpy(means))
        _from_rank_zero(centers)
        if isinstance(self.model, WordVQ):
            alike = None if self.captions is None else self.captions.likeness(centers, self.model.rows_KD)
            self.model.place_words(centers, alike)
            for parameter in self.model.word_map.parameters():
                _from_rank_zero(parameter.data)
        else:
            self.model.codebook.copy_(centers)

    @torch.no_grad()
    def _restart_unused(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.used)
        unused = self.used == 0
        # As in k-means++: probability proportional to the squared distance from the nearest code.
        latents_1Ehw = self.recent.T[None, :, :, None]
        error = (self.model.embed(self.model.nearest(latents_1Ehw)) - latents_1Ehw).square().sum(dim=1).flatten()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.global_step)
        count = int(unused.sum())
        if count:  # on all ranks, whose recent latents differ
            fresh = self.model.codebook.clone()
            finite = error.isfinite()  # not all of them after a step that was skipped
            count = min(count, int(finite.sum()))
            if self.global_rank == 0 and float(error[finite].sum()) > 0:
                weight_N = torch.where(finite, error.double() + 1e-12, 0.0).cpu()
                chosen = torch.multinomial(weight_N, count, generator=generator)
                fresh[unused.nonzero()[:count, 0]] = self.recent[chosen.to(fresh.device)]
            self.model.codebook.copy_(_from_rank_zero(fresh))
        self.used.zero_()

    def on_validation_epoch_start(self) -> None:
        self._val = {}

    def _sums(self, number: int) -> dict[str, Tensor]:
        """Sums of a validation loader, from 0."""
        if number not in self._val:
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            names = ("mse", "psnr", "images", *(() if self.captions is None else ("caption_nll", "captions")))
            self._val[number] = {name: zero.clone() for name in names}
            self._val[number]["codes"] = torch.zeros_like(self.used)
        return self._val[number]

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the sums; outputs are quantized and rounded to uint8, as when used."""
        images_BCHW, sums = batch["images_BCHW"], self._sums(dataloader_idx)
        latents_BEhw = self.model.latents(to_unit(images_BCHW))
        ids_Bhw = self.model.nearest(latents_BEhw)
        output_BCHW = to_uint8(self.model.pixels(self.model.embed(ids_Bhw)))
        mse_B = (output_BCHW.double() - images_BCHW.double()).square().mean(dim=(1, 2, 3)) / 255**2
        sums["mse"] += mse_B.sum()
        sums["psnr"] += (-10 * torch.log10(mse_B.clamp(min=1e-10))).sum()
        sums["images"] += len(mse_B)
        sums["codes"] += torch.bincount(ids_Bhw.flatten(), minlength=len(self.used))
        if self.captions is not None and batch["is_compared"]:
            nll_2B = self.captions.nll(self.captions.images_of_codes(self.model.embed(ids_Bhw)), batch)
            sums["caption_nll"] += nll_2B.double().sum()
            sums["captions"] += nll_2B.numel()

    def validation_summary(self, dataloader_idx: int = 0) -> dict[str, float]:
        """PSNR in dB (of the mean error, and averaged over images), share of codes used, code perplexity.

        With a caption term also its nll among `data.batch_size` images, without those that fill no batch.
        """
        sums = self._sums(dataloader_idx)
        if dist.is_available() and dist.is_initialized():
            for value in sums.values():
                dist.all_reduce(value)
        images, codes = float(sums["images"]), sums["codes"].double()
        share = codes / codes.sum()
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        compared = float(sums.get("captions", 0))
        return {
            **({"caption_nll": float(sums["caption_nll"]) / compared} if compared else {}),
            "psnr": float(-10 * torch.log10(sums["mse"] / images)),
            "psnr_mean": float(sums["psnr"]) / images,
            "codes_used": float((codes > 0).double().mean()),
            "code_perplexity": float(entropy.exp()),
        }


def spread_out(points_NE: NDArray[np.float64], count: int, seed: int) -> NDArray[np.float64]:
    """k-means++ seeds as `kmeans2(minit="++")` of scipy draws them, which takes O(count) times as long."""
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(points_NE)))]
    nearest_N = np.full(len(points_NE), np.inf)
    for _ in range(1, count):
        nearest_N = np.minimum(nearest_N, cdist(points_NE[chosen[-1:]], points_NE, metric="sqeuclidean")[0])
        shares_N = (nearest_N / nearest_N.sum()).cumsum()
        chosen.append(min(int(np.searchsorted(shares_N, rng.uniform())), len(points_NE) - 1))
    return points_NE[chosen]


def edge_loss(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Mean absolute error of horizontal and vertical pixel differences, which favors sharp outlines."""
    across = F.l1_loss(output_BCHW.diff(dim=3), target_BCHW.diff(dim=3))
    down = F.l1_loss(output_BCHW.diff(dim=2), target_BCHW.diff(dim=2))
    return across + down


def _from_rank_zero(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor
