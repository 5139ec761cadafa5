"""The contrastive term between the codes of images and the words of their captions.

Shapes: `B` images, `E` code width, `h`, `w` the grid of ids, `K` codes, `V` text rows, `D` their width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_lm.config.sections import AlignConfig
from t2i_lm.models.contrastive import symmetric_nll
from t2i_lm.tokenizers.words import WordVQ


class CaptionTerm(nn.Module):
    """CLIP's symmetric loss between bags of codes and bags of words.

    A caption is the mean of its frozen text rows, as in `AlignmentModule`, so that what a code predicts is words as the
    language model has them: a trained text encoder could move toward whatever the codes say, and even a linear map
    could give any word the place of another one. An image is the mean of what `head` makes of each of its codes,
    wherever it stands, so that only the choice of codes tells images apart.

    Both are taken relative to the mean caption, without which the words that all captions have would drown the others.

    With codes that are words, a cell counts as the text row of its word: an image is told by words like those of its
    caption. Backward it is the softmax over all words, by distance in units of that between neighboring codes.

    Attributes:
        head: width of a code -> width of a text row.
    """

    rows_VD: Tensor
    mean_D: Tensor

    def __init__(self, rows_VD: Tensor, mean_D: Tensor, code_dim: int, config: AlignConfig) -> None:
        """`mean_D` is the mean of captions as bags of words."""
        super().__init__()
        width, self.settings = rows_VD.shape[1], config
        self.register_buffer("mean_D", mean_D.clone())
        self.register_buffer("rows_VD", rows_VD, persistent=False)  # those of backbone.path, whose hash a run records
        self.head = nn.Sequential(nn.Linear(code_dim, width), nn.GELU(), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale_init)))

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Bounds the inverse temperature, as CLIP does; after a step, so that its gradient stays."""
        self.log_scale.clamp_(max=math.log(self.settings.logit_scale_max))

    def nll(self, image_BD: Tensor, batch: dict[str, Tensor], across_ranks: bool = True) -> Tensor:
        """Nll (2, B) in nats of each image's caption and of each caption's image.

        Args:
            image_BD: from `images_of_codes` or `images_of_words`.
            batch: of `CaptionedImages`.
            across_ranks: whether candidates are the pairs of all ranks.
        """
        with torch.autocast(image_BD.device.type, enabled=False):
            bags_BD = F.embedding_bag(batch["text_ids_L"], self.rows_VD, batch["text_starts_B"], mode="mean")
            text_BD = F.normalize(bags_BD - self.mean_D, dim=-1)
            hashes_B2 = batch["hashes_B2"] if self.settings.mask_duplicates else None
            return symmetric_nll(image_BD, text_BD, self.log_scale.exp(), hashes_B2, across_ranks)

    def images_of_codes(self, codes_BEhw: Tensor) -> Tensor:
        """Normalized bags (B, D) of codes, or of latents."""
        with torch.autocast(codes_BEhw.device.type, enabled=False):
            cells_BND = self.head(codes_BEhw.float().flatten(2).transpose(1, 2))
            return F.normalize(cells_BND.mean(dim=1), dim=-1)  # the head's bias is a mean of its own

    def images_of_words(self, latents_BEhw: Tensor, model: WordVQ) -> Tensor:
        """Normalized bags (B, D) of the words nearest to latents."""
        with torch.autocast(latents_BEhw.device.type, enabled=False):
            codes_KE = model.codebook
            flat_LE = latents_BEhw.float().permute(0, 2, 3, 1).flatten(0, 2)
            distance_LK = codes_KE.square().sum(dim=1) - 2 * flat_LE @ codes_KE.T  # as `VQAutoencoder.nearest`
            soft_LK = torch.softmax(-distance_LK / spacing(codes_KE.detach()), dim=1)
            hard_LK = F.one_hot(distance_LK.argmin(dim=1), len(codes_KE)).to(soft_LK.dtype)
            chosen_LK = hard_LK + soft_LK - soft_LK.detach()
            bag_BK = chosen_LK.unflatten(0, (len(latents_BEhw), -1)).mean(dim=1)
            return F.normalize(bag_BK @ model.rows_KD - self.mean_D, dim=-1)

    @torch.no_grad()
    def likeness(self, centers_KE: Tensor, words_KD: Tensor) -> Tensor:
        """Cosine (K, K) of what the head makes of centers of latents (rows) to words (columns)."""
        with torch.autocast(centers_KE.device.type, enabled=False):
            return F.normalize(self.head(centers_KE), dim=-1) @ F.normalize(words_KD - self.mean_D, dim=-1).T


def spacing(codes_KE: Tensor) -> Tensor:
    """Mean squared distance of a code from its nearest other one, 0-d; positive."""
    distance_KK = torch.cdist(codes_KE, codes_KE).square()
    return distance_KK.fill_diagonal_(float("inf")).amin(dim=1).mean().clamp(min=1e-12)
