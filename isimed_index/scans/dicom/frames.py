"""One DICOM data set → its images: where each lies, how its values are scaled, what its pixels are.

Classic files hold one image, enhanced files many, whose facts are in functional groups, shared by all frames or one by
one. What is no slice of a scalar volume (localizer, secondary capture, colour, report, …) is refused here by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from isimed_index.errors import ScanRefused
from isimed_index.scans.dicom.slices import Slice

# SOP classes that hold slices of a volume, and the modality that each says; the tag Modality is not asked.
_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",  # enhanced
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",  # legacy converted enhanced
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.128.1": "PT",
}
NOT_A_VOLUME = "none is needed: only volumes become scans"
_SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
_UNITS_MATTER = ("CT", "PT")  # their values are HU or activity: inverting a MONOCHROME1 would make them wrong
_VARYING = (
    "EchoTime",
    "InversionTime",
    "FlipAngle",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "AcquisitionNumber",
    "KVP",
    "ImageType",
)
_VARYING_GROUPS = {
    "FrameContentSequence": ("StackID", "TemporalPositionIndex"),
    "MREchoSequence": ("EffectiveEchoTime",),
    "MRDiffusionSequence": ("DiffusionBValue",),
    "MRImageFrameTypeSequence": ("FrameType",),
    "CTImageFrameTypeSequence": ("FrameType",),
    "CardiacSynchronizationSequence": ("NominalCardiacTriggerDelayTime",),
}
_ENHANCED = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TAGS = [
    *("SOPClassUID", "ImageType", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ModalityLUTSequence"),
    *("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"),
    *_ENHANCED,
    *_VARYING,
]


@dataclass(frozen=True, slots=True)
class PixelType:
    """How the values of one file are stored; `inverted` says that a low value is bright (MONOCHROME1)."""

    allocated: int
    stored: int
    signed: bool
    inverted: bool


def modality_of(dataset: Any) -> str:
    """CT, MR or PT by the SOP class; `ScanRefused` for a data set that is no image of a volume, and says what it is."""
    from pydicom.uid import UID

    sop_class = UID(str(dataset.get("SOPClassUID", "") or ""))
    kinds = {str(word).upper() for word in dataset.get("ImageType", None) or ()}
    if sop_class.startswith(_SECONDARY) or "SCREEN SAVE" in kinds:
        raise ScanRefused("secondary capture, a picture of a screen or a report", next_step=NOT_A_VOLUME)
    if sop_class not in _CLASSES:
        known = sop_class.name if sop_class.startswith("1.2.840.10008.") and sop_class.name != sop_class else "unknown"
        raise ScanRefused(f"no image of a CT, MR or PET volume, but of the SOP class {known!r}", next_step=NOT_A_VOLUME)
    if "LOCALIZER" in kinds:
        raise ScanRefused("localizer (scout), not a slice of a volume", next_step=NOT_A_VOLUME)
    if "MOSAIC" in kinds:
        raise ScanRefused("mosaic, many slices in one picture", next_step="convert it with dcm2niix")
    return _CLASSES[sop_class]


def pixel_type_of(dataset: Any, modality: str) -> PixelType:
    """How the values of the data set are stored; `ScanRefused` for colour and for layouts that are not read."""
    photometric = str(dataset.get("PhotometricInterpretation", "") or "")
    if int(dataset.get("SamplesPerPixel", 1) or 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ScanRefused(f"colour image ({photometric or 'untold'})", next_step=NOT_A_VOLUME)
    if photometric == "MONOCHROME1" and modality in _UNITS_MATTER:
        raise ScanRefused(
            f"MONOCHROME1 in a {modality} image: its values have a unit, and inverted ones would be wrong",
            next_step="export it as MONOCHROME2",
        )
    allocated, stored = int(dataset["BitsAllocated"].value), int(dataset["BitsStored"].value)
    high = int(dataset.get("HighBit", stored - 1))
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        raise ScanRefused(
            f"{stored} bits stored in {allocated}, the highest being bit {high}, are not read",
            next_step="export it again",
        )
    if "ModalityLUTSequence" in dataset:
        raise ScanRefused("its values go through a modality look-up table", next_step="export it with rescaled values")
    signed = int(dataset["PixelRepresentation"].value)
    if signed not in (0, 1):
        raise ScanRefused("it does not say whether its values have a sign", next_step="export it again")
    return PixelType(allocated, stored, bool(signed), photometric == "MONOCHROME1")


def slices_of(dataset: Any) -> list[Slice]:
    """The images of one data set, in the order of its frames; `file` is 0 until the series is known."""
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence", None)
    if per_frame is None:
        if frames != 1:
            raise ScanRefused(f"{frames} frames that do not say where they lie", next_step=NOT_A_VOLUME)
        return [_slice(dataset, 0, [dataset] * 4, _varying(dataset, {"": _VARYING}))]
    if len(per_frame) != frames or frames < 1:
        raise ScanRefused(f"{frames} frames, but functional groups for {len(per_frame)}", next_step="export it again")
    shared_items = dataset.get("SharedFunctionalGroupsSequence", None)
    shared = shared_items[0] if shared_items else None
    slices = []
    for number, own in enumerate(per_frame):
        groups = [
            _group(own, shared, name)
            for name in (
                "PlanePositionSequence",
                "PlaneOrientationSequence",
                "PixelMeasuresSequence",
                "PixelValueTransformationSequence",
            )
        ]
        slices.append(_slice(dataset, number, groups, _varying(own, _VARYING_GROUPS)))
    return slices


def _group(own: Any, shared: Any, name: str) -> Any:
    """The one item of a functional group: the frame's own, else the shared one, else None."""
    for holder in (own, shared):
        items = None if holder is None else holder.get(name, None)
        if items:
            return items[0]
    return None


def _slice(dataset: Any, frame: int, groups: list[Any], varying: tuple[tuple[str, str | float], ...]) -> Slice:
    position, orientation, measures, values = groups
    place = _numbers(position, "ImagePositionPatient", 3)
    along = _numbers(orientation, "ImageOrientationPatient", 6)
    between_rows, between_columns = _numbers(measures, "PixelSpacing", 2)
    slope, intercept = _one(values, "RescaleSlope", 1.0), _one(values, "RescaleIntercept", 0.0)
    if slope == 0:
        raise ScanRefused("its rescale slope is 0", next_step="export it again")
    rows, columns = int(dataset["Rows"].value), int(dataset["Columns"].value)
    if min(rows, columns) < 2:
        raise ScanRefused(f"images of {rows}×{columns} pixels are no slices of a volume", next_step=NOT_A_VOLUME)
    return Slice(
        file=0,
        frame=frame,
        shape=(rows, columns),
        position_mm=(place[0], place[1], place[2]),
        rows_along=(along[0], along[1], along[2]),
        columns_along=(along[3], along[4], along[5]),
        spacing_mm=(between_rows, between_columns),
        slope=slope,
        intercept=intercept,
        varying=varying,
    )


def _numbers(holder: Any, key: str, count: int) -> list[float]:
    """The finite numbers of an attribute that must be there."""
    values: Any = None if holder is None else holder.get(key, None)
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ScanRefused(f"its header does not say where the image lies ({key})", next_step="export it again")
    return numbers


def _one(holder: Any, key: str, default: float) -> float:
    value = None if holder is None else holder.get(key, None)
    number = default if value is None or value == "" else float(value)
    if not math.isfinite(number):
        raise ScanRefused(f"its {key} is no number", next_step="export it again")
    return number


def _varying(holder: Any, groups: dict[str, tuple[str, ...]]) -> tuple[tuple[str, str | float], ...]:
    """What may tell an image from others at its place; texts are compared, and never shown."""
    found: list[tuple[str, str | float]] = []
    for group, names in groups.items():
        item = _group(holder, None, group) if group else holder
        for name in names if item is not None else ():
            value = item.get(name, None)
            if value is None or value == "":
                continue
            try:
                found.append((name, float(value)))
            except (TypeError, ValueError):
                found.append((name, str(value)))
    return tuple(found)
