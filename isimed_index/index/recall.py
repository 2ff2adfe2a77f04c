"""Recall@10 of an index, measured against exact search on stored rows that ask for their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isimed_index.index.exact import ExactIndex
from isimed_index.index.protocol import Index, RowIds

AT = 10


@dataclass(frozen=True, slots=True)
class RecallTest:
    """Queries whose true neighbours are known.

    A neighbour counts as found when it is no farther than the 10th true one, so that equal distances cost nothing.
    That a row finds itself does not count.
    """

    queries: NDArray[np.float32]  # (m, d)
    among: RowIds | None  # the filter that they are asked under
    itself: NDArray[np.bool_]  # (m,) whether the filter lets a query find its own row
    wanted: NDArray[np.intp]  # (m,) neighbours to be found: 10, or all where there are fewer
    farthest: NDArray[np.float32]  # (m,) distance of the last of them

    @classmethod
    def prepare(cls, exact: ExactIndex, held_out: RowIds, among: RowIds | None = None) -> RecallTest:
        """Find the truth for the rows `held_out` (sorted, of `exact`) by exact search."""
        queries = exact.vectors(held_out)
        itself = np.ones(held_out.size, dtype=bool) if among is None else np.isin(held_out, among)
        wanted = np.minimum(AT, exact.count(among) - itself)
        distances = exact.search(queries, AT + 1, among).distances
        last = np.maximum(wanted - 1 + itself, 0)
        return cls(queries, among, itself, wanted, distances[np.arange(held_out.size), last])

    def recall(self, index: Index) -> float:
        """Recall@10 (0 to 1) of an index with true distances; 1 where there is nothing to find."""
        if not (asked := self.wanted > 0).any():
            return 1.0
        found = index.search(self.queries, AT + 1, self.among)
        near = (found.found & (found.distances <= self.farthest[:, None])).sum(axis=1) - self.itself
        return float(np.mean(np.clip(near, 0, self.wanted)[asked] / self.wanted[asked]))
