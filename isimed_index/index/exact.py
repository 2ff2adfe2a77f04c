"""Exact search over blocks of vectors: blockwise matrix products find candidates, double precision ranks them.

A float32 product |q|² + |v|² - 2 q·v cancels badly between near rows, so it only sieves: every row whose product
could, within its rounding error, belong to the k nearest is measured again as a float64 difference. The answer is
therefore that of brute force in double precision, at the cost of one float32 matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import UsageError
from isimed_index.index.halves import single
from isimed_index.index.protocol import (
    Block,
    Hits,
    Metric,
    RowIds,
    Vectors,
    checked_metric,
    checked_queries,
    checked_rows,
    merge,
    nothing,
    select_nearest,
)

Float = TypeVar("Float", bound=np.floating[Any])

_QUERIES_AT_ONCE = 512
_FLOATS_AT_ONCE = 1 << 20  # 4 MiB of float32, the most that one temporary array holds: more leave the caches
_DOUBLES_AT_ONCE = 1 << 18  # 2 MiB, which a core's cache holds: more took twice as long
_SHORT = 1e-12  # vectors of at least this length are divided by it only after the product
_ROWS_WORTH_A_BLOCK = 8  # rows of one block from which on they are gathered together
_CROWD = 8  # a sieve that keeps more than this many times k rows a query is drawn tighter


class ExactIndex:
    """Exact search in bounded memory over (row ids, vectors) blocks; vectors may be memory-mapped and float16.

    Row ids ascend strictly within a block, and blocks do not overlap (`UsageError` otherwise).
    """

    def __init__(self, blocks: Sequence[Block], metric: Metric) -> None:
        self.metric = checked_metric(metric)
        self.blocks = _checked_blocks(blocks)
        self._first_ids = np.array([row_ids[0] for row_ids, _ in self.blocks], dtype=np.int64)
        self._sizes = np.array([row_ids.size for row_ids, _ in self.blocks], dtype=np.int64)
        self._last_ids = np.array([row_ids[-1] for row_ids, _ in self.blocks], dtype=np.int64)
        self._gaps = self._last_ids - self._first_ids + 1 != self._sizes
        self._plain = [np.asarray(vectors) for _, vectors in self.blocks]  # without np.memmap's slow way of indexing

    def __len__(self) -> int:
        return sum(row_ids.size for row_ids, _ in self.blocks)

    @property
    def dim(self) -> int | None:
        """Dimensions of the vectors; None when there is no row."""
        return int(self.blocks[0][1].shape[1]) if self.blocks else None

    def count(self, among: RowIds | None) -> int:
        """How many rows of this index a filter (sorted, unique row ids) keeps."""
        return len(self) if among is None else sum(places.size for _, places in self._kept(among))

    def vectors(self, row_ids: ArrayLike) -> NDArray[np.float32]:
        """The vectors (n, d) of sorted row ids without repeats, all of which must be rows of this index."""
        wanted = checked_rows(row_ids)
        found = [single(vectors) for _, vectors in self.pieces(wanted)]
        return np.concatenate(found) if found else np.empty((0, self.dim or 0), dtype=np.float32)

    def pieces(self, among: RowIds | None, rows_at_once: int | None = None) -> Iterator[Block]:
        """Row ids and vectors of all rows that `among` (sorted, unique) keeps, in bounded pieces, in row order."""
        step = rows_at_once or max(1, _FLOATS_AT_ONCE // max(self.dim or 1, 1))
        if among is None:
            for (row_ids, _), vectors in zip(self.blocks, self._plain, strict=True):
                for start in range(0, row_ids.size, step):
                    yield row_ids[start : start + step], vectors[start : start + step]
            return
        if among.size < _ROWS_WORTH_A_BLOCK * len(self.blocks):
            blocks, places = self._whereabouts(among)
            there = blocks >= 0
            row_ids, blocks, places = among[there], blocks[there], places[there]
            for start in range(0, row_ids.size, step):
                some = slice(start, start + step)
                yield row_ids[some], self._gather(blocks[some], places[some])
            return
        for number, places in self._kept(among):
            for start in range(0, places.size, step):
                taken = _as_slice(places[start : start + step])
                yield self.blocks[number][0][taken], self._plain[number][taken]

    def _kept(self, among: RowIds) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Of the blocks that hold rows of `among` (sorted, unique): number, and the places of these, rising."""
        lows = np.searchsorted(among, self._first_ids)
        highs = np.searchsorted(among, self._last_ids, side="right")
        for number in np.flatnonzero(highs > lows).tolist():
            wanted = among[lows[number] : highs[number]]
            if not self._gaps[number]:
                yield number, wanted - self._first_ids[number]
                continue
            row_ids = self.blocks[number][0]
            places = np.searchsorted(row_ids, wanted)
            places = places[row_ids[places] == wanted]
            if places.size:
                yield number, places

    def search(self, queries: ArrayLike, k: int, among: ArrayLike | None = None) -> Hits:
        """The k nearest rows of each query (m, d) among the rows that `among` lists."""
        asked = checked_queries(queries, k, self.dim)
        rows = checked_rows(among)
        hits = nothing(asked.shape[0], k)
        for start in range(0, asked.shape[0], _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            part = self._search_some(asked[some], k, rows)
            hits.row_ids[some], hits.distances[some] = part.row_ids, part.distances
        return hits

    def rerank(self, queries: ArrayLike, hits: Hits, k: int) -> Hits:
        """The k nearest of the rows in `hits`, by exact distances; rows that are not in this index fall out.

        `hits` come from a search for the same queries, name no row twice, and are usually more than k wide.
        """
        asked = checked_queries(queries, k, self.dim)
        numbers, columns = np.nonzero(hits.found)
        wanted = hits.row_ids[numbers, columns]
        blocks, places = self._whereabouts(wanted)
        there = blocks >= 0
        if not there.all():
            numbers, wanted, blocks, places = numbers[there], wanted[there], blocks[there], places[there]
        distances = np.empty(wanted.size, dtype=np.float32)
        step = max(1, _FLOATS_AT_ONCE // max(asked.shape[1], 1))
        for start in range(0, wanted.size, step):
            some = slice(start, start + step)
            found = self._gather(blocks[some], places[some])
            distances[some] = _distances(asked, numbers[some], found, self.metric)
        return select_nearest(asked.shape[0], k, numbers, wanted, distances)

    def _whereabouts(self, wanted: RowIds) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The block of each row, -1 where there is none, and its place in the block."""
        blocks = np.searchsorted(self._first_ids, wanted, side="right") - 1
        places = wanted - self._first_ids[blocks] if self.blocks else np.zeros_like(wanted)
        gaps = self._gaps[blocks] if self.blocks else np.zeros(wanted.size, dtype=bool)
        mine = np.flatnonzero(gaps & (blocks >= 0))
        if mine.size:
            row_ids, before = self._with_gaps
            found = np.searchsorted(row_ids, wanted[mine])
            there = row_ids[np.minimum(found, row_ids.size - 1)] == wanted[mine]
            owners = blocks[mine]
            places[mine] = np.where(there, found - before[owners], self._sizes[owners])
        if self.blocks:
            blocks = np.where(places < self._sizes[blocks], blocks, -1)
        return blocks, places

    @cached_property
    def _with_gaps(self) -> tuple[RowIds, NDArray[np.int64]]:
        """The row ids of all blocks that have gaps, rising, and by block how many of them stand before it."""
        row_ids = np.concatenate([row_ids for (row_ids, _), gap in zip(self.blocks, self._gaps, strict=True) if gap])
        sizes = np.where(self._gaps, self._sizes, 0)
        return row_ids, np.cumsum(sizes) - sizes

    def _gather(self, blocks: NDArray[np.intp], places: NDArray[np.intp]) -> Vectors:
        """Vectors (p, d) from several blocks, as they are stored."""
        order = np.lexsort((places, blocks))  # rows that lie near each other are read together
        owners, starts = np.unique(blocks[order], return_index=True)
        if owners.size * _ROWS_WORTH_A_BLOCK > blocks.size:  # few rows of many scans: a loop over rows is quicker
            rows = zip(blocks.tolist(), places.tolist(), strict=True)
            return np.stack([self._plain[block][place] for block, place in rows])
        kinds = {self._plain[block].dtype for block in owners.tolist()}
        found: Vectors = np.empty((blocks.size, self.dim or 0), np.result_type(*kinds))
        for block, mine in zip(owners.tolist(), np.split(order, starts[1:]), strict=True):
            found[mine] = self._plain[block][places[mine]]
        return found

    def _search_some(self, queries: NDArray[np.float64], k: int, rows: RowIds | None) -> Hits:
        best = nothing(queries.shape[0], k)
        step = max(1, _FLOATS_AT_ONCE // max(queries.shape))
        for row_ids, vectors in _joined(self.pieces(rows, step), step):
            block = single(vectors)
            numbers, places = _sieve(queries, block, best.distances[:, -1], k, self.metric)
            distances = _pair_distances(queries, vectors, numbers, places, self.metric)
            best = merge([best, select_nearest(queries.shape[0], k, numbers, row_ids[places], distances)], k)
        return best


def _joined(pieces: Iterable[Block], rows_at_once: int) -> Iterator[Block]:
    """The same rows in fewer pieces, of up to `rows_at_once`: a filter often keeps few rows of each scan."""
    waiting: list[Block] = []
    rows = 0
    for row_ids, vectors in pieces:
        if waiting and rows + row_ids.size > rows_at_once:
            yield _as_one(waiting)
            waiting, rows = [], 0
        waiting.append((row_ids, vectors))
        rows += row_ids.size
    if waiting:
        yield _as_one(waiting)


def _as_one(pieces: list[Block]) -> Block:
    if len(pieces) == 1:
        return pieces[0]
    kind = np.promote_types(np.result_type(*(vectors.dtype for _, vectors in pieces)), np.float32)
    vectors = np.concatenate([vectors for _, vectors in pieces], dtype=kind, casting="same_kind")
    return np.concatenate([row_ids for row_ids, _ in pieces]), vectors


def _sieve(
    queries: NDArray[np.float64], block: NDArray[np.float32], reach: NDArray[np.float32], k: int, metric: Metric
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Query numbers and places in `block` of all pairs that may be among the k nearest.

    `reach` (m,) is the distance of the k-th row found so far, infinite while there are fewer.
    """
    limit = np.square(reach.astype(np.float64)) if metric == "l2" else reach.astype(np.float64)
    score, slack = _scores(queries, block, metric)
    close = score <= (limit + slack)[:, None]
    if k < block.shape[0] and np.count_nonzero(close) > _CROWD * k * queries.shape[0]:
        kth = np.partition(score, k - 1, axis=1)[:, k - 1]
        close = score <= np.fmin(limit + slack, kth + 2 * slack)[:, None]
    numbers, places = np.nonzero(close)
    return numbers, places


def _scores(
    queries: NDArray[np.float64], block: NDArray[np.float32], metric: Metric
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Squared L2 distance, or 1 - cosine, (m, n) in float32, and a bound (m,) of its rounding error.

    The bound is that of a dot product of d terms, d u |q||v| (Higham, Accuracy and Stability, §3.1), with u doubled
    and eight terms added for the sums around it and for the rounding of inputs and results to float32.
    """
    error = (block.shape[1] + 8) * float(np.finfo(np.float32).eps)
    if metric == "cosine":
        score: NDArray[np.float32] = unit_length(queries).astype(np.float32) @ block.T
        length = np.sqrt(np.einsum("nd,nd->n", block, block))
        if length.size and length.min() > _SHORT and length.max() < 1 / _SHORT:
            score /= length
        else:  # squares may have underflowed, or there are vectors of zeros
            score = unit_length(queries).astype(np.float32) @ unit_length(block).T
        return np.subtract(1, score, out=score), np.full(queries.shape[0], 2 * error)
    asked = queries.astype(np.float32)
    norms = np.einsum("nd,nd->n", block, block)  # (n,)
    score = asked @ block.T
    score *= -2
    score += norms
    score += np.einsum("md,md->m", asked, asked)[:, None]
    longest = np.sqrt(norms.max(initial=0.0), dtype=np.float64)
    return score, error * (np.square(np.linalg.norm(queries, axis=1) + longest) + np.finfo(np.float32).tiny)


def _pair_distances(
    queries: NDArray[np.float64], vectors: Vectors, numbers: NDArray[np.intp], places: NDArray[np.intp], metric: Metric
) -> NDArray[np.float32]:
    """Distances (p,) between queries[numbers] and vectors[places], computed in float64."""
    distances = np.empty(numbers.size, dtype=np.float32)
    step = max(1, _FLOATS_AT_ONCE // max(queries.shape[1], 1))
    for start in range(0, numbers.size, step):
        some = slice(start, start + step)
        distances[some] = _distances(queries, numbers[some], vectors[places[some]], metric)
    return distances


def _distances(
    queries: NDArray[np.float64], numbers: NDArray[np.intp], found: Vectors, metric: Metric
) -> NDArray[np.float32]:
    """Distances (p,) between queries[numbers] and `found` (p, d), computed in float64."""
    asked = unit_length(queries) if metric == "cosine" else queries
    distances = np.empty(numbers.size, dtype=np.float32)
    step = max(1, _DOUBLES_AT_ONCE // max(queries.shape[1], 1))
    for start in range(0, numbers.size, step):
        some = slice(start, start + step)
        near = found[some].astype(np.float64)
        if metric == "cosine":
            distances[some] = np.maximum(1 - np.vecdot(asked[numbers[some]], unit_length(near)), 0)
        else:
            near -= asked[numbers[some]]
            distances[some] = np.sqrt(np.vecdot(near, near))
    return distances


def unit_length(vectors: NDArray[Float]) -> NDArray[Float]:
    """Vectors (n, d) scaled to length 1; a zero vector stays zero and so has cosine 0 with everything."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    scaled: NDArray[Float] = np.zeros_like(vectors)
    np.divide(vectors, largest, out=scaled, where=largest > 0)  # so that no square underflows
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    np.divide(scaled, length, out=scaled, where=length > 0)
    return scaled


def _as_slice(places: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """Ascending positions as a slice where they have no gaps, so that taking them copies nothing."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == places.size else places


def _checked_blocks(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that hold rows, in the order of their row ids."""
    checked = []
    for row_ids, vectors in blocks:
        if vectors.ndim != 2 or row_ids.shape != vectors.shape[:1]:
            raise UsageError(f"expected vectors (n, d) and row ids (n,), found {vectors.shape} and {row_ids.shape}")
        if row_ids.size == 0:
            continue
        if (np.diff(row_ids) <= 0).any() or row_ids[0] < 0:
            raise UsageError("expected row ids that ascend strictly within a block, from 0 or above")
        checked.append((row_ids.astype(np.int64, copy=False), vectors))
    checked.sort(key=lambda block: int(block[0][0]))
    for (before, _), (after, _) in pairwise(checked):
        if before[-1] >= after[0]:
            raise UsageError(f"two blocks overlap: one ends with row {before[-1]}, the next begins with row {after[0]}")
    if len(dims := {vectors.shape[1] for _, vectors in checked}) > 1:
        raise UsageError(f"expected one dimension for all blocks, found {sorted(dims)}")
    return checked
