"""Vectors that follow places, as embeddings of a position-aware encoder do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WAVES = 64
_AT_ONCE = 1 << 16  # rows


def position_like(n: int, dim: int, seed: int) -> tuple[NDArray[np.float16], NDArray[np.float64]]:
    """Vectors (n, dim), a smooth map of places with noise, and the places (n, 3), in a box from -1 to 1.

    The map is the same for every seed.
    """
    fixed = np.random.default_rng(9)
    waves, phases = 1.5 * fixed.normal(size=(3, _WAVES)), fixed.uniform(0, 2 * np.pi, _WAVES)
    mixed = (fixed.normal(size=(_WAVES, dim)) / 8).astype(np.float32)
    rng = np.random.default_rng(seed)
    places = rng.uniform(-1, 1, (n, 3))
    vectors = np.empty((n, dim), np.float16)
    for start in range(0, n, _AT_ONCE):
        some = np.cos(places[start : start + _AT_ONCE] @ waves + phases).astype(np.float32) @ mixed
        vectors[start : start + len(some)] = some + 0.05 * rng.standard_normal(some.shape, np.float32)
    return vectors, places
