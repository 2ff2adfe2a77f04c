"""Robust fits: from many single matches, most a little wrong and some very wrong, to one trustworthy map in mm.

Single nearest neighbours are off by a centimetre or more; an affine fitted robustly to all of them, and then once more
to those around one point, is several times better. Everything here is NumPy on plain arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isimed_index.lattice import Lattice, Points, Vectors
from isimed_index.space import Affine, apply_affine, inverse

AGREES_MM = 6.0
_FLOOR = 1e-6  # mm², relative: keeps a fit to coplanar points solvable, and changes no other
_AT_ONCE = 256  # windows whose vectors are gathered together, some 10 MB
_ROOM = 1 << 26  # similarities in memory at once, 256 MB of a thread
_FEW = 64  # rows of similarities that are compared while they are in the processor's cache


def robust_affine(
    x: Points,
    y: Points,
    weight: NDArray[np.float64],
    *,
    prior: Affine | None = None,
    ridge: float = 0.0,
    scale_mm: float = 8.0,
    rounds: int = 15,
) -> Affine:
    """The affine (4, 4) that maps x (n, 3) to y (n, 3), by re-weighted least squares with a Geman–McClure weight.

    Args:
        weight: (n,) trust in each pair before its residual is seen.
        prior: shrink the linear part towards this affine; None: what the points leave open is a translation.
        ridge: how much a unit change of the linear part costs, in mm² of weighted points (needs `prior`).
        scale_mm: residuals well above this stop counting.
        rounds: how often residuals are weighed again.
    """
    if not weight.sum() > 0:
        weight = np.ones(len(x))
    trust = weight.sum()
    centre = np.average(x, axis=0, weights=weight)
    design = np.c_[x - centre, np.ones(len(x))]  # (n, 4)
    start = np.empty((4, 3))
    start[:3] = np.eye(3) if prior is None else prior[:3, :3].T
    start[3] = np.average(y, axis=0, weights=weight) if prior is None else apply_affine(prior, centre)
    # The floor decides only what the points leave open, such as the direction across a single plane of them.
    floor = _FLOOR * trust
    penalty = np.diag([ridge + floor] * 3 + [floor])
    solution, w = start, weight
    for _ in range(rounds):
        weighted = design * w[:, None]
        solution = start + np.linalg.solve(weighted.T @ design + penalty, weighted.T @ (y - design @ start))
        residual = np.linalg.norm(design @ solution - y, axis=1)
        w = weight / (1 + (residual / scale_mm) ** 2) ** 2
    affine = np.eye(4)
    affine[:3, :3] = solution[:3].T
    affine[:3, 3] = solution[3] - affine[:3, :3] @ centre
    return affine


def mutual_matches(
    xa: Points, a: Vectors, b: Vectors, *, spread_mm: float = 10.0, block: int = 2048
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The best match in b (m, d) of every vector of a (n, d), and a trust that falls with its cycle error.

    Vectors have unit length. The cycle error is the distance in mm between a point of `xa` (n, 3) and where its match
    points back to. Returns indices into b (n,) and weights (n,) in 0…1.
    """
    best = np.empty(len(a), dtype=np.int64)
    back = np.full(len(b), -np.inf, dtype=np.float32)
    back_from = np.zeros(len(b), dtype=np.int64)
    block = max(_FEW, min(block, _ROOM // max(1, len(b))))
    # Fresh memory for each block would cost as much as the products.
    room = np.empty((min(block, len(a)), len(b)), np.float32)
    for start in range(0, len(a), block):
        similarity = np.matmul(a[start : start + block], b.T, out=room[: len(a) - start])  # (block, m)
        best[start : start + block] = similarity.argmax(1)
        for first in range(0, len(similarity), _FEW):
            few = similarity[first : first + _FEW]
            peak = few.max(0)
            better = np.flatnonzero(peak > back)  # ever fewer, and the search for the row is what takes long
            back[better], back_from[better] = peak[better], few[:, better].argmax(0) + start + first
    cycle = np.linalg.norm(xa[back_from[best]] - xa, axis=1)
    return best, np.exp(-((cycle / spread_mm) ** 2))


def window_offsets(reach: int) -> NDArray[np.int64]:
    """All lattice offsets ((2·reach+1)³, 3) of a cube around 0."""
    axis = np.arange(-reach, reach + 1)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def window_matches(
    vectors: Vectors,
    expected_mm: Points,
    target: Lattice,
    *,
    reach: int = 2,
    temperature: float = 0.05,
    spread_mm: float = 40.0,
) -> tuple[Points, NDArray[np.float64]]:
    """Where each vector (n, d) lies in `target`, searched around `expected_mm` (n, 3), finer than the lattice step.

    Returns matched places (n, 3) in mm and the best similarity (n,); -inf where the window holds no stored point.
    """
    steps = window_offsets(reach)  # (w, 3) lattice indices
    steps_mm = steps @ target.affine[:3, :3].T
    nearest = np.rint(apply_affine(inverse(target.affine), expected_mm)).astype(np.int64)  # (n, 3)
    similarity = np.empty((len(vectors), len(steps)), np.float32)
    for start in range(0, len(vectors), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        similarity[some] = _similarities(vectors[some], nearest[some], steps, target)
    middle = apply_affine(target.affine, nearest) - expected_mm  # of the window, seen from the expected place
    square = (middle**2).sum(1)[:, None] + 2 * middle @ steps_mm.T + (steps_mm**2).sum(1)  # (n, w) mm²
    score = similarity - square / spread_mm**2
    peak = score.max(1, keepdims=True)
    found = np.isfinite(peak)
    vote = np.exp((score - np.where(found, peak, 0.0)) / temperature)
    moved = middle + vote @ steps_mm / np.where(found, vote.sum(1, keepdims=True), 1.0)
    return expected_mm + np.where(found, moved, 0.0), similarity.max(1).astype(np.float64)


def _similarities(
    vectors: Vectors, nearest: NDArray[np.int64], steps: NDArray[np.int64], target: Lattice
) -> NDArray[np.float32]:
    """Inner products (n, w) of vectors (n, d) with the stored points around lattice indices (n, 3); -inf where none."""
    flat = np.zeros((len(nearest), len(steps)), np.int64)  # (n, w)
    inside = np.ones(flat.shape, bool)
    for axis, size in enumerate(target.mask.shape):  # one at a time: arrays (n, w, 3) are slow
        at = nearest[:, axis, None] + steps[:, axis]
        inside &= (at >= 0) & (at < size)
        flat = flat * size + np.clip(at, 0, size - 1)
    around = target.vectors.reshape(-1, vectors.shape[1]).take(flat, axis=0)  # (n, w, d)
    products = np.matmul(around, vectors[:, :, None])[..., 0]
    return np.where(inside & target.mask.ravel()[flat], products, np.float32(-np.inf))


@dataclass(frozen=True, slots=True)
class Fit:
    """An affine between two frames (mm → mm), the median distance (mm) of matches from it, and how many agree."""

    affine: Affine
    residual_mm: float
    matches: int


def fit_pair(
    source: Lattice, target: Lattice, *, whole: Lattice | None = None, start: Affine | None = None, rounds: int = 2
) -> Fit:
    """The affine from `source` mm to `target` mm that most matches agree on.

    Without `start` the matches are first sought in the whole target, or in `whole`, which is the target with fewer
    points; then, `rounds` times, around where the affine points. A match agrees when it lies within `AGREES_MM` of the
    affine.
    """
    xa, a = source.stored()
    if start is None:
        xb, b = (whole or target).stored()
        best, weight = mutual_matches(xa, a, b)
        start = robust_affine(xa, xb[best], weight + 1e-4)
    affine = start
    error = np.full(len(xa), np.inf)
    for _ in range(max(1, rounds)):
        matched, similarity = window_matches(a, apply_affine(affine, xa), target)
        trusted = np.isfinite(similarity)
        weight = np.where(trusted, np.clip(similarity, 0, None) ** 2, 0.0) + 1e-9
        affine = robust_affine(xa, matched, weight)
        error = np.where(trusted, np.linalg.norm(apply_affine(affine, xa) - matched, axis=1), np.inf)
    residual = float(np.median(error[np.isfinite(error)])) if np.isfinite(error).any() else float("inf")
    return Fit(affine, residual, int((error < AGREES_MM).sum()))


def agreement(source: Lattice, target: Lattice, affine: Affine, *, within_mm: float = 16.0, sample: int = 500) -> float:
    """Share of the source's points, of a sample, whose best match in the *whole* target lies where `affine` sends them.

    Nothing pulls these matches towards the affine, so a scan of another part of the body agrees by chance alone.
    """
    xa, a = source.stored()
    xb, b = target.stored()
    if not len(xa) or not len(xb):
        return 0.0
    some = np.random.default_rng(0).permutation(len(xa))[:sample]
    nearest = (a[some] @ b.T).argmax(axis=1)
    error = np.linalg.norm(apply_affine(affine, xa[some]) - xb[nearest], axis=1)
    return float((error <= within_mm).mean())


def local_affine(
    source: Lattice,
    target: Lattice,
    point_mm: NDArray[np.float64],
    start: Affine,
    *,
    sigmas_mm: tuple[float, ...] = (20.0, 16.0, 14.0),
    reach: int = 2,
) -> tuple[Affine, float]:
    """The affine that holds around one point (3,), narrowed from `start`, and its weighted residual in mm.

    The neighbourhood of the point is matched within a window around where the affine sends it, the affine is fitted
    again with Gaussian weights around the point and shrunk to the one before; each round is narrower.
    """
    radius = 1.8 * sigmas_mm[0]
    to_index = inverse(source.affine)
    middle = apply_affine(to_index, point_mm)
    span = radius * np.linalg.norm(to_index[:3, :3], axis=1)  # the box of the sphere, also where axes are sheared
    low = np.clip(np.ceil(middle - span).astype(int), 0, source.mask.shape)
    high = np.clip(np.floor(middle + span).astype(int) + 1, 0, source.mask.shape)
    region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    index = np.argwhere(source.mask[region]) + low
    places = apply_affine(source.affine, index)
    near = np.linalg.norm(places - point_mm, axis=1) < radius
    index, places = index[near], places[near]
    if len(places) < 8:
        return start, float("inf")
    vectors = source.vectors[index[:, 0], index[:, 1], index[:, 2]]
    away = ((places - point_mm) ** 2).sum(1)
    affine, residual = start, float("inf")
    for sigma in sigmas_mm:
        matched, similarity = window_matches(vectors, apply_affine(affine, places), target, reach=reach)
        trusted = np.isfinite(similarity)
        if trusted.sum() < 8:
            return affine, residual
        floor = similarity[trusted].min()
        weight = np.where(trusted, np.exp(-away / (2 * sigma**2)) * (similarity - floor + 0.05), 0.0)
        ridge = 20.0**2 * weight.sum()
        affine = robust_affine(places, matched, weight + 1e-12, prior=affine, ridge=ridge, scale_mm=5.0, rounds=8)
        error = np.linalg.norm(apply_affine(affine, places) - matched, axis=1)
        residual = float(np.sqrt(np.average(error**2, weights=weight + 1e-12)))
    return affine, residual
