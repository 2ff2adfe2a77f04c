"""What an index is: queries and row ids in, the nearest rows out.

Row ids are the store's monotonic 64-bit numbers, never positions. A filter (`among`) lists the row ids that may be
returned: results always satisfy it, and hold k rows whenever k rows of the index satisfy it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.contracts import Metric as Metric
from isimed_index.errors import UsageError

Vectors: TypeAlias = NDArray[np.floating[Any]]  # (n, d), float16, float32 or float64, may be memory-mapped
RowIds: TypeAlias = NDArray[np.int64]
Block: TypeAlias = tuple[RowIds, Vectors]  # row ids (n,), strictly ascending, and their vectors (n, d)

NO_ROW = -1  # stands where fewer than k rows exist; its distance is infinite


@dataclass(frozen=True, slots=True)
class Hits:
    """The nearest rows of m queries, nearest first; ties are in the order of their row ids.

    Distances are Euclidean for the metric `l2`, and 1 - cosine for `cosine`. Where fewer than k rows exist,
    the row id is -1 and the distance infinite.
    """

    row_ids: RowIds  # (m, k)
    distances: NDArray[np.float32]  # (m, k)

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which places (m, k) hold a row."""
        mask: NDArray[np.bool_] = self.row_ids != NO_ROW
        return mask


class Index(Protocol):
    """Anything that finds the nearest rows."""

    def search(self, queries: ArrayLike, k: int, among: ArrayLike | None = None) -> Hits:
        """The k nearest rows of each query (m, d), only such rows as `among` lists (None: any row)."""
        ...


def checked_metric(metric: str) -> Metric:
    """Return `metric`, or raise `UsageError` when it is neither `l2` nor `cosine`."""
    if metric == "l2":
        return "l2"
    if metric == "cosine":
        return "cosine"
    raise UsageError(f"expected the metric l2 or cosine, found {metric!r}")


def checked_queries(queries: ArrayLike, k: int, dim: int | None) -> NDArray[np.float64]:
    """Return queries as (m, d) float64, or raise `UsageError` when they or `k` do not fit an index of `dim`."""
    asked = np.asarray(queries, dtype=np.float64)
    if asked.ndim != 2:
        raise UsageError(f"expected queries of shape (m, d), found {asked.shape}")
    if dim is not None and asked.shape[1] != dim:
        raise UsageError(f"expected queries of {dim} dimensions, found {asked.shape[1]}")
    if not np.isfinite(asked).all():
        raise UsageError("the queries hold NaN or infinite values")
    if k < 1:
        raise UsageError(f"expected k of at least 1, found {k}")
    return asked


def checked_rows(among: ArrayLike | None) -> RowIds | None:
    """Return the row ids of a filter sorted and without repeats; None stays None (no filter)."""
    if among is None:
        return None
    rows = np.asarray(among)
    if rows.size and not np.issubdtype(rows.dtype, np.integer):
        raise UsageError(f"expected row ids as integers, found {rows.dtype}")
    rows = rows.astype(np.int64, copy=False)
    ascending = rows.ndim == 1 and bool((rows[1:] > rows[:-1]).all())
    return rows if ascending else np.unique(rows)


def nothing(m: int, k: int) -> Hits:
    """Hits of m queries that found no row."""
    return Hits(np.full((m, k), NO_ROW, dtype=np.int64), np.full((m, k), np.inf, dtype=np.float32))


def select_nearest(m: int, k: int, numbers: NDArray[np.intp], row_ids: RowIds, distances: NDArray[np.float32]) -> Hits:
    """The k nearest of (query number, row id, distance) triples, each of shape (p,), for every one of m queries."""
    order = np.lexsort((row_ids, distances, numbers))
    order = order[row_ids[order] != NO_ROW]
    numbers = numbers[order]
    place = np.arange(numbers.size) - np.searchsorted(numbers, numbers)  # rank among the rows of the same query
    order, numbers, place = order[place < k], numbers[place < k], place[place < k]
    hits = nothing(m, k)
    hits.row_ids[numbers, place] = row_ids[order]
    hits.distances[numbers, place] = distances[order]
    return hits


def merge(parts: Iterable[Hits], k: int) -> Hits:
    """The k nearest rows of several hits over disjoint rows for the same queries."""
    several = list(parts)
    row_ids = np.concatenate([hits.row_ids for hits in several], axis=1)
    distances = np.concatenate([hits.distances for hits in several], axis=1)
    numbers = np.repeat(np.arange(row_ids.shape[0]), row_ids.shape[1])
    return select_nearest(row_ids.shape[0], k, numbers, row_ids.ravel(), distances.ravel())
