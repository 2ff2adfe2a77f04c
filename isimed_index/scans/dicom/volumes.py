"""Which volume of a series: several images at every place, told apart by one number of their headers, or refused.

Echoes, b-values, phases and dynamics come as one series whose images lie on top of each other. They are volumes when
one number (EchoTime, DiffusionBValue, TemporalPositionIdentifier, …) has as many values as every place has images, and
each place has one image of each value. Everything else (several directions of one b-value, echoes by dynamics, a place
with an image too many) is no clear choice, and `arrange` refuses it with its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isimed_index.scans.dicom.slices import SAME_PLACE_MM, Slice, what_varies
from isimed_index.scans.part import Wanted, checked_number

# What orders volumes, the most telling first; where two of them sort the images alike, the first gives the order.
_TELLING = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "DiffusionBValue", "EchoTime", "EffectiveEchoTime"),
    *("InversionTime", "FlipAngle", "TriggerTime", "NominalCardiacTriggerDelayTime", "KVP", "AcquisitionNumber"),
)


def chosen(slices: Sequence[Slice], wanted: Wanted) -> tuple[Sequence[Slice], dict[str, str | float | int]]:
    """The slices of the volume that is asked for, and what is kept of the choice.

    A series that is one volume, or no clear number of them, comes back whole. `ScanRefused` when none of several is
    chosen and when there is none of that number.
    """
    place = _places(slices)
    places = int(place.max()) + 1
    telling = _telling(slices, place) if len(slices) > places else None
    if telling is None:
        if len(slices) == places:
            checked_number(1, wanted, "")
        return slices, {}
    values = sorted({dict(item.varying)[telling] for item in slices})
    what = f"{len(slices)} images at {places} places; they differ in {what_varies(slices)}"
    number = checked_number(len(values), wanted, what)
    kept = [item for item in slices if dict(item.varying)[telling] == values[number]]
    return kept, {"volume": number, "volumes": len(values), "volume_by": telling, "volume_value": values[number]}


def _places(slices: Sequence[Slice]) -> np.ndarray:
    """The number (n,) of the place of each image, counted along the normal of the first."""
    normal = np.cross(slices[0].rows_along, slices[0].columns_along)
    heights = np.array([item.position_mm for item in slices]) @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order], prepend=heights[order[0]]) > SAME_PLACE_MM
    place = np.empty(len(slices), dtype=np.int64)
    place[order] = np.cumsum(steps)
    return place


def _telling(slices: Sequence[Slice], place: np.ndarray) -> str | None:
    """The number of the headers that sorts the images into volumes with one image a place, if it is beyond doubt."""
    found: dict[str, frozenset[frozenset[int]]] = {}
    each, rest = divmod(len(slices), int(place.max()) + 1)
    for name in _TELLING if not rest else ():
        groups: dict[float, list[int]] = {}
        for number, item in enumerate(slices):
            value = dict(item.varying).get(name)
            if not isinstance(value, float):
                break
            groups.setdefault(value, []).append(number)
        else:
            one_each = all(
                len({int(place[n]) for n in some}) == len(some) == place.max() + 1 for some in groups.values()
            )
            if one_each and len(groups) == each:
                found[name] = frozenset(map(frozenset, groups.values()))
    return next(iter(found)) if len(set(found.values())) == 1 else None
