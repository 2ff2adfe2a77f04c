"""Figures of a run, and the alarm for collapsed embeddings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isimed_index.pretrain.monitor import collapse_warning, rankme, spread


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def figures_of(embeddings: torch.Tensor) -> dict[str, float]:
    n = len(embeddings)
    return spread(embeddings, 50 * normal(n, 3), torch.arange(n) % 2, 100.0)


def test_rankme_counts_equal_directions() -> None:
    axes = torch.cat([torch.eye(5), -torch.eye(5)])
    assert rankme(torch.nn.functional.pad(axes, (0, 3))) == pytest.approx(5, rel=1e-3)


def test_rankme_equals_its_formula() -> None:
    x = normal(40, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.1])
    values = np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False)
    share = values / values.sum()
    assert rankme(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


@pytest.mark.parametrize(
    "embeddings",
    [torch.zeros(20, 8), torch.ones(20, 8), torch.nn.functional.pad(normal(20, 2), (0, 30)), normal(1, 8)],
    ids=["zeros", "constant", "rank 2", "one"],
)
def test_rankme_is_finite_on_zero_singular_values(embeddings: torch.Tensor) -> None:
    assert 0.99 < rankme(embeddings) < 3


def test_spread_measures_distances_within_scans() -> None:
    x, z = 50 * normal(12, 3), normal(12, 4)
    scan_of = torch.tensor([0] * 5 + [1] * 6 + [2])  # a scan with one patch has no pair

    def error(rows: range) -> float:
        pairs = [(i, j) for i in rows for j in rows if j < i]
        return float(np.mean([abs(100 * np.linalg.norm(z[i] - z[j]) - np.linalg.norm(x[i] - x[j])) for i, j in pairs]))

    figures = spread(z, x, scan_of, 100.0)
    assert figures["distance_error_mm"] == pytest.approx((error(range(5)) + error(range(5, 11))) / 2, rel=1e-4)
    assert figures["embedding_sd"] == pytest.approx(float(z.std(dim=0).mean()))
    assert math.isnan(spread(z[:2], x[:2], torch.tensor([0, 1]), 100.0)["distance_error_mm"])


@pytest.mark.parametrize(
    "embeddings",
    [torch.full((60, 16), 0.3), 0.3 + 1e-6 * normal(60, 16), normal(60, 1) @ torch.ones(1, 16)],
    ids=["a point", "a point with noise", "a line"],
)
def test_the_alarm_rings_on_collapse(embeddings: torch.Tensor) -> None:
    warning = collapse_warning(figures_of(embeddings))
    assert warning is not None
    assert "learning_rate" in warning


@pytest.mark.parametrize("dim", [3, 64])
def test_the_alarm_is_silent_on_embeddings_that_fill_space(dim: int) -> None:
    assert collapse_warning(figures_of(normal(60, dim))) is None
