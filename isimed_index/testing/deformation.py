"""Smooth, invertible maps between a template and a 'subject' made from it, known exactly.

    subject mm ── pose (affine) ──▶ posed mm ── + displacement (cubic B-splines) ──▶ template mm

The map is defined from the subject to the template because images are resampled that way: the value of a
subject's voxel is the template's value at the mapped point, so image and truth cannot disagree. The way back is a
fixed-point iteration, which converges because the displacement's slope is kept below one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.space import Affine, apply_affine, inverse

LATTICE_MM = 45.0  # distance of B-spline control points: smooth at the scale of a lobe
MAX_SLOPE = 0.5  # Lipschitz bound of the displacement; below 1 the map is invertible
_TOLERANCE_MM = 1e-6
_MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Deformation:
    """A smooth map between one subject and the template.

    `pose` (4, 4) maps subject mm to posed mm; `coefficients_mm` (3, a, b, c) are cubic B-spline weights of the
    displacement on a lattice whose indices `lattice` (4, 4) maps to posed mm.
    """

    pose: Affine
    coefficients_mm: NDArray[np.float64]
    lattice: Affine

    def displacement_mm(self, posed_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """The displacement (n, 3) in mm at posed points (n, 3); zero far outside the lattice."""
        from scipy.ndimage import map_coordinates

        index = apply_affine(inverse(self.lattice), posed_mm).T  # (3, n)
        parts = [
            map_coordinates(weights, index, order=3, prefilter=False, mode="grid-constant", cval=0.0)
            for weights in self.coefficients_mm
        ]
        return np.stack(parts, axis=-1)

    def to_template(self, subject_mm: ArrayLike) -> NDArray[np.float64]:
        """Template mm (n, 3) of subject points (n, 3) in mm; both RAS+."""
        posed = np.atleast_2d(apply_affine(self.pose, subject_mm))
        moved: NDArray[np.float64] = posed + self.displacement_mm(posed)
        return moved

    def to_subject(self, template_mm: ArrayLike) -> NDArray[np.float64]:
        """Subject mm (n, 3) of template points (n, 3) in mm; the inverse of `to_template` to 1e-6 mm."""
        target = np.atleast_2d(np.asarray(template_mm, dtype=np.float64))
        posed = target
        for _ in range(_MAX_ROUNDS):
            following = target - self.displacement_mm(posed)
            step = np.abs(following - posed).max(initial=0.0)
            posed = following
            if step < _TOLERANCE_MM:
                return apply_affine(inverse(self.pose), posed)
        raise ArithmeticError(f"the inverse of a deformation did not converge: last step {step:.3g} mm")


def random_deformation(
    rng: np.random.Generator,
    low_mm: ArrayLike,
    high_mm: ArrayLike,
    *,
    amplitude_mm: float,
    degrees: float,
    scale: float,
) -> Deformation:
    """Draw a deformation of a template that fills the box `low_mm`…`high_mm` (RAS+).

    `amplitude_mm` is the largest displacement inside the box (less where its slope would pass `MAX_SLOPE`),
    `degrees` bounds the rotation about each axis and `scale` the relative stretch along each; the subject is also
    moved by up to 25 mm along each axis.
    """
    low, high = np.asarray(low_mm, dtype=np.float64), np.asarray(high_mm, dtype=np.float64)
    pose = _random_pose(rng, (low + high) / 2, degrees, scale)
    size = np.ceil((high - low) / LATTICE_MM).astype(int) + 3  # one control point beyond each face
    lattice = np.diag([LATTICE_MM, LATTICE_MM, LATTICE_MM, 1.0])
    lattice[:3, 3] = (low + high) / 2 - LATTICE_MM * (size - 1) / 2
    drawn = Deformation(pose, rng.uniform(-1.0, 1.0, (3, *size)), lattice)
    reach, slope = _reach_and_slope(drawn, low, high)
    factor = min(amplitude_mm / reach, MAX_SLOPE / slope)
    return Deformation(pose, drawn.coefficients_mm * factor, lattice)


def random_rotation(rng: np.random.Generator, degrees: float) -> NDArray[np.float64]:
    """A rotation matrix (3, 3) with up to ±`degrees` about each axis."""
    from scipy.spatial.transform import Rotation

    matrix: NDArray[np.float64] = Rotation.from_euler(
        "xyz", rng.uniform(-degrees, degrees, 3), degrees=True
    ).as_matrix()
    return matrix


def _random_pose(rng: np.random.Generator, centre: NDArray[np.float64], degrees: float, scale: float) -> Affine:
    """Subject mm → posed mm: rotate and stretch about the centre, then move."""
    linear = random_rotation(rng, degrees) @ np.diag(1 + rng.uniform(-scale, scale, 3))
    shift = rng.uniform(-25.0, 25.0, 3)
    pose = np.eye(4)
    pose[:3, :3] = linear
    pose[:3, 3] = centre - linear @ (centre + shift)  # the subject's centre + shift lands on the template's centre
    return pose


def _reach_and_slope(
    deformation: Deformation, low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[float, float]:
    """Largest displacement (mm) inside the box, and largest slope inside and one lattice step around it."""
    step = LATTICE_MM / 6
    axes = [np.arange(a - 2 * LATTICE_MM, b + 2 * LATTICE_MM, step) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # (x, y, z, 3)
    moved = deformation.displacement_mm(points.reshape(-1, 3)).reshape(points.shape)
    inside = ((points >= low) & (points <= high)).all(axis=-1)
    jacobian = np.stack(np.gradient(moved, step, axis=(0, 1, 2)), axis=-1)  # (x, y, z, 3, 3)
    slope = np.linalg.norm(jacobian, axis=(-2, -1)).max()  # Frobenius, an upper bound of the spectral norm
    return float(np.linalg.norm(moved[inside], axis=-1).max()), float(slope)
