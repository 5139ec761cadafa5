"""Frechet and kernel distance of two sets of features, from torchmetrics' sums with another Frechet term.

N is the number of images, D the width of a feature, W the number of ranks.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

# As in torch-fidelity, so that both agree on the same features: number of subsets, their size, their seed.
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020


def frechet_distance(mean1_D: Tensor, cov1_DD: Tensor, mean2_D: Tensor, cov2_DD: Tensor) -> Tensor:
    """Squared Frechet distance of two Gaussians, 0-d float64 (Heusel et al. 2017, equation 6).

    For any factor F F^T = cov1, the eigenvalues of cov1 cov2 are those of F^T cov2 F, which is symmetric, so `eigvalsh`
    suffices. A general root (scipy's `sqrtm`, torchmetrics' `eigvals`) is slower and may return complex numbers for
    fewer images than features. `eigvalsh` of cov1 cov2 itself would be wrong: the product is not symmetric.
    """
    cov1_DD, cov2_DD = cov1_DD.double(), cov2_DD.double()
    factor_DD = _factor(cov1_DD)
    # Rounding can make zeros slightly negative.
    cross_D = torch.linalg.eigvalsh(factor_DD.mT @ cov2_DD @ factor_DD).clamp(min=0).sqrt()
    between = (mean1_D.double() - mean2_D.double()).square().sum()
    distance: Tensor = between + cov1_DD.trace() + cov2_DD.trace() - 2 * cross_D.sum()
    return distance


def _factor(cov_DD: Tensor) -> Tensor:
    """F with F F^T = cov: Cholesky's, ten times cheaper than eigenvectors, or those for singular covariances."""
    lower_DD: Tensor
    lower_DD, failed = torch.linalg.cholesky_ex(cov_DD)
    if not failed:
        return lower_DD
    values_D, vectors_DD = torch.linalg.eigh(cov_DD)
    factor_DD: Tensor = vectors_DD * values_D.clamp(min=0).sqrt()
    return factor_DD


def kernel_distance(fake_ND: Tensor, real_ND: Tensor) -> tuple[float, float]:
    """Kernel distance (mean, standard deviation over subsets) of two sets (Binkowski et al. 2018).

    Unbiased in the number of images, unlike the Frechet distance. If a set has fewer than `KID_SUBSET_SIZE` images,
    the subsets are as large as that set.
    """
    random = np.random.RandomState(KID_SEED)
    size = min(KID_SUBSET_SIZE, len(fake_ND), len(real_ND))
    values = []
    for _ in range(KID_SUBSETS):
        fake_SD = fake_ND[torch.from_numpy(random.choice(len(fake_ND), size, replace=False)).to(fake_ND.device)]
        real_SD = real_ND[torch.from_numpy(random.choice(len(real_ND), size, replace=False)).to(real_ND.device)]
        values.append(float(poly_mmd(real_SD.double(), fake_SD.double())))
    return float(np.mean(values)), float(np.std(values))


class FeatureDistance(FrechetInceptionDistance):
    """torchmetrics' FID on precomputed features: float64 sums (n, sum, outer product), added over ranks.

    `compute` differs from torchmetrics' in its Frechet term and in staying float64: in float32 the values of one and
    of several ranks would differ by more than 1e-6.
    """

    def __init__(self, width: int, **options: Any) -> None:
        """`width` is D; options are `Metric`'s."""
        network = nn.Identity()  # the inputs are features already
        network.num_features = width  # type: ignore[assignment]
        super().__init__(feature=network, **options)

    def compute(self) -> Tensor:
        """The distance, 0-d float64.

        Raises:
            ValueError: if a set has fewer than two images.
        """
        statistics = []
        for kind in ("fake", "real"):
            count = getattr(self, f"{kind}_features_num_samples")
            if count < 2:
                raise ValueError(f"{int(count)} {kind} images: a Frechet distance requires at least 2 per set")
            sum_D, outer_DD = getattr(self, f"{kind}_features_sum"), getattr(self, f"{kind}_features_cov_sum")
            mean_D = sum_D / count
            statistics += [mean_D, (outer_DD - count * torch.outer(mean_D, mean_D)) / (count - 1)]
        return frechet_distance(*statistics)
