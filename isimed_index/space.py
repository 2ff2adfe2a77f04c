"""Where things are: affines, RAS+ millimetres, voxels, orientation.

World coordinates are RAS+ mm everywhere inside this library: x grows to the patient's Right, y to Anterior,
z to Superior. LPS (DICOM, ITK), voxel indices and canonical coordinates appear at the edges only, and every change of
space goes through this module. Voxel index (0, 0, 0) is the *centre* of the first voxel.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import ScanRefused, UsageError

Space = Literal["ras", "lps", "voxel", "canonical"]
Affine = NDArray[np.float64]  # (4, 4), voxel index → RAS+ mm

_LPS = np.array([-1.0, -1.0, 1.0])
_WAYS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}  # RAS+ axis, sign
AXIS_CODES = tuple(
    "".join(codes) for codes in product(_WAYS, repeat=3) if len({_WAYS[code][0] for code in codes}) == 3
)  # all 48, such as `RAS` or `PSR`: the patient direction in which each voxel axis grows


def checked_affine(affine: ArrayLike) -> Affine:
    """Return `affine` as (4, 4) float64, or raise `ScanRefused` when it cannot map voxels to millimetres."""
    matrix: Affine = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise ScanRefused(f"expected a 4×4 affine, found shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ScanRefused("the affine holds NaN or infinite values", next_step="repair the header's sform or qform")
    if not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise ScanRefused(f"the affine's last row is {matrix[3].tolist()}, expected [0, 0, 0, 1]")
    spacing = spacing_mm(matrix)
    # The volume of a voxel against that of a box with the same edges: 1 when orthogonal, 0 when axes coincide.
    if (spacing < 1e-6).any() or abs(np.linalg.det(matrix[:3, :3])) < 1e-3 * spacing.prod():
        raise ScanRefused(
            "the affine is singular: two voxel axes point the same way or one has no length",
            next_step="repair the header's sform or qform",
        )
    return matrix


def apply_affine(affine: Affine, points: ArrayLike) -> NDArray[np.float64]:
    """Map points (…, 3) through a (4, 4) affine; voxel → mm for a scan's affine, mm → voxel for its inverse."""
    xyz = np.asarray(points, dtype=np.float64)
    mapped: NDArray[np.float64] = xyz @ affine[:3, :3].T + affine[:3, 3]
    return mapped


def inverse(affine: Affine) -> Affine:
    """The inverse affine: RAS+ mm → voxel index."""
    matrix: Affine = np.asarray(np.linalg.inv(affine), dtype=np.float64)
    matrix[3] = [0, 0, 0, 1]
    return matrix


def largest_apart_mm(one: Affine, other: Affine, shape: tuple[int, int, int]) -> float:
    """The largest distance between the places that two affines give to the same voxel; it is reached at a corner."""
    corners = np.array(list(product(*[(0, n - 1) for n in shape])))  # (8, 3)
    apart = apply_affine(one, corners) - apply_affine(other, corners)
    return float(np.linalg.norm(apart, axis=1).max())


def spacing_mm(affine: Affine) -> NDArray[np.float64]:
    """Edge lengths (3,) of one voxel in mm, along its own axes."""
    edges: NDArray[np.float64] = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return edges


def orientation(affine: Affine) -> str:
    """Axis codes such as `RAS` or `PSR`: the patient direction in which each voxel axis grows."""
    import nibabel as nib

    return "".join(nib.orientations.aff2axcodes(affine))


def affine_along(codes: str, spacing: ArrayLike, zero: ArrayLike) -> Affine:
    """The affine of voxels with edges `spacing` (3,) mm whose axes grow as one of `AXIS_CODES` says.

    The voxel index `zero` (3,) lies at RAS+ 0.
    """
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for axis, (code, edge) in enumerate(zip(codes, np.asarray(spacing, np.float64), strict=True)):
        row, sign = _WAYS[code]
        affine[row, axis] = sign * edge
    affine[:3, 3] = -(affine[:3, :3] @ np.asarray(zero, np.float64))
    return affine


def to_ras(voxels: NDArray[Any], affine: Affine) -> tuple[NDArray[Any], Affine]:
    """Permute and flip the first three axes so that they grow nearest to Right, Anterior, Superior; no resampling.

    Returns a view of `voxels` and the affine that maps its indices to the same millimetres as before.
    """
    import nibabel as nib

    turn = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(voxels, turn)
    return turned, affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape[:3])


def flip_lps(points: ArrayLike) -> NDArray[np.float64]:
    """RAS+ mm ↔ LPS+ mm (the map is its own inverse), shape (…, 3)."""
    flipped: NDArray[np.float64] = np.asarray(points, dtype=np.float64) * _LPS
    return flipped


def to_ras_mm(points: ArrayLike, space: Space, affine: Affine) -> NDArray[np.float64]:
    """Points (…, 3) given in `space` (ras, lps or voxel of `affine`) → RAS+ mm."""
    if space == "ras":
        return np.asarray(points, dtype=np.float64)
    if space == "lps":
        return flip_lps(points)
    if space == "voxel":
        return apply_affine(affine, points)
    raise UsageError(f"expected a point in ras, lps or voxel space, found {space!r}")


def from_ras_mm(points: ArrayLike, space: Space, affine: Affine) -> NDArray[np.float64]:
    """RAS+ mm points (…, 3) → `space` (ras, lps or voxel of `affine`)."""
    if space == "ras":
        return np.asarray(points, dtype=np.float64)
    if space == "lps":
        return flip_lps(points)
    if space == "voxel":
        return apply_affine(inverse(affine), points)
    raise UsageError(f"expected ras, lps or voxel as target space, found {space!r}")


def affine_in_orientation(affine: Affine, shape: tuple[int, int, int], codes: str) -> Affine:
    """The affine of the same volume (x, y, z) when its axes are permuted and flipped to `codes`, such as `PSR`.

    The inverse of `to_ras` for affines: voxel indices of the source file, not those of the stored array.
    """
    import nibabel as nib

    now = nib.orientations.io_orientation(affine)
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    turn = nib.orientations.ornt_transform(now, wanted)
    result: Affine = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    return result
