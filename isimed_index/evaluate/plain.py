"""The plain consensus: what a set of descriptors is worth, by the shortest honest path from matches to millimetres.

    nearest neighbour ─▶ mutual weight ─▶ robust affine ─▶ robust local affine around each point

It is slow and obvious on purpose. Encoders are compared by it (`benchmarks/methods.py`), because it leaves nothing to
charts, templates or calibration, and the fast path of `consensus` is held against it in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

_CYCLE_MM = 10.0  # a match that comes back this far from where it began counts e⁻¹
_FLOOR = 1e-4  # what every match counts at least in the global fit
_MUTUAL = 0.05  # matches that count less than this are left out of the local fit
_SCALE_MM = 8.0  # residuals well above this stop counting
_RIDGE_MM2 = 1e4  # what a unit change of the local linear part costs: about 100 mm of lever, squared


@dataclass(frozen=True, slots=True)
class Described:
    """Places of one scan in RAS+ mm (n, 3), and a vector (n, d) that describes each; near vectors are alike."""

    places_mm: Points
    vectors: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answers:
    """Where each of m points lies in the other scan, RAS+ mm (m, 3): after each step of the consensus."""

    nearest: Points
    affine: Points
    local: Points


def plain_consensus(source: Described, target: Described, points_mm: Points, *, sigma_mm: float = 20.0) -> Answers:
    """Carry points (m, 3) of `source` to `target`, both RAS+ mm (SCIENCE: nearest neighbour, affine, local affine).

    `nearest` is the place of the best match of the source place nearest to the point; `sigma_mm` is the width of the
    Gaussian that the local affine looks through.
    """
    similarity = _likeness(source.vectors, target.vectors)
    best = similarity.argmax(axis=1)
    back = similarity.argmax(axis=0)[best]
    cycle = np.linalg.norm(source.places_mm[back] - source.places_mm, axis=1)
    mutual = np.exp(-((cycle / _CYCLE_MM) ** 2))
    matched = target.places_mm[best]

    whole = _reweighted(source.places_mm, matched, mutual + _FLOOR, rounds=15)
    kept = mutual > _MUTUAL
    at, to, trust = source.places_mm[kept], matched[kept], mutual[kept]
    local = []
    for point in points_mm:
        near = np.exp(-((at - point) ** 2).sum(axis=1) / (2 * sigma_mm**2))
        local.append(_carried(point, _reweighted(at, to, near * trust, rounds=8, prior=whole)))
    closest = [int(np.linalg.norm(source.places_mm - point, axis=1).argmin()) for point in points_mm]
    return Answers(matched[closest], np.array([_carried(point, whole) for point in points_mm]), np.array(local))


def _likeness(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Minus the squared distance of every two vectors (n, m); for unit vectors it orders as their cosine does."""
    likeness: NDArray[np.float32] = a @ (2 * b).T
    likeness -= (a**2).sum(axis=1)[:, None]
    likeness -= (b**2).sum(axis=1)
    return likeness


def _reweighted(
    x: Points, y: Points, weight: NDArray[np.float64], *, rounds: int, prior: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """The (4, 3) matrix that takes [x 1] to y by re-weighted least squares, shrunk to `prior` where there is one."""
    design = np.c_[x, np.ones(len(x))]
    ridge = np.diag([_RIDGE_MM2] * 3 + [1.0]) if prior is not None else np.zeros((4, 4))
    start = prior if prior is not None else np.zeros((4, 3))
    solution, now = start, weight
    for _ in range(rounds):
        weighted = design * now[:, None]
        right = weighted.T @ (y - design @ start)
        solution = start + np.linalg.lstsq(weighted.T @ design + ridge, right, rcond=None)[0]
        residual = np.linalg.norm(design @ solution - y, axis=1)
        now = weight / (1 + (residual / _SCALE_MM) ** 2) ** 2
    return solution


def _carried(point: Points, matrix: NDArray[np.float64]) -> Points:
    carried: Points = np.r_[point, 1.0] @ matrix
    return carried
