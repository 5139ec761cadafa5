import pytest
import torch
import torch.nn.functional as F

from t2i_lm.models.decoder import attend


@pytest.mark.parametrize("length", [3, 104, 600])
def test_short_attention_in_bfloat16_is_as_accurate_as_torchs(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = attend(q, k, v, causal=True)
    assert ours.shape == exact.shape
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
