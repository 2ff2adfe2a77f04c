"""A scan's stored vectors back on their regular lattice, ready to be searched by place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import Metric
from isimed_index.errors import StoreDamaged
from isimed_index.grid import PatchGrid
from isimed_index.space import Affine, affine_in_orientation, apply_affine, inverse
from isimed_index.store.segment import Segment

FILE = "lattice.json"
_RESTORE = "restore the store from a backup, or add its files to a new one"
_LEAST_WEIGHT = 1e-6  # below it a point only seems to touch the lattice, by rounding
_LEAST_POINTS = 2000  # that thinning leaves, where there are so many: a head at 8 mm has more, a mouse has fewer
Points = NDArray[np.float64]  # (n, 3) mm
Vectors = NDArray[np.float32]  # (n, d)


@dataclass(frozen=True, slots=True)
class Standard:
    """How vectors of one encoder become unit vectors whose inner product ranks like the card's metric.

    `cosine` vectors are normalised. `l2` vectors are centred and scaled, get one more dimension of value 1, and are
    then normalised: the angle to the centre grows with the Euclidean distance, and so do, approximately, angles between
    vectors that lie nearer to the centre than most; far out the angles shrink.
    """

    metric: Metric
    centre: NDArray[np.float32]  # (d,)
    scale: float

    @classmethod
    def of(cls, metric: Metric, vectors: NDArray[np.floating[Any]]) -> Standard:
        """The standard of a sample (n, d) of an encoder's vectors."""
        if metric == "cosine" or not len(vectors):
            return cls(metric, np.zeros(vectors.shape[1], np.float32), 1.0)
        vectors = vectors.astype(np.float32)  # in float16 the squares of long vectors overflow
        centre = vectors.mean(axis=0)
        return cls(metric, centre, float(np.linalg.norm(vectors - centre, axis=1).mean()) or 1.0)

    def unit(self, vectors: NDArray[np.floating[Any]]) -> Vectors:
        """Vectors (…, d) → unit vectors (…, d) for cosine, (…, d + 1) for l2."""
        x = vectors.astype(np.float32)
        if self.metric == "l2":
            x = (x - self.centre) / np.float32(self.scale)
            x = np.concatenate([x, np.ones((*x.shape[:-1], 1), np.float32)], axis=-1)
        unit: Vectors = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))
        return unit

    def raw(self, unit: Vectors) -> Vectors:
        """Unit vectors (…, ·) back to vectors of the encoder (…, d); for cosine they stay as they are."""
        if self.metric == "cosine":
            return unit
        restored: Vectors = unit[..., :-1] / unit[..., -1:] * np.float32(self.scale) + self.centre
        return restored

    def distance(self, a: Vectors, b: Vectors) -> NDArray[np.float32]:
        """The card's distance between unit vectors (n, ·): 1 - cosine, or Euclidean in the encoder's own units."""
        if self.metric == "cosine":
            return np.asarray(1 - (a * b).sum(axis=-1), dtype=np.float32)
        return np.asarray(np.linalg.norm(self.raw(a) - self.raw(b), axis=-1), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Unit vectors (i, j, k, d) float32 on a regular lattice; `mask` (i, j, k) says where one is stored.

    `affine` maps a lattice index to millimetres: of the patient (RAS+), or of the canonical frame for a template.
    """

    vectors: NDArray[np.float32]
    mask: NDArray[np.bool_]
    affine: Affine

    @property
    def step_mm(self) -> float:
        """The smallest distance between neighbouring lattice points."""
        return float(np.linalg.norm(self.affine[:3, :3], axis=0).min())

    def stored(self) -> tuple[Points, Vectors]:
        """Places (n, 3) in mm and vectors (n, d) of the stored points."""
        return apply_affine(self.affine, np.argwhere(self.mask)), self.vectors[self.mask]

    def sample(self, points_mm: Points) -> tuple[Vectors, NDArray[np.float64]]:
        """Vectors (n, d) at any points (n, 3), trilinear between stored points, and the weight (n,) of those.

        The vectors are of unit length where the weight is above zero, and zero elsewhere.
        """
        at = apply_affine(inverse(self.affine), points_mm)
        low = np.floor(at).astype(np.int64)
        size = np.array(self.mask.shape)
        near = np.flatnonzero(((low >= -1) & (low < size)).all(axis=1))  # of a template's points many lie outside
        vectors = np.zeros((len(at), self.vectors.shape[-1]), np.float32)
        weight = np.zeros(len(at))
        vectors[near], weight[near] = self._between(low[near], (at - low)[near])
        return vectors, weight

    def _between(self, low: NDArray[np.int64], part: NDArray[np.float64]) -> tuple[Vectors, NDArray[np.float64]]:
        """`sample` at indices `low` + `part` (n, 3), whole numbers and fractions."""
        flat = self.vectors.reshape(-1, self.vectors.shape[-1])
        size = np.array(self.mask.shape)
        total = np.zeros((len(low), flat.shape[1]), np.float32)
        weight = np.zeros(len(low))
        for corner in np.ndindex(2, 2, 2):
            index = low + corner
            share = np.where(corner, part, 1 - part).prod(axis=1)
            i, j, k = np.clip(index, 0, size - 1).T
            share = share * (((index >= 0) & (index < size)).all(axis=1) & self.mask[i, j, k])
            rows = np.flatnonzero(share)
            place = np.ravel_multi_index((i[rows], j[rows], k[rows]), self.mask.shape)
            total[rows] += flat.take(place, axis=0) * share[rows, None].astype(np.float32)
            weight += share
        unseen = weight < _LEAST_WEIGHT
        total[unseen], weight[unseen] = 0, 0
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.float32(1e-12)), weight


@dataclass(frozen=True, slots=True, eq=False)
class Thinning:
    """Which points of a lattice are kept: those at index `first` + a multiple of `every` along each axis, both (3,)."""

    first: NDArray[np.int64]
    every: NDArray[np.int64]

    @classmethod
    def to(cls, spacing_mm: float, ijk: NDArray[np.integer], affine: Affine) -> Thinning:
        """The thinning that brings a lattice with points stored at `ijk` (n, 3) nearest to a spacing.

        It begins where most stored points are kept, and is less where fewer than `_LEAST_POINTS` would be left: of
        small bodies, and of thin slabs.
        """
        every = np.maximum(1, np.rint(spacing_mm / np.linalg.norm(affine[:3, :3], axis=0))).astype(np.int64)
        while (every > 1).any():
            which = np.ravel_multi_index(tuple((ijk % every).T), tuple(every))
            kept = np.bincount(which, minlength=int(every.prod()))
            if kept.max() >= _LEAST_POINTS:
                return cls(np.array(np.unravel_index(kept.argmax(), tuple(every)), dtype=np.int64), every)
            every = np.maximum(1, every - 1)
        return cls(np.zeros(3, np.int64), every)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is left out."""
        return bool((self.every == 1).all())

    def keeps(self, ijk: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which of the indices (n, 3) are kept (n,)."""
        kept: NDArray[np.bool_] = ((ijk - self.first) % self.every == 0).all(axis=1)
        return kept

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape of a lattice after it."""
        return _shape((-(-(np.array(shape) - self.first) // self.every)).tolist())

    def affine(self, affine: Affine) -> Affine:
        """Index after it → mm, from index before it → mm."""
        step = np.diag([*self.every.astype(np.float64), 1.0])
        step[:3, 3] = self.first
        return affine @ step


def thinned(lattice: Lattice, spacing_mm: float) -> Lattice:
    """The points of a lattice that lie about `spacing_mm` apart, see `Thinning.to`; itself where they do already."""
    thinning = Thinning.to(spacing_mm, np.argwhere(lattice.mask), lattice.affine)
    if thinning.keeps_all:
        return lattice
    part = tuple(slice(a, None, n) for a, n in zip(thinning.first.tolist(), thinning.every.tolist(), strict=True))
    mask, vectors = lattice.mask[part], lattice.vectors[part]
    return Lattice(np.ascontiguousarray(vectors), np.ascontiguousarray(mask), thinning.affine(lattice.affine))


def lattice_affine(grid: PatchGrid) -> Affine:
    """Lattice index → RAS+ mm of a patch's centre."""
    first = np.array(grid.first_start) + (grid.patch - 1) / 2
    step = np.diag([grid.stride, grid.stride, grid.stride, 1.0])
    step[:3, 3] = first
    return grid.affine @ step


def build_lattice(unit: Vectors, ijk: NDArray[np.integer], shape: tuple[int, ...], affine: Affine) -> Lattice:
    """Put unit vectors (n, d) at lattice indices (n, 3) of a lattice of `shape`."""
    vectors = np.zeros((*shape, unit.shape[1]), np.float32)
    mask = np.zeros(shape, bool)
    i, j, k = ijk.T
    vectors[i, j, k] = unit
    mask[i, j, k] = True
    return Lattice(vectors, mask, affine)


@dataclass(frozen=True, slots=True, eq=False)
class ScanGeometry:
    """What a question has to know of a scan's volume: where its voxels lie, and those of the file it came from.

    `shape` and `affine` (voxel → RAS+ mm) are of the stored array, `source_affine` of the voxels in the file's own axis
    order and, where the scan was resampled when it was added, on the file's own grid.
    """

    shape: tuple[int, int, int]
    affine: Affine
    source_affine: Affine

    @classmethod
    def of(cls, shape: tuple[int, int, int], affine: Affine, attributes: Mapping[str, Any]) -> ScanGeometry:
        """The geometry of a scan with these attributes (`source_orientation`, and `source_affine` if resampled)."""
        if "source_affine" in attributes:
            source = np.array(json.loads(attributes["source_affine"]), dtype=np.float64).reshape(4, 4)
        else:
            codes = attributes.get("source_orientation")
            source = affine_in_orientation(affine, shape, str(codes)) if codes else affine
        return cls(shape, affine, source)

    def holds(self, xyz_mm: Points) -> bool:
        """Whether a place (3,) in RAS+ mm lies inside the volume, up to the outer faces of its voxels."""
        voxel = apply_affine(inverse(self.affine), xyz_mm)
        face = 0.5 + 1e-6  # a place on the border that was rounded is inside
        return bool((voxel >= -face).all() and (voxel <= np.array(self.shape) - 1 + face).all())

    def corners_mm(self) -> Points:
        """The volume's corners (8, 3), where the outer faces of its voxels meet, in RAS+ mm."""
        ends = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in self.shape], indexing="ij"), -1).reshape(-1, 3)
        return apply_affine(self.affine, ends)


def write_geometry(directory: Path, grid: PatchGrid, scan: ScanGeometry) -> None:
    """Write `lattice.json` of a segment: the lattice (index → RAS+ mm, patch and stride in voxels) and its scan."""
    content = {
        "scan": {
            "shape": list(scan.shape),
            "affine": scan.affine.tolist(),
            "source_affine": scan.source_affine.tolist(),
        },
        "shape": list(grid.lattice_shape),
        "affine": lattice_affine(grid).tolist(),
        "patch_vox": grid.patch,
        "stride_vox": grid.stride,
    }
    (directory / FILE).write_text(json.dumps(content), encoding="utf-8")


def read_geometry(segment: Segment) -> ScanGeometry:
    """The geometry of the scan that a segment was encoded from; the scan itself is not opened."""
    scan = segment.lattice().get("scan", {})
    with _malformed():
        return ScanGeometry(_shape(scan["shape"]), _matrix(scan["affine"]), _matrix(scan["source_affine"]))


def read_lattice(segment: Segment, output: str, standard: Standard, spacing_mm: float | None = None) -> Lattice:
    """The lattice of one stored segment, vectors of `output`; `StoreDamaged` when its geometry does not fit.

    With `spacing_mm` it is `thinned`, and what is left out is not read.
    """
    patches = segment.patches(("i", "j", "k"))
    content = segment.lattice()
    with _malformed():
        shape, affine = _shape(content["shape"]), _matrix(content["affine"])
    ijk = np.stack([patches.column(axis).to_numpy() for axis in "ijk"], axis=1)
    if ((ijk < 0) | (ijk >= shape)).any():
        raise StoreDamaged(f"{FILE} of a segment says shape {shape}, a patch lies outside", next_step=_RESTORE)
    stored = segment.vectors(output)
    thinning = Thinning.to(spacing_mm or 0, ijk, affine)
    if not thinning.keeps_all:
        rows = thinning.keeps(ijk)
        ijk, stored = (ijk[rows] - thinning.first) // thinning.every, stored[rows]
        shape, affine = thinning.shape(shape), thinning.affine(affine)
    return build_lattice(standard.unit(stored), ijk, shape, affine)


@contextmanager
def _malformed() -> Iterator[None]:
    try:
        yield
    except StoreDamaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"{FILE} of a segment cannot be read", next_step=_RESTORE) from error


def _shape(values: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (int(n) for n in values)
    return x, y, z


def _matrix(values: Sequence[Sequence[float]]) -> Affine:
    return np.array(values, dtype=np.float64).reshape(4, 4)
