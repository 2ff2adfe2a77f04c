"""Pooling: the patches of a scan, or of a region in it, as one vector. Nothing is learned, and order does not matter.

    mean       m = Σ w u / Σ w                                    where they lie
    mean ‖ sd  (m, s), s² = Σ w u² / Σ w - m² in each dimension   where they lie, and how far apart

u are unit vectors, so m² + s² summed over all dimensions is 1: the pair is a unit vector too, that of a single patch if
all are alike. Statistics pooling of that kind: Snyder et al., X-vectors, ICASSP 2018; see decision 0022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 13  # patches at once


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """Weighted mean and standard deviation (g, d) of several groups of vectors, in float32."""

    mean: NDArray[np.float32]
    sd: NDArray[np.float32]

    @property
    def both(self) -> NDArray[np.float32]:
        """Mean ‖ sd (g, 2 d); unit vectors where unit vectors were pooled."""
        return np.concatenate([self.mean, self.sd], axis=1)


def pool(
    vectors: NDArray[np.floating[Any]],
    weights: Any,
    unit: Callable[[NDArray[np.floating[Any]]], NDArray[np.floating[Any]]],
) -> Pooled:
    """Pool vectors (n, d), which `unit` makes unit vectors (n, e), by `weights` (g, n), a sparse row for each group.

    Weights are not negative, and no group is without any. Sums are kept in float64.
    """
    groups, count = weights.shape
    total = np.asarray(weights.sum(axis=1)).reshape(groups, 1)
    mean: Any = 0.0
    square: Any = 0.0
    for start in range(0, count, _BLOCK):
        u = unit(vectors[start : start + _BLOCK]).astype(np.float64)  # (b, e)
        part = weights[:, start : start + _BLOCK]  # (g, b)
        mean = mean + part @ u / total
        square = square + part @ u**2 / total
    return Pooled(mean.astype(np.float32), np.sqrt(np.maximum(square - mean**2, 0)).astype(np.float32))
