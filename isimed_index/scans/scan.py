"""What a file becomes: voxels with an exact place in patient millimetres, and the label map beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index import space
from isimed_index.space import Affine


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """One volume: stored voxels (x, y, z) whose axes grow nearest to Right, Anterior, Superior.

    `affine` maps a voxel index to RAS+ mm; a physical value (HU, arbitrary MR units) is `voxels * slope + intercept`.
    `attributes` is an allow-list of facts about the source (format, orientation, …): no patient data, no paths.
    """

    id: str
    voxels: NDArray[Any]
    affine: Affine
    slope: float = 1.0
    intercept: float = 0.0
    attributes: Mapping[str, str | float | int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        nx, ny, nz = self.voxels.shape
        return nx, ny, nz

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """Edge lengths (3,) of one voxel in mm."""
        return space.spacing_mm(self.affine)

    @property
    def orientation(self) -> str:
        """Axis codes of the voxels as they are held here, `RAS` unless the scan is oblique beyond 45 degrees."""
        return space.orientation(self.affine)

    @property
    def background(self) -> int | float:
        """The stored voxel value of the least physical value: what lies outside the scan is taken to look like it."""
        least: int | float = (self.voxels.min() if self.slope > 0 else self.voxels.max()).item()
        return least

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over geometry, scaling and voxels: equal exactly when the content of two scans is equal."""
        little = self.voxels.dtype.newbyteorder("<")
        head = [list(self.voxels.shape), little.str, self.slope, self.intercept, self.affine.tolist()]
        sha = hashlib.sha256(json.dumps(head).encode())
        sha.update(np.ascontiguousarray(self.voxels, dtype=little).data)
        return sha.hexdigest()

    def values(self) -> NDArray[np.float32]:
        """Physical values (x, y, z) as a new float32 array."""
        return physical_values(self.voxels, self.slope, self.intercept)


@dataclass(frozen=True, slots=True, eq=False)
class LabelMap:
    """Integer labels (x, y, z) on the very grid of a scan; `names` says what the numbers mean, 0 is background."""

    voxels: NDArray[Any]
    names: Mapping[int, str] = field(default_factory=dict)
    overlap_voxels: int = 0  # that lay in more than one of the masks it was made of


def physical_values(voxels: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """`voxels * slope + intercept` as a new float32 array of the same shape, in C order."""
    values = voxels.astype(np.float32, order="C")
    if slope != 1:
        values *= np.float32(slope)
    if intercept != 0:
        values += np.float32(intercept)
    return values
