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
        part = at - low
        size = np.array(self.mask.shape)
        total = np.zeros((len(at), self.vectors.shape[-1]), np.float32)
        weight = np.zeros(len(at))
        for corner in np.ndindex(2, 2, 2):
            index = low + corner
            share = np.where(corner, part, 1 - part).prod(axis=1)
            i, j, k = np.clip(index, 0, size - 1).T
            share = share * (((index >= 0) & (index < size)).all(axis=1) & self.mask[i, j, k])
            total += self.vectors[i, j, k] * share[:, None].astype(np.float32)
            weight += share
        unseen = weight < _LEAST_WEIGHT
        total[unseen], weight[unseen] = 0, 0
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.float32(1e-12)), weight


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
        return bool((voxel >= -0.5).all() and (voxel <= np.array(self.shape) - 0.5).all())

    def corners_mm(self) -> Points:
        """The centres (8, 3) of the voxels in the volume's corners, in RAS+ mm."""
        ends = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), -1).reshape(-1, 3)
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


def read_lattice(segment: Segment, output: str, standard: Standard) -> Lattice:
    """The lattice of one stored segment, vectors of `output`; `StoreDamaged` when its geometry does not fit."""
    patches = segment.patches(("i", "j", "k"))
    content = segment.lattice()
    with _malformed():
        shape, affine = _shape(content["shape"]), _matrix(content["affine"])
    ijk = np.stack([patches.column(axis).to_numpy() for axis in "ijk"], axis=1)
    if ((ijk < 0) | (ijk >= shape)).any():
        raise StoreDamaged(f"{FILE} of a segment says shape {shape}, a patch lies outside", next_step=_RESTORE)
    return build_lattice(standard.unit(segment.vectors(output)), ijk, shape, affine)


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
