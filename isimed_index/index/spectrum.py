"""The intrinsic dimension of embeddings, measured: how many principal axes keep true neighbours among the nearest.

Variance alone does not tell: what separates two neighbours may lie in axes that hold next to none of it. So true
neighbours are looked for along the first axes only, and how deep they fall there is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_ROUNDING = 1 - 1e-9  # so that a neighbour that is in the sample does not come before itself


@dataclass(frozen=True, slots=True)
class Axes:
    """Principal axes of a sample of vectors, by falling variance."""

    mean: NDArray[np.float32]  # (d,)
    axes: NDArray[np.float32]  # (d, d), one axis a row
    variance: NDArray[np.float64]  # (d,)

    @classmethod
    def of(cls, sample: NDArray[np.float32]) -> Axes:
        """Principal axes of vectors (n, d)."""
        mean = sample.mean(axis=0, dtype=np.float64)
        centred = sample - mean.astype(np.float32)
        spread = centred.T @ centred / np.float32(max(len(sample), 1))
        variance, axes = np.linalg.eigh(spread.astype(np.float64))
        return cls(mean.astype(np.float32), axes.T[::-1].astype(np.float32), np.maximum(variance[::-1], 0))

    def rotation(self, dims: int, rotated: bool, seed: int = 0) -> NDArray[np.float32]:
        """The first axes (dims, d); `rotated` mixes them at random, distances stay."""
        if not rotated:
            return self.axes[:dims]
        mix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dims, dims)))
        return np.asarray(mix, dtype=np.float32) @ self.axes[:dims]


@dataclass(frozen=True, slots=True)
class Depths:
    """How deep the true neighbours of queries fall where only the first `dims` axes are compared."""

    dims: NDArray[np.intp]  # (s,), rising
    recall: NDArray[np.float64]  # (s, f): share of neighbours among the nearest, for each of f depths
    depths: NDArray[np.intp]  # (f,): rows that are ranked again

    def least(self, depth: int, target: float) -> int:
        """The fewest axes with which the nearest `depth` rows hold `target` of the neighbours; the most where none."""
        column = int(np.flatnonzero(self.depths == depth)[0])
        enough = np.flatnonzero(self.recall[:, column] >= target)
        return int(self.dims[enough[0] if enough.size else -1])


def measure_depths(
    axes: Axes,
    rows: NDArray[np.float32],
    total: int,
    queries: NDArray[np.float32],
    near: NDArray[np.float32],
    depths: NDArray[np.intp],
) -> Depths:
    """How deep `near` (m, t, d), the true neighbours of `queries` (m, d), fall among `total` rows.

    `rows` (n, d) are drawn from the total: each stands for total / n of them.
    """
    steps = [step for step in _STEPS if step < rows.shape[1]] + [rows.shape[1]]
    crowd = total / max(len(rows), 1)
    recall = []
    for rank in _ranks(axes, rows, queries, near, steps):
        recall.append([float(np.mean(rank * crowd < depth)) for depth in depths])
        if recall[-1][0] >= 1.0 - 1e-9:
            break
    return Depths(np.array(steps[: len(recall)]), np.array(recall), depths)


def _ranks(
    axes: Axes, rows: NDArray[np.float32], queries: NDArray[np.float32], near: NDArray[np.float32], steps: list[int]
) -> Iterator[NDArray[np.intp]]:
    """For a rising number of axes, how many of `rows` are nearer to a query than its true neighbours: (m, t)."""
    m, t, d = near.shape
    away = np.zeros((m, len(rows)))  # in double precision: near rows are told apart by sums that cancel
    away_near = np.zeros((m, t))
    before = 0
    for step in steps:
        some = axes.axes[before:step].T.astype(np.float64)
        a, b = (queries - axes.mean) @ some, (rows - axes.mean) @ some
        c = ((near.reshape(-1, d) - axes.mean) @ some).reshape(m, t, -1)
        away += np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * (a @ b.T)
        away_near += np.square(c - a[:, None]).sum(2)
        before = step
        ranks = [np.searchsorted(np.sort(far), close * _ROUNDING) for far, close in zip(away, away_near, strict=True)]
        yield np.stack(ranks)
