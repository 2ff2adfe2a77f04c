"""Nearest stored patches of given vectors, from whichever scan they are: rows of a table, in patient millimetres.

    vectors (m, d) ─ the index over what it covers, exactly over the rest ─▶ row ids ─▶ scan, subject, x_mm, y_mm, z_mm
                          └─ only rows that `where` (SQL) and `within` (a ball, a cuboid, a label) keep

Nothing is known of where the vectors come from: no chart is asked for, and no scan is left out. Patches that are stored
themselves are asked for in `pairs`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.errors import NotFound
from isimed_index.filters import Filters, charts_that_hold
from isimed_index.index.protocol import Hits
from isimed_index.index.search import LiveIndex
from isimed_index.places import Places
from isimed_index.space import apply_affine
from isimed_index.store.snapshot import Snapshot
from isimed_index.within import Within

if TYPE_CHECKING:
    import pyarrow as pa


class Neighbours:
    """Searches the patches that one encoder made in one pinned generation; keeps what it opened for the next search."""

    def __init__(self, snapshot: Snapshot, encoder: str | None = None) -> None:
        self.snapshot = snapshot
        self.card: EncoderCard = read_card(snapshot.encoder_path(encoder))

    @cached_property
    def places(self) -> Places:
        """Where the living patches are; `NotFound` where nothing is encoded yet."""
        found = [segment for segment in self.snapshot.segments(self.card.id) if segment.rows]
        if not found:
            raise NotFound(f"encoder {self.card.name!r} has encoded no scan of this store", next_step="isimed index")
        return Places(found)

    @cached_property
    def scans(self) -> list[str]:
        """Scan id by number of segment."""
        return [self.snapshot.scan_of[segment.scan_artefact] for segment in self.places.segments]

    @cached_property
    def subjects(self) -> list[str]:
        """Subject id by number of segment."""
        table = self.snapshot.table("scans").select(["scan", "subject"])
        subject_of = dict(zip(*table.to_pydict().values(), strict=True))
        return [subject_of[scan] for scan in self.scans]

    @cached_property
    def filters(self) -> Filters:
        """What `where` and `within` are evaluated by."""
        return Filters(self.snapshot, self.card, self.places, self.scans)

    @cached_property
    def index(self) -> LiveIndex:
        """Over all living rows; told by a `StoreWarning` where it is damaged, and exact then."""
        blocks = self.places.blocks(self.card.match_output)
        return LiveIndex.open(blocks, self.card.metric, self.snapshot.index_path(self.card.id))

    def common_mm(self) -> NDArray[np.float32]:
        """Centres (n, 3) of all living patches by rising row id, as nearly in one frame as is known.

        Canonical mm where the scan's chart holds; elsewhere RAS+ mm from the middle of the scan's patches.
        """
        charts = charts_that_hold(self.snapshot, self.card.id) or {}
        centres = np.empty((len(self.places), 3), np.float32)
        for number, scan in enumerate(self.scans):
            own = self.places.centres_of(number)
            common = apply_affine(charts[scan], own) if scan in charts else own - own.mean(axis=0)
            centres[self.places.rows(number)] = common
        return centres

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        where: str | None = None,
        within: Within | None = None,
        *,
        exact: bool = False,
    ) -> pa.Table:
        """The k nearest patches of each vector (m, d) among those that `where` and `within` keep.

        A vector (d,) is one query. Rows come query by query, the nearest first; fewer than k where fewer are kept.
        """
        asked = np.asarray(vectors)
        asked = asked[None] if asked.ndim == 1 else asked
        return self.table(self.index.search(asked, k, self.filters.rows(where, within), exact=exact))

    def table(self, hits: Hits) -> pa.Table:
        """Hits as rows, query by query: `query`, `patch`, `scan`, `subject`, `x_mm`, `y_mm`, `z_mm`, `distance`."""
        import pyarrow as pa

        found = hits.found
        patch = hits.row_ids[found]
        positions = self.places.positions(patch)
        owners = self.places.owners(positions)
        centres = self.places.centres_mm(positions, owners).astype(np.float64)
        scans, subjects, schema = self._columns
        place: list[NDArray[np.float64]] = [np.ascontiguousarray(centres[:, axis]) for axis in range(3)]
        taken = pa.array(owners)
        columns = [
            pa.array(np.repeat(np.arange(len(found)), found.sum(axis=1))),
            pa.array(patch),
            scans.take(taken),
            subjects.take(taken),
            *map(pa.array, place),
            pa.array(hits.distances[found]),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    @cached_property
    def _columns(self) -> tuple[pa.Array, pa.Array, pa.Schema]:
        """Scans and subjects by number of segment, and the schema of an answer."""
        import pyarrow as pa

        place = [(name, pa.float64()) for name in ("x_mm", "y_mm", "z_mm")]
        names = [("query", pa.int64()), ("patch", pa.int64()), ("scan", pa.string()), ("subject", pa.string())]
        schema = pa.schema([*names, *place, ("distance", pa.float32())])
        return pa.array(self.scans, pa.string()), pa.array(self.subjects, pa.string()), schema
