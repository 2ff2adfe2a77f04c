"""Search over the rows that live now: FAISS where it covers them, exact search for the rest, true distances for all.

    covered rows ── FAISS, more than k ── ranked again by the stored vectors ──┐
    fresh tail ───── exact ────────────────────────────────────────────────────┴─ merged ── short? exact

A filter that keeps few rows is answered exactly at once. A missing or damaged index costs time, never an answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from isimed_index.errors import EncoderMismatch, Incompatible, MissingExtra, StoreDamaged, StoreWarning
from isimed_index.index.card import IndexCard, covered
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.protocol import Block, Hits, Metric, RowIds, checked_queries, checked_rows, merge

_FETCH = 4  # times k rows are taken from FAISS and ranked by the stored vectors
_FETCH_MORE = 32  # and at least this many beyond k
_ALWAYS_EXACT = 5_000  # a filter that keeps this many rows or fewer is answered exactly,
_EXACT_SHARE = 0.05  # and so is one that keeps less than this share of all rows


class LiveIndex:
    """The `Index` of a store's live rows.

    `blocks` are the vectors of all live rows; `index` may cover a part of them, and may hold rows that live no more.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        metric: Metric,
        index: FaissIndex | None = None,
        row_ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.metric = metric
        self.exact = ExactIndex(blocks, metric)
        self._index = index
        alive = [(row_ids, covered(row_ids, row_ranges if index else ())) for row_ids, _ in self.exact.blocks]
        self._covered = _joined([ours for _, ours in alive])
        self._tail = _joined([np.setdiff1d(row_ids, ours, assume_unique=True) for row_ids, ours in alive])
        self._dead = index is not None and len(index) != self._covered.size

    @classmethod
    def open(cls, blocks: Sequence[Block], metric: Metric, directory: Path | None) -> LiveIndex:
        """Open the index that lies in `directory` over `blocks`; None means that there is none.

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
        return cls(blocks, metric, index, card.row_ranges)

    def __len__(self) -> int:
        return len(self.exact)

    def search(self, queries: ArrayLike, k: int, among: ArrayLike | None = None, *, exact: bool = False) -> Hits:
        """The k nearest live rows of each query (m, d) among the rows that `among` lists; `exact` leaves FAISS out."""
        rows = checked_rows(among)
        if exact or self._index is None or self._few(rows):
            return self.exact.search(queries, k, rows)
        asked = checked_queries(queries, k, self.exact.dim)
        fetch = max(_FETCH * k, k + _FETCH_MORE)
        allowed = self._covered if rows is None and self._dead else rows
        rough = self._index.search(asked, fetch, allowed)
        parts = [self.exact.rerank(asked, _only(rough, rows), k)]
        if self._tail.size:
            tail = self._tail if rows is None else np.intersect1d(self._tail, rows, assume_unique=True)
            parts.append(self.exact.search(asked, k, tail))
        hits = merge(parts, k)
        short = np.flatnonzero(hits.found.sum(axis=1) < min(k, self.exact.count(rows)))
        if short.size:
            again = self.exact.search(asked[short], k, rows)
            hits.row_ids[short], hits.distances[short] = again.row_ids, again.distances
        return hits

    def _few(self, rows: RowIds | None) -> bool:
        return rows is not None and rows.size <= max(_ALWAYS_EXACT, _EXACT_SHARE * len(self))


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
    kept = np.isin(hits.row_ids, rows)
    return Hits(np.where(kept, hits.row_ids, -1), np.where(kept, hits.distances, np.float32(np.inf)))


def _joined(parts: Sequence[RowIds]) -> RowIds:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
