"""Stored patches as questions: their nearest patches in other scans, of a few or of a whole store, in bounded memory.

    patches of one scan ─ their stored vectors ─▶ rows of all scans but it (and its subject's) ─▶ `Neighbours` ─▶ rows

The own scan never answers: the patches beside a patch overlap it, and would be all that is found. A scan's patches are
asked together, as they have the same rows to be answered from. Why this is no Dask graph: decision 0026.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import ArrayLike

from isimed_index.errors import NotFound, UsageError
from isimed_index.index.protocol import Hits, RowIds, nothing
from isimed_index.matches import SameSubject
from isimed_index.neighbours import Neighbours
from isimed_index.within import Within

if TYPE_CHECKING:
    import pyarrow as pa

QUERIES_AT_ONCE = 1024  # of one table of a stream


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many answers a patch gets, and of which patches."""

    k: int = 10
    where: str | None = None
    within: Within | None = None
    same_subject: SameSubject = "exclude"
    exact: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"expected k of at least 1, found {self.k}")
        if self.same_subject not in get_args(SameSubject):
            raise UsageError(f"expected same_subject include, exclude or only, found {self.same_subject!r}")


def like(neighbours: Neighbours, patches: ArrayLike, wanted: Wanted) -> pa.Table:
    """The nearest patches in other scans of each of some stored patches, in the order that these are given in."""
    asked = _checked(neighbours, patches)
    owners = neighbours.places.owners(neighbours.places.positions(asked))
    hits = nothing(len(asked), wanted.k)
    kept = neighbours.filters.rows(wanted.where, wanted.within)
    for number in np.unique(owners).tolist():
        mine = np.flatnonzero(owners == number)
        found = _search(neighbours, asked[mine], _others(neighbours, number, wanted, kept), wanted)
        hits.row_ids[mine], hits.distances[mine] = found.row_ids, found.distances
    return _table(neighbours, asked, hits)


def stream(neighbours: Neighbours, of: str | None, wanted: Wanted) -> Iterator[pa.Table]:
    """What `like` gives of all patches that the SQL condition `of` keeps, by rising id, in tables of bounded size."""
    chosen = neighbours.filters.rows(of)
    kept = neighbours.filters.rows(wanted.where, wanted.within)
    for number in range(len(neighbours.scans)):
        asked = neighbours.places.ids_of(number)
        if chosen is not None:
            asked = np.intersect1d(asked, chosen, assume_unique=True)
        if not asked.size:
            continue
        among = _others(neighbours, number, wanted, kept)
        for start in range(0, len(asked), QUERIES_AT_ONCE):
            some = asked[start : start + QUERIES_AT_ONCE]
            yield _table(neighbours, some, _search(neighbours, some, among, wanted))


def _checked(neighbours: Neighbours, patches: ArrayLike) -> RowIds:
    asked = np.atleast_1d(np.asarray(patches))
    if asked.ndim != 1 or (asked.size and not np.issubdtype(asked.dtype, np.integer)):
        raise UsageError(f"expected patches as whole numbers (m,), found {asked.dtype} of shape {asked.shape}")
    asked = asked.astype(np.int64)
    unknown = asked[~np.isin(asked, neighbours.places.row_ids)]
    if unknown.size:
        raise NotFound(
            f"patch {unknown[0]} is not in the store, or not of encoder {neighbours.card.name!r}",
            next_step="isimed sql 'SELECT patch, scan FROM patches LIMIT 10'",
        )
    return asked


def _search(neighbours: Neighbours, asked: RowIds, among: RowIds, wanted: Wanted) -> Hits:
    """The hits of some patches of one segment."""
    rows, back = np.unique(asked, return_inverse=True)
    vectors = neighbours.index.exact.vectors(rows)[back]
    return neighbours.index.search(vectors, wanted.k, among, exact=wanted.exact)


def _others(neighbours: Neighbours, number: int, wanted: Wanted, kept: RowIds | None) -> RowIds:
    """Row ids that may answer a patch of one segment: of those `kept`, or of all."""
    places, subjects = neighbours.places, neighbours.subjects
    same = np.array([subject == subjects[number] for subject in subjects])
    allowed = {"include": np.ones(len(same), bool), "exclude": ~same, "only": same}[wanted.same_subject]
    allowed[number] = False
    others = places.row_ids[np.repeat(allowed, np.diff(places.starts))]
    return others if kept is None else np.intersect1d(others, kept, assume_unique=True)


def _table(neighbours: Neighbours, asked: RowIds, hits: Hits) -> pa.Table:
    """Hits as rows, with `from_patch` and `from_scan` instead of the number of a query."""
    import pyarrow as pa

    table = neighbours.table(hits)
    patch = asked[table.column("query").to_numpy()]
    owners = neighbours.places.owners(neighbours.places.positions(patch))
    scans = pa.array(neighbours.scans, pa.string()).take(pa.array(owners))
    rest = table.drop_columns(["query"])
    return rest.add_column(0, "from_patch", pa.array(patch)).add_column(1, "from_scan", scans)
