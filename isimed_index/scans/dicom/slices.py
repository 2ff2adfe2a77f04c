"""Where the slices of a series lie: from the place of each to one affine, or to the reason why there is none.

                   k (normal = row × column)        Every slice says in LPS mm where the centre of its first voxel
                   │   ┌──────────┐                 lies and where its rows and columns run. Slices are sorted along
                   │  ┌┴─────────┐│                 the normal, never by name or number.
    position ●─────┼─▶ i (columns)│
             │     │ │           ├┘                 A stack whose positions run off the normal (gantry tilt) is
             ▼ j (rows)──────────┘                  sheared; what is sheared beyond 0.1° is told to the caller.

Refused, with numbers: slices of different size, spacing or direction, two images at one place, a gap, uneven spacing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.space import Affine, checked_affine

MOST_TILT_DEGREES = 0.1  # a stack this little sheared keeps its sheared affine, which is exact
_REFUSED_TILT_DEGREES = 45.0
_ANGLE_TOLERANCE = 1e-4  # of direction cosines, within a series; that of right angles and unit length is 10 times it
_SPACING_TOLERANCE = 1e-4  # relative, of pixel spacings within a series
SAME_PLACE_MM = 1e-3
_OFF_LINE_MM, _OFF_LINE_PART = 0.02, 0.01  # how far a slice may lie from its place, in mm or in slice spacings

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Slice:
    """One image of a series: where it lies (LPS mm) and how its stored values are scaled.

    `position_mm` is the centre of the first voxel; `rows_along` and `columns_along` are the directions in which the
    column and the row index grow; `spacing_mm` is between rows, then between columns. `varying` holds what may tell it
    from another image at the same place, such as its echo time.
    """

    file: int
    frame: int
    shape: tuple[int, int]  # rows, columns
    position_mm: Triple
    rows_along: Triple
    columns_along: Triple
    spacing_mm: tuple[float, float]
    slope: float = 1.0
    intercept: float = 0.0
    varying: tuple[tuple[str, str | float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Sorted slices and the affine (column, row, slice) → RAS+ mm through them.

    `off_line_mm` is how far a slice lies at most from where the affine says; `tilt_degrees` is between the normal and
    the line of the positions.
    """

    slices: list[Slice]
    affine: Affine
    off_line_mm: float
    tilt_degrees: float


def arrange(slices: Sequence[Slice]) -> Stack:
    """Sort the slices of one series and place them; `ScanRefused` says with numbers why they are no volume."""
    _check_alike(slices)
    if len(slices) < 2:
        raise ScanRefused("expected a volume, found a single image", next_step="export the whole series")
    first = slices[0]
    row, column = np.array(first.rows_along), np.array(first.columns_along)
    normal = np.cross(row, column)
    heights = np.array([item.position_mm for item in slices]) @ normal  # (n,) mm
    order = np.argsort(heights, kind="stable")
    _check_one_each([slices[i] for i in order], heights[order])
    _check_even(heights[order])

    ordered = [slices[i] for i in order]
    positions = np.array([item.position_mm for item in ordered])  # (n, 3)
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    off_line = np.linalg.norm(positions - (positions[0] + np.arange(len(ordered))[:, None] * step), axis=1)
    spacing = float(step @ normal)
    if off_line.max() > max(_OFF_LINE_MM, _OFF_LINE_PART * spacing):
        raise ScanRefused(
            f"its slices do not lie on one straight line: slice {int(off_line.argmax()) + 1} of {len(ordered)} is "
            f"{off_line.max():.3g} mm off it",
            next_step="export the series again",
        )
    tilt = math.degrees(math.acos(min(1.0, spacing / float(np.linalg.norm(step)))))
    if tilt > _REFUSED_TILT_DEGREES:
        raise ScanRefused(
            f"its slices lie beside rather than above each other: their positions run {tilt:.0f}° off the normal",
            next_step="split the series",
        )
    lps = np.eye(4)
    lps[:3, 0] = row * first.spacing_mm[1]
    lps[:3, 1] = column * first.spacing_mm[0]
    lps[:3, 2] = step
    lps[:3, 3] = positions[0]
    affine = checked_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)
    return Stack(ordered, affine, float(off_line.max()), tilt)


def upright(stack: Stack) -> tuple[Affine, NDArray[np.float64], tuple[int, int]]:
    """The grid that a sheared stack is resampled to: its affine, offsets (n, 2) of columns and rows, and how many more.

    Its slices lie where they were, one above the other: slice k of the grid at column c and row r shows what slice k of
    the stack shows at (c, r) + offset. The grid is wider by the extra columns and rows, so that nothing is cut off.
    """
    row, column = stack.affine[:3, 0], stack.affine[:3, 1]
    step = stack.affine[:3, 2]
    shift = np.array([step @ row / (row @ row), step @ column / (column @ column)])  # columns and rows a slice
    normal = step - shift[0] * row - shift[1] * column
    travelled = np.arange(len(stack.slices))[:, None] * shift  # (n, 2)
    least = np.minimum(travelled.min(axis=0), 0)
    extra = np.ceil(travelled.max(axis=0) - least - 1e-6).astype(int)
    affine = stack.affine.copy()
    affine[:3, 2] = normal
    affine[:3, 3] = stack.affine[:3, 3] + least[0] * row + least[1] * column
    return affine, least - travelled, (int(extra[0]), int(extra[1]))


def what_varies(slices: Sequence[Slice]) -> str:
    """Such as `EchoTime (2.46, 4.92)`: what is not the same in all slices, numbers with their first values."""
    values: dict[str, set[str | float]] = {}
    for item in slices:
        for name, value in item.varying:
            values.setdefault(name, set()).add(value)
    parts = []
    for name, found in values.items():
        if len(found) > 1:
            numbers = sorted(value for value in found if isinstance(value, float))
            shown = ", ".join(f"{value:g}" for value in numbers[:4]) + (", …" if len(numbers) > 4 else "")
            parts.append(f"{name} ({shown})" if numbers else f"{name} ({len(found)} values)")
    return ", ".join(parts)


def _check_alike(slices: Sequence[Slice]) -> None:
    """All slices have one size, one pixel spacing and one direction, and the directions are at right angles."""
    first = slices[0]
    row, column = np.array(first.rows_along), np.array(first.columns_along)
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if (np.abs(lengths - 1) > 10 * _ANGLE_TOLERANCE).any() or abs(row @ column) > 10 * _ANGLE_TOLERANCE:
        raise ScanRefused(
            "the directions of its rows and columns are not at right angles or not of length one",
            next_step="export it again",
        )
    if min(first.spacing_mm) <= 0:
        raise ScanRefused(
            f"its pixel spacing is {first.spacing_mm[0]:g} × {first.spacing_mm[1]:g} mm", next_step="export it again"
        )
    _check_same(slices, "sizes", lambda item: item.shape, 0.0, lambda item: f"{item.shape[0]}×{item.shape[1]}")
    _check_same(
        slices,
        "pixel spacings",
        lambda item: item.spacing_mm,
        _SPACING_TOLERANCE * min(first.spacing_mm),
        lambda item: f"{item.spacing_mm[0]:g}×{item.spacing_mm[1]:g} mm",
    )
    _check_same(
        slices,
        "directions",
        lambda item: (*item.rows_along, *item.columns_along),
        _ANGLE_TOLERANCE,
        lambda item: "(" + ", ".join(f"{number:.3g}" for number in (*item.rows_along, *item.columns_along)) + ")",
    )


def _check_same(
    slices: Sequence[Slice],
    what: str,
    value: Callable[[Slice], Sequence[float]],
    tolerance: float,
    shown: Callable[[Slice], str],
) -> None:
    values = np.array([value(item) for item in slices], dtype=np.float64)
    apart = (np.abs(values - values[0]) > tolerance).any(axis=1)
    if apart.any():
        other = slices[int(apart.argmax())]
        varies = what_varies(slices)
        raise ScanRefused(
            f"its images have different {what}: {shown(slices[0])} and {shown(other)}, {int(apart.sum())} of "
            f"{len(slices)} are unlike the first" + (f"; they differ in {varies}" if varies else ""),
            next_step="split the series, and add the part that is a volume",
        )


def _check_one_each(ordered: Sequence[Slice], heights: NDArray[np.float64]) -> None:
    """No two images lie at one place."""
    near = np.flatnonzero(np.diff(heights) <= SAME_PLACE_MM)
    if not len(near):
        return
    places = len(heights) - len(near)
    varies = what_varies(ordered)
    raise ScanRefused(
        f"it has {len(heights)} images at {places} places"
        + (f"; they differ in {varies}" if varies else "; nothing in their headers tells them apart"),
        next_step="split the series, and add one volume of it" if varies else "remove the duplicates",
    )


def _check_even(heights: NDArray[np.float64]) -> None:
    """All gaps are alike: none is missing, none is wider or narrower."""
    gaps = np.diff(heights)
    expected = float(np.median(gaps))
    even = np.linspace(heights[0], heights[-1], len(heights))
    if np.abs(heights - even).max() <= max(_OFF_LINE_MM, _OFF_LINE_PART * expected):
        return
    worst = int(np.abs(gaps - expected).argmax())
    where = (
        f"expected {expected:.4g} mm between slices, found {gaps[worst]:.4g} mm between slices {worst + 1} and "
        f"{worst + 2} of {len(heights)}"
    )
    missing = np.rint(gaps / expected) - 1
    whole = np.abs(gaps - (missing + 1) * expected) <= max(_OFF_LINE_MM, 0.05 * expected)
    if whole.all() and missing.sum() >= 1:
        count = int(missing.sum())
        raise ScanRefused(
            f"{count} slice{'s are' if count > 1 else ' is'} missing: {where}", next_step="export the series again"
        )
    raise ScanRefused(f"its slices are unevenly spaced: {where}", next_step="resample it to even spacing elsewhere")
