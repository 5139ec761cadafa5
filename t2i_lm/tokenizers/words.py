"""Words as rows of a language model, and an image tokenizer whose codes are words.

After SPAE (Yu et al., 2023), whose codes are words of a language model too. There the embedding is fixed and the
encoder approaches it; here a linear map of it is trained, so that a codebook may be narrower than the language model.

Shapes: `V` text rows, `D` their width, `K` codes, words or bags, `L` ids of all bags, `E` code width.
"""

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.vq import PatchedVQ

# In front of a word that stands inside a sentence.
LEAD = "a"
# Rounds of assignment and least squares in `WordVQ.place_words`.
ROUNDS = 5


def pieces_of(text: TextTokenizer, phrase: str) -> list[int]:
    """Ids of a word or phrase inside a sentence, that is with a space in front."""
    lead, whole = text.encode(LEAD), text.encode(f"{LEAD} {phrase}")
    return whole[len(lead) :] if whole[: len(lead)] == lead else text.encode(phrase)


def phrase_rows(rows_VD: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Mean row (K, D) of the pieces of each phrase; zeros for one without pieces."""
    lengths = [len(one) for one in pieces]
    starts_K = torch.tensor([0, *lengths[:-1]], device=rows_VD.device).cumsum(dim=0)
    ids_L = torch.tensor([piece for one in pieces for piece in one], dtype=torch.int64, device=rows_VD.device)
    return bag_means(rows_VD, ids_L, starts_K)


def bag_means(rows_VD: Tensor, ids_L: Tensor, starts_K: Tensor) -> Tensor:
    """Mean row (K, D) of each bag of ids, zeros for an empty one.

    Args:
        rows_VD: embedding rows.
        ids_L: the concatenated ids of all bags.
        starts_K: offset of each bag.
    """
    return F.embedding_bag(ids_L, rows_VD, starts_K, mode="mean")


def standardized(rows_VD: Tensor) -> Tensor:
    """Rows, minus their mean, of unit variance over all entries; float32."""
    rows_VD = rows_VD.detach().float()
    rows_VD = rows_VD - rows_VD.mean(dim=0)
    return rows_VD / rows_VD.std().clamp(min=1e-12)


class WordVQ(PatchedVQ):
    """A `PatchedVQ` each of whose codes is a word: a trained linear map of the word's fixed row.

    Attributes:
        words: of the codes, in order; in the state, so that a checkpoint keeps those that it was trained with.
    """

    rows_KD: Tensor

    def __init__(self, config: VQModelConfig, words: Sequence[str], rows_KD: Tensor) -> None:
        super().__init__(config)
        assert len(words) == len(rows_KD) == config.codes
        self.words = list(words)
        super().codebook.requires_grad_(False)  # replaced by the map's product
        self.register_buffer("rows_KD", rows_KD.clone())
        self.word_map = nn.Linear(rows_KD.shape[1], config.code_dim)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (codes, E) in float32, also under autocast: the exported ones decide the ids."""
        with torch.autocast(self.rows_KD.device.type, enabled=False):
            codes_KE: Tensor = self.word_map(self.rows_KD)
        return codes_KE

    @torch.no_grad()
    def place_words(self, centers_KE: Tensor, alike_KK: Tensor | None = None) -> None:
        """Sets the map by least squares so that the codes lie near the centers, each near another one.

        With similarities, words are assigned to centers so that their sum is greatest. Without, the assignment starts
        from the principal components of words and centers, and alternates with fitting the map.

        Args:
            centers_KE: centers of latents.
            alike_KK: similarity of each center (row) to each word (column).
        """
        centers_KE, rows_KD = centers_KE.detach().cpu().double(), self.rows_KD.cpu().double()
        wide_KF = torch.cat([rows_KD, torch.ones(len(rows_KD), 1, dtype=torch.float64)], dim=1)
        if alike_KK is None:
            cost_KK = torch.cdist(centers_KE, _matched_components(rows_KD, centers_KE)).square()
        else:
            cost_KK = -alike_KK.detach().cpu().double()
        for _ in range(ROUNDS if alike_KK is None else 1):
            _, word_K = linear_sum_assignment(cost_KK.numpy())
            solution_FE = torch.linalg.lstsq(wide_KF[torch.from_numpy(word_K)], centers_KE, driver="gelsd").solution
            cost_KK = torch.cdist(centers_KE, wide_KF @ solution_FE).square()
        self.word_map.weight.copy_(solution_FE[:-1].T)
        self.word_map.bias.copy_(solution_FE[-1])

    def plain_state(self) -> dict[str, Tensor]:
        own = {name for name in self.state_dict() if name.startswith(("rows_KD", "word_map.", "_extra_state"))}
        state = {name: tensor for name, tensor in self.state_dict().items() if name not in own}
        return {**state, "vq.quantize.embedding.weight": self.codebook}

    def codebook_state(self) -> dict[str, Tensor]:
        return {"word_map.weight": self.word_map.weight, "word_map.bias": self.word_map.bias}

    def get_extra_state(self) -> Tensor:
        """The words as JSON in UTF-8, uint8."""
        return torch.tensor(list(json.dumps(self.words).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.words = json.loads(bytes(state.tolist()))


def _matched_components(rows_KD: Tensor, centers_KE: Tensor) -> Tensor:
    """The rows' leading principal components (K, E), with mean and covariance of the centers."""
    u_KR, _, _ = torch.linalg.svd(rows_KD - rows_KD.mean(dim=0), full_matrices=False)
    mean_E = centers_KE.mean(dim=0)
    _, deviation_E, axes_EE = torch.linalg.svd(centers_KE - mean_E, full_matrices=False)
    width = min(u_KR.shape[1], len(deviation_E))
    codes_KE: Tensor = mean_E + u_KR[:, :width] * deviation_E[:width] @ axes_EE[:width]
    return codes_KE
