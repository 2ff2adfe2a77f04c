"""Coarser copies of a volume for viewers: which levels there are, where they lie, and what is in them.

A level halves every axis whose voxels are less than twice as long as those of the finest axis, so that slices far
apart are not mixed before the others are as coarse; levels follow until the longest side is at most 64 voxels.

    0   1   2   3   4        voxels of a level, and of the next one: their centres are
      ·       ·       ·      half a fine step further on, and the last may stand for one voxel alone

An image's voxel is the mean of those that it stands for, a label that of most of them: none is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.space import Affine

LONGEST = 64  # voxels along the longest side of the coarsest level
_SLAB_BYTES = 2**23  # worked on at once, so that what is needed beside the two levels stays small
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Level:
    """One level: its shape, how many voxels of the level before one of it spans, and how many of level 0."""

    shape: Triple
    step: Triple
    factor: Triple

    def affine(self, finest: Affine) -> Affine:
        """Voxel index of this level → RAS+ mm, from the affine of level 0."""
        factor = np.array(self.factor, dtype=np.float64)
        coarse = finest.copy()
        coarse[:3, :3] = finest[:3, :3] * factor
        coarse[:3, 3] = finest[:3, 3] + finest[:3, :3] @ ((factor - 1) / 2)
        return coarse


def levels(shape: Triple, spacing_mm: ArrayLike) -> list[Level]:
    """All levels of a volume with this shape and spacing (3,) in mm, level 0 first."""
    size = np.array(shape)
    edge = np.array(spacing_mm, dtype=np.float64)
    factor = np.ones(3, dtype=int)
    found = [Level(shape, (1, 1, 1), (1, 1, 1))]
    while size.max() > LONGEST:
        halved = (size > 1) & (edge < 2 * edge[size > 1].min())
        step = np.where(halved, 2, 1)
        size, edge, factor = -(-size // step), edge * step, factor * step
        found.append(Level(_triple(size), _triple(step), _triple(factor)))
    return found


def _triple(values: NDArray[Any]) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z


def coarser_image(voxels: NDArray[Any], step: Triple) -> NDArray[Any]:
    """The mean of every cell of `step` voxels, in the type of `voxels`; integers are exact, halves go to the even one.

    At the far ends, where a cell is not full, it is the mean of the voxels that there are.
    """
    rule = _real_means if voxels.dtype.kind not in "iu" else _small_means if voxels.itemsize <= 2 else _whole_means
    return _coarser(voxels, step, rule)


def coarser_labels(labels: NDArray[Any], step: Triple) -> NDArray[Any]:
    """The label that most voxels of every cell have; of several, one that is not 0, and then the smallest number."""
    return _coarser(labels, step, _commonest)


def _coarser(voxels: NDArray[Any], step: Triple, rule: Callable[[NDArray[Any], Triple], NDArray[Any]]) -> NDArray[Any]:
    """Apply a rule, which gets voxels of whole cells, slab by slab."""
    shape = _triple(-(-np.array(voxels.shape) // step))
    coarse = np.empty(shape, voxels.dtype)
    rows = max(1, _SLAB_BYTES * shape[0] // max(1, voxels.nbytes))
    for start in range(0, shape[0], rows):
        slab = voxels[start * step[0] : (start + rows) * step[0]]
        short = [(0, -size % by) for size, by in zip(slab.shape, step, strict=True)]
        if any(map(any, short)):  # the only voxel there is is doubled: neither mean nor majority changes
            slab = np.pad(slab, short, mode="edge")
        coarse[start : start + rows] = rule(slab, step)
    return coarse


def _parts(voxels: NDArray[Any], step: Triple) -> list[NDArray[Any]]:
    """One array for each place in a cell: a regular selection of voxels."""
    offsets = product(*[range(by) for by in step])
    return [voxels[tuple(slice(at, None, by) for at, by in zip(each, step, strict=True))] for each in offsets]


def _small_means(voxels: NDArray[Any], step: Triple) -> NDArray[Any]:
    """Means of 2, 4 or 8 integers of at most 16 bits, out of their sums, which are taken axis by axis."""
    sums = voxels
    for axis in (axis for axis, by in enumerate(step) if by == 2):
        before = (slice(None),) * axis
        sums = np.add(sums[(*before, slice(0, None, 2))], sums[(*before, slice(1, None, 2))], dtype=np.int32)
    count = math.prod(step)
    bits = count.bit_length() - 1
    odd = (sums >> bits) & 1  # a half goes up from an odd quotient only
    sums += odd
    sums += count // 2 - 1
    sums >>= bits
    return np.asarray(sums)


def _whole_means(voxels: NDArray[Any], step: Triple) -> NDArray[Any]:
    """Means of 2, 4 or 8 integers without leaving their type: of quotients and of remainders, which never overflow."""
    parts = _parts(voxels, step)
    count = len(parts)
    bits = count.bit_length() - 1
    left = reduce(add, (part & (count - 1) for part in parts))
    mean = reduce(add, (part >> bits for part in parts)) + (left >> bits)
    left &= count - 1
    mean += (left > count // 2) | ((left == count // 2) & (mean & 1 == 1))
    return np.asarray(mean)


def _real_means(voxels: NDArray[Any], step: Triple) -> NDArray[Any]:
    parts = _parts(voxels, step)
    return np.asarray(reduce(add, (part.astype(np.float64) / len(parts) for part in parts)))


def _commonest(labels: NDArray[Any], step: Triple) -> NDArray[Any]:
    parts = _parts(labels, step)
    best = parts[0].copy()
    most = np.zeros(best.shape, np.uint8)
    for label in parts:
        votes = reduce(add, ((label == other).astype(np.uint8) for other in parts)) * np.uint8(2)
        votes += label != 0
        better = (votes > most) | ((votes == most) & (label < best))
        np.copyto(best, label, where=better)
        np.copyto(most, votes, where=better)
    return best
