"""Where the living patches of one encoder lie: row id → position → segment and centre, in arrays that fill by use.

    position   0 … n-1, all living rows by rising row id; those of one segment stand together
    row_ids    (n,) int64 · centres (n, 3) float32, RAS+ mm, read the first time that a patch of their file is asked for

A row costs 20 bytes, and 12 of them only once its file was read. A packed segment is read whole, one scan's own alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.store.segment import Segment, patches_of

if TYPE_CHECKING:
    from isimed_index.index.protocol import RowIds

_CENTRE = ("x_mm", "y_mm", "z_mm")
Positions = NDArray[np.int64]


class Places:
    """The rows of some segments, which are given by rising row id, each with at least one living patch."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        ids = [segment.row_ids for segment in segments]
        self.row_ids: RowIds = np.concatenate(ids) if ids else np.empty(0, np.int64)
        self.starts: Positions = np.cumsum([0, *map(len, ids)])  # (segments + 1,)
        self._centres = np.empty((len(self.row_ids), 3), np.float32)  # takes memory page by page, as it is written
        self._read = np.zeros(len(segments), bool)
        self._beside: dict[str, list[int]] = {}  # numbers of segments by the artefact that they lie in
        for number, segment in enumerate(segments):
            self._beside.setdefault(segment.path, []).append(number)

    def __len__(self) -> int:
        return len(self.row_ids)

    def rows(self, number: int) -> slice:
        """Positions of one segment's rows."""
        return slice(int(self.starts[number]), int(self.starts[number + 1]))

    def ids_of(self, number: int) -> RowIds:
        """Row ids (m,) of one segment, rising: a view."""
        return self.row_ids[self.rows(number)]

    def blocks(self, output: str) -> list[tuple[RowIds, NDArray[np.floating[Any]]]]:
        """Row ids and vectors (n, d) of all rows, as memory maps: what lies together in a file is one block."""
        ends = [n for n, (one, next_) in enumerate(pairwise(self.segments)) if not one.goes_on_in(next_)]
        last = [*ends, len(self.segments) - 1]
        first = [0, *(end + 1 for end in ends)]
        return [
            (self.row_ids[self.starts[a] : self.starts[b + 1]], self.segments[a].vectors_to(self.segments[b], output))
            for a, b in zip(first, last, strict=True)
        ]

    def positions(self, row_ids: RowIds) -> Positions:
        """Positions of row ids, all of which live."""
        return np.searchsorted(self.row_ids, row_ids)

    def owners(self, positions: Positions) -> NDArray[np.int64]:
        """Number of the segment of each position."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def centres_mm(self, positions: Positions, owners: NDArray[np.int64]) -> NDArray[np.float32]:
        """Centres (m, 3) of positions in segments `owners`, RAS+ mm of their own scans."""
        if not self._read[owners].all():
            self._fill(np.unique(owners))
        return self._centres[positions]

    def centres_of(self, number: int) -> NDArray[np.float32]:
        """Centres (m, 3) of one segment's patches, RAS+ mm of its scan: a view."""
        if not self._read[number]:
            self._fill(np.array([number]))
        return self._centres[self.rows(number)]

    def _fill(self, numbers: NDArray[np.int64]) -> None:
        """Read what is not read yet of the artefacts that some segments lie in."""
        for path in {self.segments[number].path for number in numbers[~self._read[numbers]]}:
            together = self._beside[path]
            tables = patches_of([self.segments[number] for number in together], _CENTRE)
            for number, table in zip(together, tables, strict=True):
                rows = self._centres[self.rows(number)]
                for axis, name in enumerate(_CENTRE):
                    rows[:, axis] = table.column(name).to_numpy()
                self._read[number] = True
