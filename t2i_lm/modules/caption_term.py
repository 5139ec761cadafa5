"""The contrastive term between the codes of images and the words of their captions.

Shapes: `B` images, `E` code width, `h`, `w` the grid of ids, `K` codes, `V` text rows, `D` their width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_lm.config.sections import AlignConfig
from t2i_lm.models.contrastive import initial_log_scale, symmetric_nll
from t2i_lm.tokenizers.words import bag_means


class CaptionTerm(nn.Module):
    """CLIP's symmetric loss between bags of codes and bags of words.

    A caption is the mean of its text rows, as in `AlignmentModule`; an image is the mean over its cells of `head` of a
    code, whatever the position. Captions are taken relative to the mean caption. Text rows stay frozen and unmapped;
    otherwise the text side could adapt to arbitrary codes.

    With codes that are words, the head is trained to give each code the row of its word (`mismatch`).

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
        self.log_scale = initial_log_scale(config)

    def nll(self, image_BD: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Nll (2, B) in nats of each image's caption and of each caption's image.

        Args:
            image_BD: from `images_of_codes`.
            batch: of `CaptionedImages`.
        """
        with torch.autocast(image_BD.device.type, enabled=False):
            bags_BD = bag_means(self.rows_VD, batch["text_ids_L"], batch["text_starts_B"])
            text_BD = F.normalize(bags_BD - self.mean_D, dim=-1)
            hashes_B2 = batch["hashes_B2"] if self.settings.mask_duplicates else None
            return symmetric_nll(image_BD, text_BD, self.log_scale.exp(), hashes_B2)

    def images_of_codes(self, codes_BEhw: Tensor) -> Tensor:
        """Normalized bags (B, D) of codes, or of latents."""
        with torch.autocast(codes_BEhw.device.type, enabled=False):
            cells_BND = self.head(codes_BEhw.float().flatten(2).transpose(1, 2))
            return F.normalize(cells_BND.mean(dim=1), dim=-1)  # the head's bias is a mean of its own

    def mismatch(self, codes_KE: Tensor, words_KD: Tensor) -> Tensor:
        """Mean over codes of 1 - cosine between what the head makes of a code and the row of its word, 0-d."""
        with torch.autocast(codes_KE.device.type, enabled=False):
            return 1 - F.cosine_similarity(self.head(codes_KE), words_KD - self.mean_D, dim=-1).mean()

    @torch.no_grad()
    def likeness(self, centers_KE: Tensor, words_KD: Tensor) -> Tensor:
        """Cosine (K, K) of what the head makes of centers of latents (rows) to words (columns)."""
        with torch.autocast(centers_KE.device.type, enabled=False):
            return F.normalize(self.head(centers_KE), dim=-1) @ F.normalize(words_KD - self.mean_D, dim=-1).T
