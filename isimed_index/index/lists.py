"""Inverted lists under a filter: which lists hold rows that are kept, and which of these a query visits.

FAISS visits a fixed number of the lists that are nearest, kept rows or not: where a filter keeps one part of the body,
all of these may be empty. Here the nearest lists that do hold kept rows are visited, as many as it takes to meet
`reach` kept rows, at whatever distance they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.index.protocol import RowIds

_SPAN = 8  # row ids that run farther than this many times the rows are looked up by bisection
_COUNTED = 1 << 17  # of a filter that keeps more rows than this, an even sample is counted


@dataclass(frozen=True, slots=True)
class ListTable:
    """In which inverted list each row is."""

    first: int  # row id of the first place of `by_id`
    by_id: NDArray[np.int32] | None  # (span,): list of row `first + i`, -1 where there is no such row
    ids: RowIds  # (n,) rising, and
    lists: NDArray[np.int32]  # (n,) their lists, where ids run too far for `by_id`
    count: int  # of lists

    @classmethod
    def of(cls, lists: list[RowIds]) -> ListTable:
        """From the row ids of each list."""
        sizes = [ids.size for ids in lists]
        ids = np.concatenate(lists) if lists else np.empty(0, np.int64)
        owner = np.repeat(np.arange(len(lists), dtype=np.int32), sizes)
        first = int(ids.min(initial=0)) if ids.size else 0
        span = int(ids.max()) - first + 1 if ids.size else 0
        if span <= _SPAN * ids.size:
            by_id = np.full(span, -1, np.int32)
            by_id[ids - first] = owner
            return cls(first, by_id, ids[:0], owner[:0], len(lists))
        order = np.argsort(ids)
        return cls(first, None, ids[order], owner[order], len(lists))

    def counts(self, rows: RowIds) -> NDArray[np.int64]:
        """How many of `rows` (rising) each list holds; lists of which an even sample saw none count as one row."""
        step = -(-rows.size // _COUNTED)
        found = self._lists_of(rows[::step] if step > 1 else rows)
        counts = np.bincount(found[found >= 0], minlength=self.count) * step
        return np.maximum(counts, 1) if step > 1 else counts

    def _lists_of(self, rows: RowIds) -> NDArray[np.int32]:
        if self.by_id is not None:
            places = rows - self.first
            if places.size and (places[0] < 0 or places[-1] >= self.by_id.size):
                places = places[(places >= 0) & (places < self.by_id.size)]
            return self.by_id[places]
        places = np.minimum(np.searchsorted(self.ids, rows), self.ids.size - 1)
        return np.where(self.ids[places] == rows, self.lists[places], np.int32(-1))


@dataclass(frozen=True, slots=True)
class Kept:
    """A filter made ready for one index: it may be used for any number of searches."""

    rows: RowIds  # rising
    selector: Any  # FAISS's
    counts: NDArray[np.int64] | None  # (lists,) kept rows in each list; None for an index without lists


def nearest_lists(
    away: NDArray[np.float32], counts: NDArray[np.int64], reach: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest lists (m, p) of each query that together hold `reach` kept rows, and their distances.

    `away` (m, lists) says how far the centres are, `counts` (lists,) the kept rows; `reach` 0 means every list
    that holds one. Where a query needs fewer than p lists, -1 fills its row.
    """
    have = np.flatnonzero(counts)
    order = have[np.argsort(away[:, have], axis=1)]
    if reach:
        held = np.cumsum(counts[order], axis=1)
        needed = np.minimum((held < reach).sum(axis=1) + 1, have.size)
    else:
        needed = np.full(away.shape[0], have.size)
    width = int(needed.max(initial=0))
    order = order[:, :width]
    distances = np.take_along_axis(away, order, axis=1)
    keys = np.where(np.arange(width) < needed[:, None], order, -1)
    return np.ascontiguousarray(keys, np.int64), np.ascontiguousarray(distances, np.float32)
