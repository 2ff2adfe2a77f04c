"""Working images: what is registered is small, isotropic and upright, whatever the scan is.

stored voxels ─▶ orthogonal axes (a sheared grid is resampled) ─▶ working spacing, −1…1 ─▶ a pyramid of three levels
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isimed_index.scans.chunks import StoredScan
from isimed_index.scans.prepare import FOREGROUND_STEP, Intensity, Volume, prepare, resample
from isimed_index.space import Affine, apply_affine, inverse, spacing_mm

LEVELS = (4, 2, 1)  # of the pyramid, coarse to fine, in working spacings
FINEST_MM, COARSEST_MM = 1.0, 4.0
_VOXELS = 200_000  # that a working image should have: 4 mm for a head; measured in docs/decisions/0014
_HALF_MM = 0.5  # working spacings are whole multiples of it
_SHEAR = 1e-4  # axes farther from the right angle than this are not orthogonal: 0.03 mm over 300 mm
_BACKGROUND = Intensity().low


@dataclass(frozen=True, slots=True, eq=False)
class Working:
    """A working image and its coarser copies; `masks` (x, y, z) say which voxels count."""

    levels: tuple[Volume, ...]  # in the order of LEVELS
    masks: tuple[NDArray[np.bool_], ...]

    @property
    def finest(self) -> Volume:
        """The image at the working spacing."""
        return self.levels[-1]

    @property
    def centre_mm(self) -> NDArray[np.float64]:
        """Where the middle (3,) of all that is not air lies, RAS+ mm."""
        return centre_of(self.finest.foreground, self.finest.affine)


def centre_of(mask: NDArray[np.bool_], affine: Affine) -> NDArray[np.float64]:
    """The centre of mass (3,) of a mask (x, y, z) in RAS+ mm."""
    return apply_affine(affine, np.argwhere(mask).mean(axis=0))


def working_spacing(shape: tuple[int, int, int], affine: Affine) -> float:
    """The spacing in mm at which an extent is registered: some 200,000 voxels, from 1 to 4 mm, in halves."""
    edge = (float(np.prod(shape)) * abs(np.linalg.det(affine[:3, :3])) / _VOXELS) ** (1 / 3)
    return float(np.clip(round(edge / _HALF_MM) * _HALF_MM, FINEST_MM, COARSEST_MM))


def working_image(stored: StoredScan, spacing: float) -> Working:
    """A stored scan as it is registered; its voxels are read whole, one scan at a time."""
    return working_of(stored.values(), stored.affine, spacing)


def working_of(values: NDArray[np.float32], affine: Affine, spacing: float) -> Working:
    """Physical values (x, y, z) as a working image."""
    values, affine = _orthogonal(values, affine)
    volume = prepare(values, affine, spacing, Intensity())
    return pyramid(volume, np.ones(volume.values.shape, bool))


def pyramid(volume: Volume, mask: NDArray[np.bool_]) -> Working:
    """A working image of a volume at working spacing, of which the voxels in `mask` count."""
    spacing = float(spacing_mm(volume.affine).mean())
    levels, masks = [], []
    for level in LEVELS:
        values, affine = resample(volume.values, volume.affine, spacing * level)
        inside, _ = resample(mask.astype(np.float32), volume.affine, spacing * level)
        levels.append(Volume(values, affine, _BACKGROUND, values > _BACKGROUND + FOREGROUND_STEP))
        masks.append(inside > 0.5 * inside.max())
    return Working(tuple(levels), tuple(masks))


def sampled(volume: Volume, back: Affine, places: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Values (n,) of a volume at places (n, 3) that `back` maps to its mm, and whether each lies inside it (n,)."""
    from scipy.ndimage import map_coordinates

    at = apply_affine(inverse(volume.affine) @ back, places)
    inside: NDArray[np.bool_] = np.asarray(((at >= -0.5) & (at <= np.array(volume.values.shape) - 0.5)).all(axis=1))
    values: NDArray[np.float32] = map_coordinates(volume.values, at.T, order=1, mode="nearest")
    return np.where(inside, values, np.float32(_BACKGROUND)), inside


def _orthogonal(values: NDArray[np.float32], affine: Affine) -> tuple[NDArray[np.float32], Affine]:
    """The same volume on a grid whose axes are at right angles, which is all that ITK's images can say."""
    edges = spacing_mm(affine)
    unit = affine[:3, :3] / edges
    left, _, right = np.linalg.svd(unit)
    turn = left @ right  # the nearest orthonormal axes
    moved = affine.copy()
    if np.abs(turn - unit).max() <= _SHEAR:
        moved[:3, :3] = turn * edges
        return values, moved
    corners = np.argwhere(np.ones((2, 2, 2))) * (np.array(values.shape) - 1)
    along = apply_affine(affine, corners) @ turn  # mm along the new axes
    low, high = along.min(axis=0), along.max(axis=0)
    shape = np.ceil((high - low) / edges).astype(int) + 1
    moved[:3, :3] = turn * edges
    moved[:3, 3] = turn @ low
    from scipy.ndimage import affine_transform

    step = inverse(affine) @ moved
    upright: NDArray[np.float32] = affine_transform(
        values, step[:3, :3], step[:3, 3], tuple(shape), order=1, mode="constant", cval=float(values.min())
    )
    return upright, moved
