"""Recall@10 of an index, measured against exact search on stored rows that ask for their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from isimed_index.index.exact import ExactIndex
from isimed_index.index.protocol import NO_ROW, Index, RowIds

AT = 10
_TIES = 16  # rows as near as the 10th neighbour that are known by name, for `by_depth`
SURE = 0.95  # the confidence of a bound, which stands alone


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
    near: RowIds  # (m, t) the neighbours and what is as near as the last of them, itself not, -1 behind

    @classmethod
    def prepare(cls, exact: ExactIndex, held_out: RowIds, among: RowIds | None = None) -> RecallTest:
        """Find the truth for the rows `held_out` (sorted, of `exact`) by exact search."""
        queries = exact.vectors(held_out)
        itself = np.ones(held_out.size, dtype=bool) if among is None else np.isin(held_out, among)
        wanted = np.minimum(AT, exact.count(among) - itself)
        truth = exact.search(queries, AT + 1 + _TIES, among)
        last = np.maximum(wanted - 1 + itself, 0)
        farthest = truth.distances[np.arange(held_out.size), last]
        near = (truth.distances <= farthest[:, None]) & (truth.row_ids != held_out[:, None])
        return cls(queries, among, itself, wanted, farthest, np.where(near, truth.row_ids, NO_ROW))

    def of_each(self, index: Index) -> NDArray[np.float64]:
        """Recall@10 (0 to 1) of each query that has something to find, by an index with true distances."""
        found = index.search(self.queries, AT + 1, self.among)
        near = (found.found & (found.distances <= self.farthest[:, None])).sum(axis=1) - self.itself
        return self._shares(np.clip(near, 0, self.wanted))

    def recall(self, index: Index) -> float:
        """Mean recall@10 (0 to 1) of an index with true distances; 1 where there is nothing to find."""
        shares = self.of_each(index)
        return float(shares.mean()) if shares.size else 1.0

    def by_depth(self, row_ids: RowIds, depths: Sequence[int]) -> list[NDArray[np.float64]]:
        """Recall@10 of each query if only the first rows of `row_ids` (m, f) are ranked again, for each of `depths`."""
        there = (row_ids[:, :, None] == self.near[:, None, :]).any(axis=2) & (row_ids != NO_ROW)
        held = np.cumsum(there, axis=1)
        return [self._shares(np.minimum(held[:, min(depth, held.shape[1]) - 1], self.wanted)) for depth in depths]

    def _shares(self, found: NDArray[np.intp]) -> NDArray[np.float64]:
        asked = self.wanted > 0
        shares: NDArray[np.float64] = found[asked] / self.wanted[asked]
        return shares


def at_least(shares: NDArray[np.float64], confidence: float = SURE) -> float:
    """What the mean recall of all possible queries is above, with this confidence (normal approximation)."""
    if shares.size < 2:
        return float(shares.mean()) if shares.size else 1.0
    return float(shares.mean() - NormalDist().inv_cdf(confidence) * shares.std(ddof=1) / np.sqrt(shares.size))


def at_most(shares: NDArray[np.float64], confidence: float = SURE) -> float:
    """What the mean recall of all possible queries is below, with this confidence."""
    return 2 * float(shares.mean()) - at_least(shares, confidence) if shares.size else 1.0
