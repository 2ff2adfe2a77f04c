"""The label map of an image of a data set: one file, or binary masks that become one map, one in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isimed_index.errors import ScanRefused
from isimed_index.scans.layouts.found import LabelFiles
from isimed_index.scans.read import read_labels
from isimed_index.scans.scan import LabelMap, Scan


def read_label_files(labels: LabelFiles, scan: Scan, names: Mapping[int, str]) -> LabelMap:
    """Read the label map that a data set has for `scan`; `names` go before the data set's own.

    Raises `ScanRefused`, by the file's name, for a file that is missing or not on the grid of the scan, and for a mask
    that holds more than one label.
    """
    for file in labels.files:
        if not file.exists():
            raise ScanRefused(
                f"its label map {file.name} does not exist",
                next_step="complete the data set, or add the image with --layout files",
            )
    known = {**labels.names, **names}
    if not labels.values:
        return read_labels(labels.files[0], scan, known)
    merged = np.zeros(scan.shape, np.min_scalar_type(max(labels.values)))
    overlap = 0
    for file, value in zip(labels.files, labels.values, strict=True):
        mask = read_labels(file, scan, {}).voxels
        inside = mask != 0  # (x, y, z)
        found = mask[inside]
        if found.size and (found != found[0]).any():
            raise ScanRefused(
                f"{file.name}: expected a mask of one structure, found labels {found.min()} to {found.max()}",
                next_step="give a binary mask",
            )
        overlap += int(np.count_nonzero(merged[inside]))
        merged[inside] = value
    return LabelMap(merged, known, overlap)
