"""Nearest codes of latents, and ids that do not depend on the processor.

Shapes: `B` images, `C` = 3 channels, `H`, `W` pixels, `h`, `w` the grid of ids, `N` = h * w, `M` = B * N cells,
`K` codes, `E` their width.
"""

import copy
from typing import Any

import torch
from torch import Tensor


def by_cell(latents_BEhw: Tensor) -> Tensor:
    """Latents (M, E), row-major."""
    return latents_BEhw.permute(0, 2, 3, 1).flatten(0, 2)


def squared_distances(latents_ME: Tensor, codes_KE: Tensor) -> Tensor:
    """Squared distances (M, K) to the codes, less the latent's own |z|^2, which does not change their order."""
    return codes_KE.square().sum(dim=1) - 2 * latents_ME @ codes_KE.T


class ExactIds:
    """Ids as computed in float64, whatever the processor, the batch size and the threads.

    Ids of float32 latents are kept where its error cannot change them. The images of the others, about one in twenty of
    the demo, are encoded in float64, on the CPU. Distances to the codes are in float64 throughout: in float32, those to
    similar codes are rounded to an equal value.
    """

    ERROR = (
        5e-6  # of a float32 latent, relative to the largest norm in its image; at most 1.7e-6 in the demo's tokenizers
    )
    CHUNK = 2**24  # distances at a time

    def __init__(self, model: Any) -> None:
        """Copies a `VQAutoencoder`."""
        self._model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self._codes_KE: Tensor = self._model.codebook
        self._farthest = 2 * self._codes_KE.norm(dim=1).max()  # at least the distance between any two codes

    def __call__(self, pixels_BCHW: Tensor, latents_BEhw: Tensor) -> Tensor:
        """Ids (B, N) int64, on the CPU, of pixels in the model's range with their float32 latents."""
        ids_BN, unsure_B = self._nearest(latents_BEhw)
        if unsure_B.any():
            latents_BEhw = self._model.latents(pixels_BCHW.cpu()[unsure_B].double())
            ids_BN[unsure_B], _ = self._nearest(latents_BEhw)
        return ids_BN

    def _nearest(self, latents_BEhw: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, N) of the nearest codes, and whether an error of ERROR could change one of an image (B,)."""
        latents_BEhw = latents_BEhw.cpu().double()
        images, size = len(latents_BEhw), max(1, self.CHUNK // len(self._codes_KE))
        error_B111 = self.ERROR * latents_BEhw.norm(dim=1, keepdim=True).amax(dim=(2, 3), keepdim=True)
        error_M = error_B111.expand(-1, 1, *latents_BEhw.shape[2:]).flatten()
        chunks = zip(torch.split(by_cell(latents_BEhw), size), torch.split(error_M, size), strict=True)
        ids_M, unsure_M = (
            torch.cat(both) for both in zip(*(self._nearest_of(*chunk) for chunk in chunks), strict=True)
        )
        return ids_M.view(images, -1), unsure_M.view(images, -1).any(dim=1)

    def _nearest_of(self, latents_ME: Tensor, error_M: Tensor) -> tuple[Tensor, Tensor]:
        codes_KE = self._codes_KE
        distance_MK = squared_distances(latents_ME, codes_KE)
        least_M, ids_M = distance_MK.min(dim=1)
        gap_MK = distance_MK - least_M[:, None]
        # A latent is gap / (2 |c - c'|) away from where another code c' is as near as c. Few codes are candidates.
        cells, others = (gap_MK < 2 * self._farthest * error_M[:, None]).nonzero(as_tuple=True)
        apart = (codes_KE[others] - codes_KE[ids_M[cells]]).norm(dim=1)  # 0 for the nearest itself
        near = gap_MK[cells, others] < 2 * apart * error_M[cells]
        unsure_M = torch.zeros_like(ids_M, dtype=torch.bool)
        unsure_M[cells[near]] = True
        return ids_M, unsure_M
