"""Files in, `Scan` and `LabelMap` out, or a `ScanRefused` that says why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.scans import formats
from isimed_index.scans.part import Wanted
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.scans.volume import Volume3D
from isimed_index.space import largest_apart_mm

if TYPE_CHECKING:
    from isimed_index.scans.dicom.series import Series

GRID_TOLERANCE_MM = 1e-3


def read_scan(
    path: Path,
    scan_id: str,
    volume: int | None = None,
    analyze_axes: str | None = None,
    *,
    if_several: bool = False,
) -> Scan:
    """Read one volume, turned to nearest RAS+ without resampling; of 4-D data the one of that number, from 0.

    `analyze_axes` says where the voxel axes of an Analyze 7.5 file grow (`LAS`), which it does not say itself. With
    `if_several`, the only volume of a file is taken whatever the number says.

    Raises `ScanRefused` for what is not a sound 3-D scalar volume: a damaged or foreign file, 2-D data, 4-D data
    without a number, colour or complex voxels, no or a singular affine, only NaN, one single value. Some NaN or
    infinite voxels become the least finite value; their number is kept in `attributes["nonfinite_voxels"]`.
    """
    with _named(path.name):
        return _scan(formats.load(path, Wanted(volume, analyze_axes=analyze_axes, if_several=if_several)), scan_id)


def read_series(series: Series, scan_id: str, volume: int | None = None) -> Scan:
    """Read one DICOM series, turned to nearest RAS+; of one with several volumes that of the given number, from 0.

    Only a tilted gantry makes it resample.

    Raises `ScanRefused`, by the series' surrogate and its count of files, for what is no sound volume: missing,
    repeated or unevenly spaced slices, images that do not fit together, damaged or foreign pixel data.
    """
    from isimed_index.scans.dicom import pixels

    count = len(series.files)
    with _named(f"{series.name} ({count} file{'s' if count > 1 else ''})"):
        return _scan(pixels.load(series, Wanted(volume)), scan_id)


def _scan(volume: Volume3D, scan_id: str) -> Scan:
    voxels, nonfinite = _finite(volume.voxels, volume.slope)
    least, most = float(voxels.min()), float(voxels.max())
    if least == most:
        raise ScanRefused(f"every voxel has the same value, {least:g}", next_step="export the image again")
    reach = max(abs(least), abs(most)) * abs(volume.slope) + abs(volume.intercept)
    if not reach < float(np.finfo(np.float32).max):
        raise ScanRefused("its values do not fit into 32-bit floating point", next_step="rescale the image")
    attributes = volume.attributes | ({"nonfinite_voxels": nonfinite} if nonfinite else {})
    return Scan(scan_id, voxels, volume.affine, volume.slope, volume.intercept, attributes)


def read_labels(path: Path, scan: Scan, names: Mapping[int, str], analyze_axes: str | None = None) -> LabelMap:
    """Read a label map that lies on the grid of `scan`, after turning both to RAS+; raises `ScanRefused` if not."""
    with _named(path.name):
        volume = formats.load(path, Wanted(labels=math.prod(scan.shape), analyze_axes=analyze_axes))
        if volume.voxels.shape != scan.shape:
            raise _misaligned(f"its shape is {volume.voxels.shape}, the scan's {scan.shape}")
        offset_mm = largest_apart_mm(volume.affine, scan.affine, scan.shape)
        if not offset_mm <= GRID_TOLERANCE_MM:
            raise _misaligned(f"they lie up to {offset_mm:.3g} mm apart")
        return LabelMap(_integers(volume), dict(names))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the file's base name, or the series' surrogate, in front of any refusal."""
    try:
        yield
    except ScanRefused as error:
        raise ScanRefused(f"{name}: {error.message}", next_step=error.next_step) from error


def _finite(voxels: NDArray[Any], slope: float) -> tuple[NDArray[Any], int]:
    """The voxels with NaN and infinities replaced by the background, and how many there were."""
    if voxels.dtype.kind != "f":
        return voxels, 0
    finite = np.isfinite(voxels)
    if finite.all():
        return voxels, 0
    if not finite.any():
        raise ScanRefused("every voxel is NaN or infinite", next_step="export the image again")
    kept = voxels[finite]
    background = kept.min() if slope > 0 else kept.max()
    return np.where(finite, voxels, background), int(voxels.size - kept.size)


def _misaligned(what: str) -> ScanRefused:
    return ScanRefused(
        f"the label map is not on the grid of its scan: {what}", next_step="resample the labels to the scan"
    )


def _integers(volume: Volume3D) -> NDArray[Any]:
    """Labels in their stored integer type, or in the smallest one where the file holds real numbers."""
    if volume.voxels.dtype.kind in "iu" and volume.slope == 1 and volume.intercept == 0:
        return volume.voxels
    values = volume.voxels * np.float64(volume.slope) + volume.intercept
    least, most = values.min(), values.max()
    if not (np.isfinite(values).all() and np.array_equal(values, np.rint(values)) and max(-least, most) < 2**31):
        raise ScanRefused("a label map must hold whole numbers", next_step="give a label map, not a probability map")
    furthest = int(most) if least >= 0 else min(int(least), -int(most) - 1)  # a negative asks for a signed type
    return values.astype(np.min_scalar_type(furthest))
