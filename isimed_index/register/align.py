"""One scan against one reference, by SimpleITK; the only module that imports it.

    common mm (RAS) ──flip x, y──▶ common mm (LPS) ──ITK's transform──▶ patient mm (LPS) ──flip x, y──▶ patient mm (RAS)

ITK's transform goes *from the fixed image to the moving one*, in LPS: it says where in the patient to look for what a
point of the reference shows. What leaves this module is its inverse in RAS, patient → common. Nothing else in this
library speaks LPS about transforms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import MissingExtra, ScanRefused
from isimed_index.register.images import Working, centre_of, sampled
from isimed_index.scans.prepare import Volume
from isimed_index.space import Affine, apply_affine, inverse, spacing_mm

Kind = Literal["rigid", "affine"]

ALGORITHM = "mattes-mutual-information-1"  # counted up when another outcome is to be expected
LEAST_OVERLAP = 0.25  # of what is compared of the reference has to lie inside the scan
LEAST_LIKENESS = 0.15  # nats of mutual information; measured in docs/decisions/0014
STRETCH = 1.6  # most that any direction may be stretched or shrunk: people differ by less
TURN_DEG = 75.0  # most that a scan may be turned: a head on its side is a wrong header, or a wrong answer
_BINS = 32
_TURNS_DEG = 25.0  # of the starts, about each axis
_FINALISTS = 2  # starts that go on from the coarsest level
_STEPS = 150  # of the optimiser, at most, on a level
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS ↔ LPS


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Where a scan lies in a reference's frame: patient RAS+ mm → common RAS+ mm, and how well that is supported.

    The metric is Mattes mutual information in nats over the reference's mask, higher is better: before, with centres of
    mass on each other (None where the two then do not meet), and after. `overlap` is the share of the mask that the
    scan covers.
    """

    affine: Affine
    metric_before: float | None
    metric_after: float
    overlap: float


def load_itk() -> ModuleType:
    """SimpleITK, or `MissingExtra` that says how to install it."""
    try:
        import SimpleITK
    except ImportError as missing:
        raise MissingExtra(
            "registration needs SimpleITK, which is not installed", next_step="pip install 'isimed-index[register]'"
        ) from missing
    module: ModuleType = SimpleITK
    module.ProcessObject.SetGlobalWarningDisplay(False)  # it writes to stderr what it raises as well
    return module


def align(fixed: Working, moving: Working, kind: Kind = "rigid", start: Affine | None = None) -> Alignment:
    """Register `moving` to what the masks of `fixed` keep; `ScanRefused` when the outcome cannot be believed.

    `start` is one more placement to begin from (patient → common), beside the usual ones. The same input gives the same
    bits on the same machine: nothing is drawn, and sums are made by one thread.
    """
    if not moving.finest.foreground.any():
        raise ScanRefused("there is nothing to register: every voxel looks like air", next_step="look at the scan")
    levels = [_Level.of(load_itk(), *three) for three in zip(fixed.levels, fixed.masks, moving.levels, strict=True)]
    centred = next(_placements(fixed, moving))
    before = levels[-1].metric(centred)
    starts = [*_placements(fixed, moving), *([] if start is None else [_nearest_rigid(start)])]
    found = _best([levels[0].refine(one, "rigid") for one in starts])[:_FINALISTS]
    found = _best([levels[1].refine(one.affine, "rigid") for one in found])[:1]
    found = _best([levels[2].refine(one.affine, "rigid") for one in found])
    if not found:
        raise ScanRefused(
            "it does not overlap with the reference, wherever it is begun", next_step="check the scan and its header"
        )
    result = levels[-1].better(centred, found[0].affine)
    if kind == "affine":
        result = _stretched(levels, result)
    after = levels[-1].metric(result)
    overlap = float(sampled(moving.finest, inverse(result), _compared(fixed))[1].mean())
    _check(result, after, overlap)
    return Alignment(result, before, float(after or 0.0), overlap)


def _stretched(levels: Sequence[_Level], rigid: Affine) -> Affine:
    """An affine that begins from a rigid fit and is at least as good; else that fit."""
    tried = levels[1].refine(rigid, "affine")
    tried = None if tried is None else levels[2].refine(tried.affine, "affine")
    return rigid if tried is None else levels[2].better(rigid, tried.affine)


def _check(affine: Affine, after: float | None, overlap: float) -> None:
    """Raise `ScanRefused` with the reason when a result cannot be believed."""
    look = "look at the scan: is it the same part of the body, and is its header right?"
    if overlap < LEAST_OVERLAP:
        raise ScanRefused(
            f"it covers {overlap:.0%} of the reference, expected {LEAST_OVERLAP:.0%} at least", next_step=look
        )
    if after is None or after < LEAST_LIKENESS:
        raise ScanRefused(
            f"it does not look like the reference: mutual information {after or 0:.2f} nats, expected "
            f"{LEAST_LIKENESS} at least",
            next_step=look,
        )
    left, stretch, right = np.linalg.svd(affine[:3, :3])
    turn = math.degrees(math.acos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))
    if np.linalg.det(affine[:3, :3]) <= 0 or stretch.max() > STRETCH or stretch.min() < 1 / STRETCH:
        sizes = " × ".join(f"{one:.2f}" for one in stretch)
        raise ScanRefused(f"the scan would have to be stretched by {sizes}, expected {STRETCH} at most", next_step=look)
    if turn > TURN_DEG:
        raise ScanRefused(
            f"the scan would have to be turned by {turn:.0f}°, expected {TURN_DEG:g}° at most", next_step=look
        )


def _placements(fixed: Working, moving: Working) -> Iterator[Affine]:
    """Where to begin: centres of mass on each other, then turned; middles of the grids; as the headers say."""
    from scipy.spatial.transform import Rotation

    goal = centre_of(fixed.finest.foreground & fixed.masks[-1], fixed.finest.affine)
    turns = [(0.0, 0.0, 0.0)]
    turns += [tuple(sign * _TURNS_DEG * np.eye(3)[axis]) for axis, sign in product(range(3), (1, -1))]
    for angles in turns:
        yield _placed(Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), moving.centre_mm, goal)
    yield _placed(np.eye(3), _middle(moving.finest), _middle(fixed.finest))
    yield np.eye(4)


def _placed(linear: NDArray[np.float64], point: NDArray[np.float64], goal: NDArray[np.float64]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = goal - linear @ point
    return affine


def _middle(volume: Volume) -> NDArray[np.float64]:
    return apply_affine(volume.affine, (np.array(volume.values.shape) - 1) / 2)


def _compared(fixed: Working) -> NDArray[np.float64]:
    """Places (n, 3) in common mm of the voxels that are compared."""
    return apply_affine(fixed.finest.affine, np.argwhere(fixed.masks[-1]))


def _nearest_rigid(affine: Affine) -> Affine:
    """The rotation nearest to an affine's linear part, with the affine's place for the origin."""
    left, _, right = np.linalg.svd(affine[:3, :3])
    rigid = affine.copy()
    rigid[:3, :3] = left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
    return rigid


@dataclass(frozen=True, slots=True, eq=False)
class _Tried:
    affine: Affine  # patient RAS → common RAS
    metric: float


def _best(tried: Sequence[_Tried | None]) -> list[_Tried]:
    """Those that met the reference, the most alike first."""
    return sorted((one for one in tried if one is not None), key=lambda one: -one.metric)


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """One level of both pyramids in ITK's hands. Matrices that go in and come out are patient RAS → common RAS."""

    itk: Any
    fixed: Any
    mask: Any
    moving: Any
    centre: tuple[float, float, float]  # that transforms turn about, LPS
    step_mm: float

    @classmethod
    def of(cls, itk: Any, fixed: Volume, mask: NDArray[np.bool_], moving: Volume) -> _Level:
        x, y, z = centre_of(mask, _FLIP @ fixed.affine)
        step = float(spacing_mm(fixed.affine).mean()) / 2
        reference, compared = _image(itk, fixed.values, fixed.affine), _image(itk, mask.astype(np.uint8), fixed.affine)
        return cls(itk, reference, compared, _image(itk, moving.values, moving.affine), (x, y, z), step)

    def refine(self, start: Affine, kind: Kind) -> _Tried | None:
        """What the optimiser makes of a start; None where the two images do not meet."""
        method = self._method(self._transform(start, kind))
        # Steps that shrink faster, or end sooner, stop halfway along the narrow ridges of this metric (decision 0014).
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=self.step_mm,
            minStep=self.step_mm / 1000,
            numberOfIterations=_STEPS,
            relaxationFactor=0.8,
            gradientMagnitudeTolerance=1e-8,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        try:
            transform = method.Execute(self.fixed, self.moving)
        except RuntimeError:  # no voxel of the mask falls into the moving image
            return None
        return _Tried(_matrix(transform), -float(method.GetMetricValue()))

    def better(self, first: Affine, second: Affine) -> Affine:
        """The one of two that is more alike; the first where they are equal, or neither meets the reference."""
        alike = [self.metric(one) for one in (first, second)]
        return second if (alike[1] or -math.inf) > (alike[0] or -math.inf) else first

    def metric(self, affine: Affine) -> float | None:
        """Mutual information in nats; None where the two images do not meet."""
        try:
            return -float(self._method(self._transform(affine, "affine")).MetricEvaluate(self.fixed, self.moving))
        except RuntimeError:
            return None

    def _method(self, transform: Any) -> Any:
        method = self.itk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)  # sums of several threads would differ in their last bits
        method.SetNumberOfWorkUnits(1)
        method.SetMetricAsMattesMutualInformation(_BINS)
        method.SetMetricFixedMask(self.mask)
        method.SetMetricSamplingStrategy(method.NONE)  # every voxel of the mask: nothing is drawn
        method.SetInterpolator(self.itk.sitkLinear)
        method.SetInitialTransform(transform, inPlace=False)
        return method

    def _transform(self, affine: Affine, kind: Kind) -> Any:
        """A matrix as ITK's transform, x ↦ linear · (x - centre) + centre + translation, fixed LPS → moving LPS."""
        back = _FLIP @ inverse(affine) @ _FLIP
        centre = np.array(self.centre)
        transform = self.itk.Euler3DTransform() if kind == "rigid" else self.itk.AffineTransform(3)
        transform.SetCenter(self.centre)
        transform.SetMatrix(back[:3, :3].ravel().tolist())
        transform.SetTranslation((back[:3, 3] + back[:3, :3] @ centre - centre).tolist())
        return transform


def _matrix(transform: Any) -> Affine:
    """Patient RAS → common RAS of any linear transform of ITK's, read off at four points."""
    reach = 100.0
    places = np.array([[0.0, 0.0, 0.0], *(np.eye(3) * reach)])
    seen = np.array([transform.TransformPoint(place) for place in places.tolist()])
    back = np.eye(4)
    back[:3, :3] = (seen[1:] - seen[0]).T / reach
    back[:3, 3] = seen[0]
    return inverse(_FLIP @ back @ _FLIP)


def _image(itk: Any, values: NDArray[Any], affine: Affine) -> Any:
    """An array (x, y, z) whose affine maps to RAS+ mm as ITK's image, which is (z, y, x) in memory and LPS."""
    image = itk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    edges = spacing_mm(affine)
    lps = _FLIP @ affine
    image.SetSpacing(edges.tolist())
    image.SetDirection((lps[:3, :3] / edges).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image
