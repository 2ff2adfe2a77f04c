"""The lattice of patches laid over a volume: patch number ↔ lattice index ↔ box ↔ centre in millimetres.

    one axis of shape 10, patch 4, stride 3: n = ceil(10 / 3) = 4 patches, centred on the extent, the first at -2
    voxel     -2 -1  0  1  2  3  4  5  6  7  8  9 10
    patch 0    [--------]
    patch 1             [--------]
    patch 2                      [--------]
    patch 3                               [--------]

Boxes may stick out of the volume; what lies outside is padded with the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import UsageError
from isimed_index.space import Affine, apply_affine, inverse

_Slices = tuple[slice, slice, slice]
_ORTHOGONAL = 1e-6  # cosine between two axes below which rounding along each axis finds the nearest centre


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open box of voxels, `start` inside and `stop` outside; it may stick out of the array."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        x, y, z = (stop - start for start, stop in zip(self.start, self.stop, strict=True))
        return x, y, z

    def slices(self, shape: tuple[int, ...]) -> tuple[_Slices, _Slices]:
        """Where the box meets an array of `shape`: the slices in that array, and the same voxels' slices in the box."""
        pairs = [_overlap(start, stop, n) for start, stop, n in zip(self.start, self.stop, shape, strict=True)]
        (ax, bx), (ay, by), (az, bz) = pairs
        return (ax, ay, az), (bx, by, bz)


@dataclass(frozen=True, slots=True, eq=False)
class PatchGrid:
    """A centred lattice of cubic patches that covers the whole extent of a volume.

    `shape` is that of the working volume, `patch` the edge of a patch and `stride` the step of the lattice, all in its
    voxels; `affine` maps its voxel index to RAS+ mm. Patches are numbered in C order over the lattice: the last axis
    runs fastest.
    """

    shape: tuple[int, int, int]
    patch: int
    stride: int
    affine: Affine

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.patch < 1 or self.stride < 1:
            raise UsageError(
                f"expected positive shape, patch and stride, found {self.shape}, {self.patch} and {self.stride}"
            )

    def __len__(self) -> int:
        return int(np.prod(self.lattice_shape))

    @property
    def lattice_shape(self) -> tuple[int, int, int]:
        """Patches along x, y and z."""
        x, y, z = (max(1, -(-n // self.stride)) for n in self.shape)
        return x, y, z

    @property
    def first_start(self) -> tuple[int, int, int]:
        """Voxel index at which patch 0 starts; negative where it sticks out."""
        x, y, z = (
            (n - (count - 1) * self.stride - self.patch) // 2
            for n, count in zip(self.shape, self.lattice_shape, strict=True)
        )
        return x, y, z

    def ijk(self, numbers: ArrayLike) -> NDArray[np.int64]:
        """Lattice indices (n, 3) of patch numbers (n,); `UsageError` for a number that the grid does not have."""
        asked = np.asarray(numbers, dtype=np.int64)
        if asked.size and not (asked.min() >= 0 and asked.max() < len(self)):
            raise UsageError(f"expected patch numbers from 0 to {len(self) - 1}")
        return np.stack(np.unravel_index(asked, self.lattice_shape), axis=-1)

    def number(self, ijk: ArrayLike) -> NDArray[np.int64]:
        """Patch numbers (n,) of lattice indices (n, 3); `UsageError` for an index outside the lattice."""
        asked = np.asarray(ijk, dtype=np.int64)
        if asked.size and ((asked < 0).any() or (asked >= self.lattice_shape).any()):
            raise UsageError(f"expected lattice indices inside {self.lattice_shape}")
        return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(asked, -1, 0)), self.lattice_shape), dtype=np.int64)

    def starts_vox(self, numbers: ArrayLike | None = None) -> NDArray[np.int64]:
        """First voxels (n, 3) of the patches, all of them when `numbers` is None."""
        asked = np.arange(len(self)) if numbers is None else numbers
        starts: NDArray[np.int64] = self.ijk(asked) * self.stride + np.asarray(self.first_start)
        return starts

    def centres_vox(self, numbers: ArrayLike | None = None) -> NDArray[np.float64]:
        """Centres (n, 3) in voxel indices: halves where the patch edge is even."""
        return np.asarray(self.starts_vox(numbers) + (self.patch - 1) / 2, dtype=np.float64)

    def centres_mm(self, numbers: ArrayLike | None = None) -> NDArray[np.float64]:
        """Centres (n, 3) in RAS+ mm."""
        return apply_affine(self.affine, self.centres_vox(numbers))

    def box(self, number: int) -> Box:
        """The voxels of one patch."""
        x, y, z = self.starts_vox([number])[0].tolist()
        return Box((x, y, z), (x + self.patch, y + self.patch, z + self.patch))

    def nearest(self, xyz_mm: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Numbers (n,) of the patches whose centres lie nearest to points (n, 3) in RAS+ mm, and the distances in mm.

        Exact under every affine: rounding along each axis where the axes are orthogonal, a k-d tree where they are not.
        """
        points = np.asarray(xyz_mm, dtype=np.float64).reshape(-1, 3)
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        if (np.abs(unit.T @ unit - np.eye(3)) > _ORTHOGONAL).any():
            from scipy.spatial import KDTree

            distances, numbers = KDTree(self.centres_mm()).query(points)
            return np.asarray(numbers, dtype=np.int64), np.asarray(distances, dtype=np.float64)
        first_centre = np.asarray(self.first_start) + (self.patch - 1) / 2
        lattice = np.rint((apply_affine(inverse(self.affine), points) - first_centre) / self.stride)
        numbers = self.number(np.clip(lattice, 0, np.asarray(self.lattice_shape) - 1))
        distances_mm: NDArray[np.float64] = np.sqrt(((self.centres_mm(numbers) - points) ** 2).sum(axis=1))
        return numbers, distances_mm

    def extract(self, volume: NDArray[Any], numbers: ArrayLike, fill: float) -> NDArray[np.float32]:
        """Patches (n, patch, patch, patch) of `volume` (x, y, z), `fill` outside of it."""
        self._check_shape(volume)
        return extract_patches(volume, self.starts_vox(numbers), self.patch, fill)

    def foreground_fraction(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Share (len,) of each patch's voxels that are set in `mask` (x, y, z); voxels outside count as not set."""
        self._check_shape(mask)
        return (self._counts(mask, (0, 0, 0)).ravel() / self.patch**3).astype(np.float32)

    def label_fractions(
        self, labels: NDArray[np.integer[Any]], numbers: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Which labels but 0 of a map (x, y, z) the patches `numbers` (n,) show, and what share of their voxels.

        Returns places in `numbers` (m,), rising, labels (m,), rising within a patch, and shares (m,) above 0.
        """
        self._check_shape(labels)
        chosen = np.asarray(numbers, dtype=np.int64).ravel()
        where = np.nonzero(labels)
        values, which = np.unique(labels[where], return_inverse=True)
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        low, high = np.full((3, len(values)), max(self.shape)), np.zeros((3, len(values)), dtype=np.int64)
        for axis in range(3):
            np.minimum.at(low[axis], which, where[axis])
            np.maximum.at(high[axis], which, where[axis])
        for value, first, last in zip(values.tolist(), low.T.tolist(), high.T.tolist(), strict=True):
            box = tuple(slice(start, stop + 1) for start, stop in zip(first, last, strict=True))
            counts = self._counts(labels[box] == value, first).ravel()[chosen]
            places = np.flatnonzero(counts)
            found.append((places, np.full(len(places), value), (counts[places] / self.patch**3).astype(np.float32)))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        rows, label, share = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((label, rows))
        return rows[order], label[order], share[order]

    def _counts(self, mask: NDArray[np.bool_], at: Sequence[int]) -> NDArray[np.int32]:
        """Set voxels (lattice shape) of each patch; `mask` is a part of the volume that begins at the voxel `at`."""
        counts: NDArray[Any] = mask
        for axis, (count, first) in enumerate(zip(self.lattice_shape, self.first_start, strict=True)):
            starts = first + self.stride * np.arange(count) - at[axis]
            padding = [(1, 0) if a == axis else (0, 0) for a in range(3)]
            summed = np.pad(np.cumsum(counts, axis=axis, dtype=np.int32), padding)
            n = mask.shape[axis]
            upper = summed.take(np.clip(starts + self.patch, 0, n), axis=axis)
            counts = upper - summed.take(np.clip(starts, 0, n), axis=axis)
        return counts

    def _check_shape(self, volume: NDArray[Any]) -> None:
        if volume.shape != self.shape:
            raise UsageError(f"expected a volume of shape {self.shape}, found {volume.shape}")


def extract_patches(volume: NDArray[Any], starts_vox: ArrayLike, patch: int, fill: float) -> NDArray[np.float32]:
    """Cubic patches (n, patch, patch, patch) from any start voxels (n, 3), `fill` outside of `volume` (x, y, z).

    They are windows of the volume; where one sticks out, of a padded copy of the box that holds all of them.
    """
    starts = np.asarray(starts_vox, dtype=np.int64).reshape(-1, 3)
    if not len(starts):
        return np.empty((0, patch, patch, patch), np.float32)
    starts = np.clip(starts, -patch, volume.shape)  # farther out there is no more to see
    low, high = starts.min(axis=0), starts.max(axis=0) + patch
    if (low < 0).any() or (high > volume.shape).any():
        x, y, z = low.tolist()
        i, j, k = high.tolist()
        box = Box((x, y, z), (i, j, k))
        source, target = box.slices(volume.shape)
        padded = np.full(box.shape, fill, np.float32)
        padded[target] = volume[source]
        volume, starts = padded, starts - low
    windows = sliding_window_view(volume, (patch, patch, patch))  # (x, y, z, patch, patch, patch), no copy
    return np.asarray(windows[tuple(starts.T)], np.float32)


def _overlap(start: int, stop: int, n: int) -> tuple[slice, slice]:
    """The part of [start, stop) inside [0, n): as a slice of the array, and as a slice from `start` on."""
    low = min(max(start, 0), n)
    high = max(min(stop, n), low)
    return slice(low, high), slice(low - start, high - start) if high > low else slice(0, 0)
