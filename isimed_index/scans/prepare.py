"""The one preprocessing that training, encoding and queries share: working spacing, intensity scaling, foreground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import UsageError
from isimed_index.grid import Box
from isimed_index.space import Affine
from isimed_index.space import spacing_mm as affine_spacing_mm

SPACING_TOLERANCE = 0.01
FOREGROUND_STEP = 0.2
_FWHM_PER_SIGMA = 2 * math.sqrt(2 * math.log(2))


@dataclass(frozen=True, slots=True)
class Intensity:
    """How values become network input; part of the encoder card.

    The two percentiles of a volume go to `low` and `high` on a straight line, which is cut off at ±`clip`, or goes on
    where that is 0. With a window, such as -1000 to 1000 HU for CT, its two ends take the percentiles' place, and
    values beyond are cut off.
    """

    low_percentile: float = 5.0
    high_percentile: float = 95.0
    low: float = -1.0
    high: float = 1.0
    clip: float = 1.5  # 0: nowhere
    window_low: float | None = None  # physical values, such as Hounsfield units
    window_high: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low_percentile < self.high_percentile <= 100:
            raise UsageError(
                f"expected percentiles 0 ≤ low < high ≤ 100, found {self.low_percentile} and {self.high_percentile}"
            )
        inside = -self.clip <= self.low and self.high <= self.clip < math.inf
        if not (self.low < self.high and (inside or self.clip == 0)):
            raise UsageError(f"expected -clip ≤ low < high ≤ clip, found {self.low}, {self.high} and ±{self.clip}")

        ends = (self.window_low, self.window_high)
        if ends != (None, None) and not (None not in ends and -math.inf < ends[0] < ends[1] < math.inf):  # type: ignore[operator]
            raise UsageError(f"expected a window from a lower to a higher value, found {ends[0]} to {ends[1]}")

    def fields(self) -> dict[str, float]:
        """The fields that are set, for a card."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def ends(self, values: NDArray[np.float32]) -> tuple[float, float]:
        """The values that go to `low` and `high`: the window's, or a whole volume's percentiles; if equal, extremes."""
        if self.window_low is not None and self.window_high is not None:
            return self.window_low, self.window_high
        low, high = np.percentile(values, [self.low_percentile, self.high_percentile])
        if low == high:
            low, high = values.min(), values.max()
        return float(low), float(high)

    def scale(self, values: NDArray[np.float32], ends: tuple[float, float] | None = None) -> NDArray[np.float32]:
        """Scaled values as a new array; `ends` are those of the whole volume where `values` is only a part of it."""
        low, high = self.ends(values) if ends is None else ends
        if self.window_low is not None:
            values = np.clip(values, np.float32(low), np.float32(high))
        gain = (self.high - self.low) / (high - low) if high > low else 0.0
        scaled = values - np.float32(low)
        scaled *= np.float32(gain)
        scaled += np.float32(self.low)
        if self.clip:
            np.clip(scaled, -self.clip, self.clip, out=scaled)
        return np.asarray(scaled)


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A working volume: scaled values (x, y, z), voxel → RAS+ mm, what stands for outside, and where the body is."""

    values: NDArray[np.float32]
    affine: Affine
    background: float
    foreground: NDArray[np.bool_]
    ends: tuple[float, float] | None = None  # the physical values that were scaled to the two ends of the range


def prepare(
    values: NDArray[np.float32],
    affine: Affine,
    spacing_mm: float | None,
    intensity: Intensity,
    ends: tuple[float, float] | None = None,
) -> Volume:
    """Physical values (x, y, z) → working volume at isotropic `spacing_mm` (None keeps the scan's own grid).

    `ends` are those that an earlier preparation of the same scan found: the volume is the same, and is made sooner.

    The background is where the low percentile (or the window's lower end) lies after scaling, not the least value: one
    dark outlier, or a CT's padding at -3024, would make all air a body. It holds while such voxels are fewer than that
    percentile; with a window it always does. Foreground is what lies more than 0.2 above it, so no mask is needed.
    """
    if spacing_mm is not None:
        values, affine = resample(values, affine, spacing_mm)
    ends = intensity.ends(values) if ends is None else ends
    scaled = intensity.scale(values, ends)
    background = intensity.low
    return Volume(scaled, affine, background, scaled > background + FOREGROUND_STEP, ends)


def resample(values: NDArray[np.float32], affine: Affine, spacing_mm: float) -> tuple[NDArray[np.float32], Affine]:
    """Values (x, y, z) on an isotropic grid along the scan's own axes, whose extent is centred on the original's.

    Linear interpolation, after a Gaussian along every axis that shrinks; its full width at half maximum takes the
    source's resolution to the target's (Cardoso et al., MICCAI 2015). Within 1 % of the target spacing on every axis
    the inputs are returned as they are.
    """
    if not (spacing_mm > 0 and math.isfinite(spacing_mm)):
        raise UsageError(f"expected a positive spacing in mm, found {spacing_mm}")
    target = _Target.of(values.shape, affine, spacing_mm)
    if target is None:
        return values, affine
    resampled = np.ascontiguousarray(values, dtype=np.float32)
    for axis in _shrinking_first(target.shape.tolist(), values.shape):
        weights = _weights(values.shape[axis], target.positions(axis), float(target.ratios[axis]))
        resampled = _apply_along(weights, resampled, axis)
    return resampled, target.affine(affine)


@dataclass(frozen=True, slots=True, eq=False)
class WorkingGrid:
    """Where the working volume of a scan lies, so that any box of it can be made from the few voxels that it needs.

    `resample` gives values of `shape`, and `affine`; `part` gives the same values of a box alone.
    """

    shape: tuple[int, int, int]
    affine: Affine
    source_shape: tuple[int, int, int]
    _target: _Target | None  # None: the scan's own grid

    @classmethod
    def of(cls, shape: tuple[int, int, int], affine: Affine, spacing_mm: float | None) -> WorkingGrid:
        """The grid that `resample` gives a scan of `shape` at `spacing_mm`; None keeps its own."""
        target = None if spacing_mm is None else _Target.of(shape, affine, spacing_mm)
        if target is None:
            return cls(shape, affine, shape, None)
        x, y, z = target.shape.tolist()
        return cls((x, y, z), target.affine(affine), shape, target)

    def source_box(self, box: Box) -> Box:
        """The voxels of the scan that a box inside the working volume is made of, the smoothing's reach included."""
        if self._target is None:
            return box
        lines = [
            self._line(axis, start, stop) for axis, (start, stop) in enumerate(zip(box.start, box.stop, strict=True))
        ]
        (ax, bx), (ay, by), (az, bz) = ((start, stop) for start, stop, _ in lines)
        return Box((ax, ay, az), (bx, by, bz))

    def part(self, values: NDArray[np.float32], box: Box) -> NDArray[np.float32]:
        """The working volume's values in `box`, from the scan's values in `source_box(box)`."""
        if self._target is None:
            return values
        for axis in _shrinking_first(self.shape, self.source_shape):
            start, stop, positions = self._line(axis, box.start[axis], box.stop[axis])
            weights = _weights(stop - start, positions - start, float(self._target.ratios[axis]))
            values = _apply_along(weights, np.ascontiguousarray(values), axis)
        return values

    def _line(self, axis: int, first: int, last: int) -> tuple[int, int, NDArray[np.float64]]:
        """Which source voxels [start, stop) the working voxels [first, last) of an axis see, and where those lie."""
        assert self._target is not None
        length = self.source_shape[axis]
        at = np.clip(self._target.positions(axis)[first:last], 0, length - 1)
        reach = _reach(float(self._target.ratios[axis]))
        start = max(min(int(at[0]), length - 2) - reach, 0)
        return start, min(int(at[-1]) + 2 + reach, length), at


def resample_labels(labels: NDArray[Any], affine: Affine, spacing_mm: float | None) -> NDArray[Any]:
    """Labels (x, y, z) on the grid that `resample` gives values (None: their own): each voxel's nearest label."""
    target = None if spacing_mm is None else _Target.of(labels.shape, affine, spacing_mm)
    if target is None:
        return labels
    nearest = [
        np.clip(np.rint(target.positions(axis)), 0, labels.shape[axis] - 1).astype(np.int64) for axis in range(3)
    ]
    return np.asarray(labels[np.ix_(*nearest)])


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """The grid that a volume is resampled to: its shape (3,), and where it lies in voxels of the source."""

    shape: NDArray[np.int64]
    ratios: NDArray[np.float64]  # (3,) source voxels per target voxel
    first: NDArray[np.float64]  # (3,) the target's first voxel

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: Affine, spacing_mm: float) -> _Target | None:
        """The target of a source of `shape`; None where its spacing is the wanted one already."""
        source_mm = affine_spacing_mm(affine)
        if (np.abs(source_mm / spacing_mm - 1) <= SPACING_TOLERANCE).all():
            return None
        ratios = spacing_mm / source_mm
        old = np.array(shape)
        new = np.maximum(1, np.rint(old / ratios)).astype(np.int64)
        return cls(new, ratios, (old - 1) / 2 - ratios * (new - 1) / 2)

    def positions(self, axis: int) -> NDArray[np.float64]:
        """Where the target's voxels lie along an axis, in source voxels."""
        return np.asarray(self.first[axis] + self.ratios[axis] * np.arange(self.shape[axis]))

    def affine(self, source: Affine) -> Affine:
        """Voxel → RAS+ mm of the target, for a source with that affine."""
        moved = source.copy()
        moved[:3, :3] = source[:3, :3] * self.ratios
        moved[:3, 3] = source[:3, :3] @ self.first + source[:3, 3]
        return moved


def thick_slices(side: int, thickness: float, first: float) -> NDArray[np.float32]:
    """The matrix (side, side) that gives a line the resolution of slices of `thickness` voxels, where it is.

    Slices lie at `first`, `first + thickness`, …; the line is resampled to them and back as scans are.
    """
    slices = np.arange(first, side, thickness, dtype=np.float64)
    places = np.arange(side, dtype=np.float64)
    return _weights(len(slices), (places - first) / thickness, 1 / thickness) @ _weights(side, slices, thickness)


def _shrinking_first(shape: Sequence[int], source_shape: Sequence[int]) -> list[int]:
    """The axes in the order in which they are resampled: shrinking first leaves less to do."""
    order: list[int] = np.argsort(np.array(shape) / np.array(source_shape)).tolist()
    return order


def _sigma(ratio: float) -> float:
    """The sd of the smoothing along a line that shrinks by `ratio`, in source voxels; 0 where it does not."""
    return math.sqrt(ratio**2 - 1) / _FWHM_PER_SIGMA if ratio > 1 + SPACING_TOLERANCE else 0.0


def _reach(ratio: float) -> int:
    """How many source voxels to either side the smoothing sees."""
    return math.ceil(4 * _sigma(ratio))


def _weights(length: int, positions: NDArray[np.float64], ratio: float) -> NDArray[np.float32]:
    """The matrix (m, length) that smooths a line where it shrinks and interpolates it at m positions.

    Beyond its ends the line goes on with its first and last value.
    """
    at = np.clip(positions, 0, length - 1)
    left = np.minimum(at.astype(int), max(length - 2, 0))
    right = np.minimum(left + 1, length - 1)
    interpolation = np.zeros((len(at), length))
    rows = np.arange(len(at))
    np.add.at(interpolation, (rows, left), 1 - (at - left))
    np.add.at(interpolation, (rows, right), at - left)
    sigma = _sigma(ratio)
    if sigma == 0:
        return interpolation.astype(np.float32)
    offsets = np.arange(-_reach(ratio), _reach(ratio) + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    smoothing = np.zeros((length, length))
    taps = np.clip(np.arange(length)[:, None] + offsets, 0, length - 1)
    np.add.at(smoothing, (np.arange(length)[:, None], taps), kernel)
    return np.asarray(interpolation @ smoothing, dtype=np.float32)


def _apply_along(weights: NDArray[np.float32], values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Multiply every line of `values` along `axis` by `weights` (m, n); the axis gets length m."""
    nx, ny, nz = values.shape
    if axis == 0:
        return (weights @ values.reshape(nx, ny * nz)).reshape(-1, ny, nz)
    if axis == 1:
        return np.asarray(np.matmul(weights, values), dtype=np.float32)
    return values @ weights.T
