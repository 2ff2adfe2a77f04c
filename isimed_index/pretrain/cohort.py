"""The training scans: prepared whole once, then kept in memory as far as it goes; of the others, boxes are read.

What is shown of a scan does not depend on when it was read or by which thread. So which scans are kept is decided
beforehand, by their sizes: the values of a box that was read alone equal those of the whole volume, but for rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import NotFound
from isimed_index.grid import Box
from isimed_index.pretrain.views import Window
from isimed_index.scans.prepare import Volume
from isimed_index.space import Affine

Source = Callable[[], Volume]  # reads and prepares one scan
_PLACES = 16_384  # voxels of the foreground that are remembered of a scan: 96 KiB
_BYTES_PER_VOXEL = 2


@runtime_checkable
class PartialSource(Protocol):
    """A `Source` that can also read parts of its scan."""

    @property
    def voxels(self) -> int:
        """About how many voxels the working volume has; asked of every scan before any is read."""

    def __call__(self) -> Volume:
        """The whole working volume."""

    def windows(self, boxes: Sequence[Box], ends: tuple[float, float], whole: Window | None) -> list[Window]:
        """A window of the working volume for every box, which holds it; `whole` where it happens to be at hand.

        `ends` are those that the whole volume was scaled by.
        """


@dataclass(frozen=True, slots=True, eq=False)
class TrainingScan:
    """What is known of a scan since it was prepared: its grid, and where its body lies."""

    shape: tuple[int, int, int]
    affine: Affine  # working voxel → RAS+ mm
    to_common: Affine | None  # RAS+ mm → mm of the reference that the cohort is registered to, if it is to one
    background: float
    ends: tuple[float, float] | None
    foreground_vox: NDArray[np.int16]  # (n, 3) voxels of the foreground: all, or some drawn evenly
    body_vox: NDArray[np.int64]  # (2, 3) the foreground's box: first voxels, and those after the last
    centroid_vox: NDArray[np.float64]  # (3,) of all of the foreground
    source: Source
    kept: bool
    whole: Window | None  # where it is at hand

    def windows(self, boxes: Sequence[Box]) -> list[Window]:
        """A window for every box of the working volume."""
        if isinstance(self.source, PartialSource) and not self.kept:
            assert self.ends is not None
            return self.source.windows(boxes, self.ends, self.whole)
        whole = self.whole or Window.of((volume := self.source()).values, volume.background)
        return [whole] * len(boxes)


class Cohort:
    """The training scans; safe to use from several threads. `frames` are their transforms to a reference, (4, 4)."""

    def __init__(self, sources: Sequence[Source], budget_bytes: int, frames: Sequence[Affine] | None = None) -> None:
        if not sources:
            raise NotFound("there is no scan to train on", next_step="isimed add PATH, or widen --where")
        assert frames is None or len(frames) == len(sources)
        self._sources = sources
        self._frames = frames
        self._left = budget_bytes
        self._to_keep: set[int] = set()
        for number, source in enumerate(sources):
            if isinstance(source, PartialSource) and source.voxels * _BYTES_PER_VOXEL <= self._left:
                self._left -= source.voxels * _BYTES_PER_VOXEL
                self._to_keep.add(number)
        self._known: dict[int, TrainingScan] = {}
        self._locks = [threading.Lock() for _ in sources]
        self._budget_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sources)

    def scan(self, number: int) -> TrainingScan:
        """What is known of one scan; it is prepared the first time."""
        with self._locks[number]:  # another thread that wants this scan waits for it instead of reading it too
            if number not in self._known:
                volume = self._sources[number]()
                frame = None if self._frames is None else self._frames[number]
                scan = _inspected(volume, self._sources[number], self._keeps(number, volume), frame)
                self._known[number] = scan if scan.kept else replace(scan, whole=None)
                return scan
            return self._known[number]

    def _keeps(self, number: int, volume: Volume) -> bool:
        """Whether a scan stays in memory; one whose size was not known beforehand does where there is room left."""
        if isinstance(self._sources[number], PartialSource):
            return number in self._to_keep
        with self._budget_lock:
            size = volume.values.size * _BYTES_PER_VOXEL
            keep = size <= self._left
            self._left -= size if keep else 0
            return keep


def _inspected(volume: Volume, source: Source, kept: bool, to_common: Affine | None) -> TrainingScan:
    foreground = volume.foreground if volume.foreground.any() else np.ones_like(volume.foreground)  # no contrast
    inside = np.flatnonzero(foreground)
    if len(inside) > _PLACES:
        inside = np.sort(np.random.default_rng(0).choice(inside, _PLACES, replace=False))
    x, y, z = foreground.shape
    counts = [foreground.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]  # along each axis
    occupied = [np.flatnonzero(count) for count in counts]
    return TrainingScan(
        shape=(x, y, z),
        affine=volume.affine,
        to_common=to_common,
        background=volume.background,
        ends=volume.ends,
        foreground_vox=np.stack(np.unravel_index(inside, foreground.shape), -1).astype(np.int16),
        body_vox=np.array([[line[0] for line in occupied], [line[-1] + 1 for line in occupied]]),
        centroid_vox=np.array([count @ np.arange(len(count)) / count.sum() for count in counts]),
        source=source,
        kept=kept,
        whole=Window.of(volume.values, volume.background),
    )
