"""The Frechet term against scipy's root, the sums against torchmetrics, the kernel distance against torch-fidelity."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

import callbacks.metrics.frechet
from callbacks import FeatureDistance, Inception, frechet_distance, kernel_distance


def features(count: int, width: int, seed: int) -> Tensor:
    """Correlated features with a mean."""
    draw = torch.Generator().manual_seed(seed)
    mixing_DD = torch.randn(width, width, generator=draw, dtype=torch.float64) / width**0.5
    return torch.randn(count, width, generator=draw, dtype=torch.float64) @ mixing_DD + 0.1 * seed


def statistics(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    return features_ND.mean(dim=0), features_ND.T.cov()


def by_root(fake_ND: Tensor, real_ND: Tensor) -> float:
    """The distance with scipy's general matrix root."""
    (mean1_D, cov1_DD), (mean2_D, cov2_DD) = statistics(fake_ND), statistics(real_ND)
    root_DD: Any = scipy.linalg.sqrtm((cov1_DD @ cov2_DD).numpy())
    between = float((mean1_D - mean2_D).square().sum())
    return between + float(cov1_DD.trace() + cov2_DD.trace()) - 2 * float(np.trace(root_DD).real)


def test_the_distance_is_scipys() -> None:
    fake_ND, real_ND = features(400, 64, 1), features(500, 64, 2)
    ours = float(frechet_distance(*statistics(fake_ND), *statistics(real_ND)))
    assert ours == pytest.approx(by_root(fake_ND, real_ND), rel=1e-10)


def test_fewer_images_than_features_give_the_distance_in_their_span() -> None:
    """Singular covariances: features of 16 dimensions turned into 64 by an isometry keep their distance."""
    fake_ND, real_ND = features(15, 16, 1), features(12, 16, 2)
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(64, 16, generator=draw, dtype=torch.float64)).Q
    wide = float(frechet_distance(*statistics(fake_ND @ turn.T), *statistics(real_ND @ turn.T)))
    assert wide == pytest.approx(float(frechet_distance(*statistics(fake_ND), *statistics(real_ND))), rel=1e-6)
    assert float(frechet_distance(*statistics(fake_ND), *statistics(fake_ND))) == pytest.approx(0, abs=1e-6)


def test_the_sums_are_torchmetrics() -> None:
    class Given(nn.Module):
        num_features = 64

        def forward(self, features_ND: Tensor) -> Tensor:
            return features_ND

    fake_ND, real_ND = features(300, 64, 1), features(200, 64, 2)
    ours, theirs = FeatureDistance(64), FrechetInceptionDistance(Given())
    for metric in (ours, theirs):
        for start in range(0, 300, 70):
            metric.update(fake_ND[start : start + 70], real=False)
        metric.update(real_ND, real=True)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-9)
    ours.reset()
    ours.update(fake_ND[:1], real=False)
    ours.update(real_ND, real=True)
    with pytest.raises(ValueError, match="1 fake images"):
        ours.compute()


@pytest.mark.parametrize("count", [40, 90])  # fewer images than a subset has, and more
def test_the_kernel_distance_is_torch_fidelitys(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks.metrics.frechet, "KID_SUBSET_SIZE", 60)
    fake_ND, real_ND = features(count, 16, 1), features(count + 100, 16, 2)
    options = {"kid_subset_size": min(60, count), "rng_seed": 2020, "verbose": False}
    theirs = kid_features_to_metric(fake_ND, real_ND, **options)
    mean, deviation = kernel_distance(fake_ND, real_ND)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6, abs=1e-12)


def test_wrong_weights_are_refused_and_run_no_code(inception_weights: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(ValueError, match="expected 00"):
        Inception(inception_weights, 64, "00" * 32)
    with pytest.raises(ValueError, match="no Inception weights at"):
        Inception(tmp_path / "absent.pth", 64)
    with pytest.raises(ValueError, match="features=65: expected one of 64"):
        Inception(inception_weights, 65)
    for name, content in {"harm": {"a": Harm()}, "other": {"a": torch.zeros(1)}, "list": [torch.zeros(1)]}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not torch-fidelity"):
            Inception(tmp_path / name, 64)
    (tmp_path / "text").write_text("no weights")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="text is not torch-fidelity"):
        Inception(tmp_path / "text", 64)
    assert not (tmp_path / "ran").exists()
