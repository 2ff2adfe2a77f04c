"""A stored scan as training reads it: whole, or only the boxes that a step looks at, many patches a read.

      boxes that views see ─▶ source boxes, with the smoothing's reach ─▶ joined where that costs less ─▶ one read each
                              (WorkingGrid.source_box)                    (whole chunks are decoded)

Which way is cheaper is decided for every scan and step by the chunks that have to be decoded and the voxels that have
to be resampled: two views of a head see most of it, two of a whole body a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isimed_index.grid import Box
from isimed_index.pretrain.views import Window
from isimed_index.scans.prepare import Intensity, Volume, WorkingGrid, prepare

if TYPE_CHECKING:
    from isimed_index.scans.chunks import StoredScan

_CHUNK = 64  # edge of a stored chunk, which is decoded as a whole (scans.chunks)
# Costs in units of decoding one voxel, about 7 ns, as measured on one core.
_PREPARE = 2.0  # turn a voxel into float32, resample and scale it
_READ = 100_000  # ask Zarr for a box, however small


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A scan in the store, prepared at `spacing_mm`; `open` opens it without reading voxels."""

    open: Callable[[], StoredScan]
    spacing_mm: float
    intensity: Intensity
    voxels: int  # of the working volume, about: see `working_voxels`

    def __call__(self) -> Volume:
        """The whole working volume."""
        return self._whole(None)

    def _whole(self, ends: tuple[float, float] | None) -> Volume:
        stored = self.open()
        return prepare(stored.values(), stored.affine, self.spacing_mm, self.intensity, ends)

    def windows(self, boxes: Sequence[Box], ends: tuple[float, float], whole: Window | None) -> list[Window]:
        """A window for every box of the working volume; boxes that lie near each other share one."""
        stored = self.open()
        grid = WorkingGrid.of(stored.shape, stored.affine, self.spacing_mm)
        joined = joined_boxes(boxes, grid)
        if sum(read_cost(grid.source_box(box)) for box in set(joined)) >= read_cost(Box((0, 0, 0), stored.shape)):
            if whole is None:
                volume = self._whole(ends)
                whole = Window.of(volume.values, volume.background)
            return [whole] * len(boxes)
        read = {}
        for box in set(joined):
            values = grid.part(stored.values(grid.source_box(box)), box)
            scaled = self.intensity.scale(values, ends)
            read[box] = Window.of(scaled, self.intensity.low, box.start, grid.shape)
        return [read[box] for box in joined]


def working_voxels(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: float) -> int:
    """About how many voxels a scan of `shape` has at another, isotropic spacing."""
    return math.prod(max(1, round(n * mm / target_mm)) for n, mm in zip(shape, spacing_mm, strict=True))


def read_cost(box: Box) -> float:
    """What it costs to read and prepare a box of a stored scan, in units of decoding one voxel."""
    chunks = math.prod(-(-stop // _CHUNK) - start // _CHUNK for start, stop in zip(box.start, box.stop, strict=True))
    return chunks * _CHUNK**3 + math.prod(box.shape) * _PREPARE + _READ


def joined_boxes(boxes: Sequence[Box], grid: WorkingGrid) -> list[Box]:
    """For every box of a working volume the box that is read for it: its own, or one around several."""
    groups: list[tuple[Box, float, list[int]]] = []
    for number, box in enumerate(boxes):
        cost = read_cost(grid.source_box(box))
        members = [number]
        for other in list(groups):  # what was joined may now also be worth joining with the next
            around = _around(box, other[0])
            together = read_cost(grid.source_box(around))
            if together <= cost + other[1]:
                groups.remove(other)
                box, cost, members = around, together, members + other[2]
        groups.append((box, cost, members))
    found = dict[int, Box]()
    for box, _, members in groups:
        found |= dict.fromkeys(members, box)
    return [found[number] for number in range(len(boxes))]


def _around(a: Box, b: Box) -> Box:
    ax, ay, az = map(min, a.start, b.start)
    bx, by, bz = map(max, a.stop, b.stop)
    return Box((ax, ay, az), (bx, by, bz))
