"""Search over the rows that live now: FAISS where it covers them, exact search for the rest, true distances for all.

    covered rows ── FAISS, more than k ── ranked again by the stored vectors ──┐
    fresh tail ───── exact ────────────────────────────────────────────────────┴─ merged ── short? exact

Under a filter the exact way is taken where it is cheaper, by costs that were measured when the index was built. A
missing or damaged index costs time, never an answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import EncoderMismatch, Incompatible, MissingExtra, StoreDamaged, StoreWarning
from isimed_index.index.card import IndexCard, covered, row_ranges
from isimed_index.index.costs import UNKNOWN, Costs
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.lists import Kept
from isimed_index.index.protocol import (
    NO_ROW,
    Block,
    Hits,
    Metric,
    RowIds,
    checked_queries,
    checked_rows,
    merge,
    nothing,
)

_ROWS_AT_ONCE = 1 << 21  # rows that are ranked again, of several queries


class LiveIndex:
    """The `Index` of a store's live rows.

    `blocks` are the vectors of all live rows; `index` may cover a part of them, and may hold rows that live no more.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        metric: Metric,
        index: FaissIndex | None = None,
        ranges: Sequence[tuple[int, int]] = (),
        costs: Costs = UNKNOWN,
    ) -> None:
        self.metric = metric
        self.exact = ExactIndex(blocks, metric)
        self.costs = costs
        self._index = index
        bounds = np.array(ranges if index else (), dtype=np.int64)
        alive = [(row_ids, covered(row_ids, bounds)) for row_ids, _ in self.exact.blocks]
        self._covered = _joined([ours for _, ours in alive])
        self._tail = _joined([np.setdiff1d(row_ids, ours, assume_unique=True) for row_ids, ours in alive])
        self._dead = index is not None and len(index) != self._covered.size
        self._last_kept: Kept | None = None

    @classmethod
    def open(cls, blocks: Sequence[Block], metric: Metric, directory: Path | None) -> LiveIndex:
        """Open the index that lies in `directory`, which a snapshot gave, over `blocks`; None means that there is none.

        An index that is missing, damaged, of another format or of other vectors, and a missing FAISS, are told by a
        `StoreWarning`, and every search is exact.
        """
        if directory is None:
            return cls(blocks, metric)
        try:
            card = IndexCard.read(directory)
            dims = {vectors.shape[1] for row_ids, vectors in blocks if row_ids.size}
            if card.metric != metric or not dims <= {card.dim}:
                raise EncoderMismatch(
                    f"the index holds {card.dim}-d vectors under {card.metric}, expected {sorted(dims)} under {metric}",
                    next_step="run isimed index again",
                )
            index = FaissIndex.load(directory, card.metric, card.recipe, card.sha256)
        except (StoreDamaged, Incompatible, MissingExtra) as error:
            warnings.warn(StoreWarning(f"{error}; searching exactly. Next: {error.next_step}"), stacklevel=2)
            return cls(blocks, metric)
        return cls(blocks, metric, index, card.row_ranges, card.costs)

    @property
    def index(self) -> FaissIndex | None:
        """What answers for the rows that it covers; None where every search is exact."""
        return self._index

    def __len__(self) -> int:
        return len(self.exact)

    def search(self, queries: ArrayLike, k: int, among: ArrayLike | None = None, *, exact: bool = False) -> Hits:
        """The k nearest live rows of each query (m, d) among the rows that `among` lists; `exact` leaves FAISS out."""
        rows = checked_rows(among)
        asked = checked_queries(queries, k, self.exact.dim)
        if exact or self._index is None or self._exactly(rows, asked.shape[0]):
            return self.exact.search(asked, k, rows)
        hits = self._by_index(self._index, asked, k, rows)
        if self._tail.size:
            tail = self._tail if rows is None else np.intersect1d(self._tail, rows, assume_unique=True)
            hits = merge([hits, self.exact.search(asked, k, tail)], k)
        short = np.flatnonzero(hits.row_ids[:, -1] == NO_ROW)
        if short.size and self.exact.count(rows) > hits.found[short].sum(axis=1).min():
            again = self.exact.search(asked[short], k, rows)
            hits.row_ids[short], hits.distances[short] = again.row_ids, again.distances
        return hits

    def _by_index(self, index: FaissIndex, asked: NDArray[np.float64], k: int, rows: RowIds | None) -> Hits:
        """The nearest of the rows that the index covers, ranked by the stored vectors; some queries at a time."""
        allowed = self._allowed(rows)
        kept = self._kept(index, allowed) if isinstance(allowed, np.ndarray) and allowed.size else allowed
        fetch = min(index.recipe.rows_fetched(k, filtered=kept is not None), max(k, len(index)))
        step = max(1, _ROWS_AT_ONCE // fetch)
        parts = []
        for start in range(0, asked.shape[0], step):
            some = asked[start : start + step]
            rough = index.search(some, fetch, kept, enough=k)
            parts.append(self.exact.rerank(some, _only(rough, rows), k))
        if len(parts) == 1:
            return parts[0]
        empty = [nothing(0, k)]
        return Hits(
            *(np.concatenate([getattr(part, name) for part in empty + parts]) for name in ("row_ids", "distances"))
        )

    def _kept(self, index: FaissIndex, allowed: RowIds) -> Kept:
        """A filter made ready for the index; that of the last search is kept, as many questions share one.

        Rows that were changed in place since would be of the filter of before: answers are checked by `_only`.
        """
        last = self._last_kept
        if last is None or last.rows is not allowed:
            self._last_kept = last = index.keep(allowed)
        return last

    def _exactly(self, rows: RowIds | None, queries: int) -> bool:
        return rows is not None and self.costs.exact_is_cheaper(rows.size, queries)

    def _allowed(self, rows: RowIds | None) -> RowIds | Kept | None:
        """What FAISS may return: rows that live no more would take the place of others."""
        if not self._dead:
            return rows
        return self._alive if rows is None else covered(rows, self._alive_ranges)

    @cached_property
    def _alive(self) -> Kept | None:
        return self._index.keep(self._covered) if self._index and self._covered.size else None

    @cached_property
    def _alive_ranges(self) -> tuple[tuple[int, int], ...]:
        return row_ranges([self._covered])


def search(
    blocks: Sequence[Block],
    metric: Metric,
    directory: Path | None,
    queries: ArrayLike,
    k: int,
    among: ArrayLike | None = None,
    *,
    exact: bool = False,
) -> Hits:
    """Open and search once; keep a `LiveIndex` for more than one search. `exact` does not open the index at all."""
    index = LiveIndex.open(blocks, metric, None if exact else directory)
    return index.search(queries, k, among, exact=exact)


def _only(hits: Hits, rows: RowIds | None) -> Hits:
    """The hits that a filter keeps, checked again whatever the index did with it."""
    if rows is None:
        return hits
    places = np.minimum(np.searchsorted(rows, hits.row_ids), rows.size - 1)
    kept = rows[places] == hits.row_ids if rows.size else np.zeros(hits.row_ids.shape, dtype=bool)
    return Hits(np.where(kept, hits.row_ids, NO_ROW), np.where(kept, hits.distances, np.float32(np.inf)))


def _joined(parts: Sequence[RowIds]) -> RowIds:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
