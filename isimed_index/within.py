"""Where a patch has to lie to be an answer: a ball, a cuboid, or a label, each with the space that it is given in.

The *centre* of a patch decides, never its extent: a patch whose centre is outside is outside, however much it overlaps.
Millimetres of one patient say nothing of another, so what is given in patient mm names its scan, and only patches of
that scan can lie in it. Canonical mm (a frame that all charted scans share) need no scan.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from isimed_index.errors import UsageError
from isimed_index.space import Space

LABELS = "isimed sql 'SELECT DISTINCT label, name FROM labels'"  # shows which there are
Triple: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Ball:
    """All patches whose centres lie at most `radius_mm` from `centre`.

    Args:
        centre: three numbers in `space`.
        radius_mm: patient mm of the scan; canonical mm where the space is canonical.
        space: `ras` or `lps` mm of the scan, `voxel` of its source file, or `canonical` mm.
        scan: whose patches; None, every scan with a chart that holds, in canonical space only.
    """

    centre: Triple
    radius_mm: float
    space: Space
    scan: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "centre", _triple("the centre of a ball", self.centre))
        if not all(map(math.isfinite, self.centre)):
            raise UsageError(f"expected the centre of a ball as finite numbers, found {self.centre}")
        object.__setattr__(self, "radius_mm", _number("the radius of a ball", self.radius_mm))
        if not 0 < self.radius_mm < math.inf:
            raise UsageError(f"expected the radius of a ball above 0 mm, found {self.radius_mm:g}")
        _check_space("a ball", self.space, self.scan)


@dataclass(frozen=True, slots=True)
class Cuboid:
    """All patches whose centres lie between `low` and `high` along each axis of `space`, both ends included.

    Args:
        low: three numbers in `space`, each at most that of `high`; `-inf` leaves a side open.
        high: three numbers; `inf` leaves a side open.
        space: `ras` or `lps` mm of the scan, `voxel` of its source file, or `canonical` mm.
        scan: whose patches; None, every scan with a chart that holds, in canonical space only.
    """

    low: Triple
    high: Triple
    space: Space
    scan: str | None = None

    def __post_init__(self) -> None:
        for end in ("low", "high"):
            object.__setattr__(self, end, _triple(f"the {end} end of a cuboid", getattr(self, end)))
        if not all(low <= high for low, high in zip(self.low, self.high, strict=True)):
            raise UsageError(
                f"expected the low end of a cuboid below the high one on every axis, found {self.low} and {self.high}",
                next_step="order the numbers axis by axis; x and y change sign between RAS and LPS",
            )
        _check_space("a cuboid", self.space, self.scan)


@dataclass(frozen=True, slots=True)
class Label:
    """All patches whose centres lie in a label of their scan's label map: in the voxel that is nearest to the centre.

    Scans without a label map, or without this label, have no such patch. For patches that show at least some share of
    a label, wherever their centres are, ask the view `patch_labels`.

    Args:
        label: its name, or its number.
        scan: whose patches; None, of all scans.
    """

    label: str | int
    scan: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            try:
                if isinstance(self.label, bool):
                    raise TypeError
                object.__setattr__(self, "label", operator.index(self.label))
            except TypeError:
                raise UsageError(f"expected a label's name or its number, found {self.label!r}") from None
        if self.label == 0:
            raise UsageError("label 0 is the background of a label map", next_step=LABELS)
        _check_scan(self.scan)


Part: TypeAlias = Ball | Cuboid | Label
Within: TypeAlias = Part | Sequence[Part]  # of several, all


def parts(within: Within | None) -> tuple[Part, ...]:
    """What has to hold, as a tuple; `UsageError` for anything that is no ball, cuboid or label."""
    if within is None:
        return ()
    several: tuple[Any, ...] = (within,)
    if isinstance(within, Iterable):
        several = tuple(within)
    for part in several:
        if not isinstance(part, get_args(Part)):
            raise UsageError(
                f"expected within as a Ball, Cuboid or Label, or several, found {type(part).__name__}",
                next_step="isi.Ball(centre, radius_mm, space, scan)",
            )
    return several


def _number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"expected {what} as a number, found {value!r}") from None


def _triple(what: str, values: Any) -> Triple:
    try:
        x, y, z = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UsageError(f"expected {what} as three numbers, found {values!r}") from None
    if math.isnan(x) or math.isnan(y) or math.isnan(z):
        raise UsageError(f"expected {what} as three numbers, found {values!r}")
    return x, y, z


def _check_space(what: str, space: Any, scan: Any) -> None:
    if space not in get_args(Space):
        raise UsageError(f"expected the space of {what} as {', '.join(get_args(Space))}, found {space!r}")
    if scan is None and space != "canonical":
        raise UsageError(
            f"{what} in {space} coordinates needs the scan that they belong to",
            next_step="give scan=…, or canonical coordinates (Store.canonical) for all scans",
        )
    _check_scan(scan)


def _check_scan(scan: Any) -> None:
    if scan is not None and not isinstance(scan, str):
        raise UsageError(f"expected the id of a stored scan, found {scan!r}", next_step="isimed ls")
