"""Files in, `Scan` and `LabelMap` out, or a `ScanRefused` that says why."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans import formats
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.scans.volume import Volume3D
from isimed_index.space import Affine, apply_affine

if TYPE_CHECKING:
    from isimed_index.scans.dicom.series import Series

GRID_TOLERANCE_MM = 1e-3
_LABEL_COLUMNS = ("label", "index", "value")


def read_scan(path: Path, scan_id: str) -> Scan:
    """Read one volume, turned to nearest RAS+ without resampling.

    Raises `ScanRefused` for what is not a sound 3-D scalar volume: a damaged or foreign file, 2-D or 4-D data, colour
    or complex voxels, no or a singular affine, only NaN, one single value. Some NaN or infinite voxels become the
    least finite value; their number is kept in `attributes["nonfinite_voxels"]`.
    """
    with _named(path.name):
        return _scan(formats.load(path), scan_id)


def read_series(series: Series, scan_id: str) -> Scan:
    """Read one DICOM series, turned to nearest RAS+; only a tilted gantry makes it resample.

    Raises `ScanRefused`, by the series' surrogate and its count of files, for what is no sound volume: missing,
    repeated or unevenly spaced slices, images that do not fit together, damaged or foreign pixel data.
    """
    from isimed_index.scans.dicom import pixels

    count = len(series.files)
    with _named(f"{series.name} ({count} file{'s' if count > 1 else ''})"):
        return _scan(pixels.load(series), scan_id)


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


def read_labels(path: Path, scan: Scan, names: Mapping[int, str]) -> LabelMap:
    """Read a label map that lies on the grid of `scan`, after turning both to RAS+; raises `ScanRefused` if not."""
    with _named(path.name):
        volume = formats.load(path)
        if volume.voxels.shape != scan.shape:
            raise _misaligned(f"its shape is {volume.voxels.shape}, the scan's {scan.shape}")
        offset_mm = _largest_offset_mm(volume.affine, scan.affine, scan.shape)
        if not offset_mm <= GRID_TOLERANCE_MM:
            raise _misaligned(f"they lie up to {offset_mm:.3g} mm apart")
        return LabelMap(_integers(volume), dict(names))


def read_label_names(path: Path) -> dict[int, str]:
    """Read a CSV or TSV table with the columns `label` (or `index`, `value`) and `name`; `UsageError` if malformed."""
    columns, rows = read_rows(path, "label table")
    key = next((column for column in _LABEL_COLUMNS if column in columns), None)
    if key is None or "name" not in columns:
        raise UsageError(
            f"label table {path.name} needs a column label (or index, value) and a column name, found {columns}",
            next_step="add a header line such as label,name",
        )
    names: dict[int, str] = {}
    for line, row in enumerate(rows, start=2):
        text, name = row[key] or "", row["name"] or ""
        if not text.strip().lstrip("-").isdecimal() or not name.strip():
            raise UsageError(f"label table {path.name}, line {line}: expected a whole number and a name")
        label = int(text)
        if names.setdefault(label, name.strip()) != name.strip():
            raise UsageError(f"label table {path.name}, line {line}: label {label} has two names")
    return names


def read_rows(path: Path, what: str) -> tuple[list[str], list[dict[str, str | None]]]:
    """Column names and rows of a CSV table, or a TSV one where its first line holds a tab; `UsageError` if unreadable.

    A cell that a short row lacks is None; cells beyond the last column are dropped.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in first else ",")
            columns = list(reader.fieldnames or ())
            return columns, [{column: row[column] for column in columns} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{what} {path.name} cannot be read", next_step="give a CSV or TSV file") from error


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


def _largest_offset_mm(one: Affine, other: Affine, shape: tuple[int, int, int]) -> float:
    """The largest distance between the places that two affines give to the same voxel; it is reached at a corner."""
    corners = np.array(list(product(*[(0, n - 1) for n in shape])))  # (8, 3)
    apart = apply_affine(one, corners) - apply_affine(other, corners)
    return float(np.linalg.norm(apart, axis=1).max())


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
