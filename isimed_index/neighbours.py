"""Nearest stored patches of given vectors, from whichever scan they are: rows of a table, in patient millimetres.

    vectors (m, d) ─ the index over what it covers, exactly over the rest ─▶ row ids ─▶ scan, subject, x_mm, y_mm, z_mm

Nothing is known of where the vectors come from: no chart is asked for, and no scan is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.errors import NotFound
from isimed_index.index.protocol import Hits, RowIds
from isimed_index.index.search import LiveIndex
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

_PLACE = ("x_mm", "y_mm", "z_mm")


class Neighbours:
    """Searches the patches that one encoder made in one pinned generation; keeps the open index for the next search."""

    def __init__(self, snapshot: Snapshot, encoder: str | None = None) -> None:
        self.snapshot = snapshot
        self.card: EncoderCard = read_card(snapshot.encoder_path(encoder))

    @cached_property
    def segments(self) -> list[Segment]:
        """Those with living patches, by rising row id; `NotFound` where nothing is encoded yet."""
        found = [segment for segment in self.snapshot.segments(self.card.id) if segment.rows]
        if not found:
            raise NotFound(f"encoder {self.card.name!r} has encoded no scan of this store", next_step="isimed index")
        return found

    @cached_property
    def index(self) -> LiveIndex:
        """Over all living rows; told by a `StoreWarning` where it is damaged, and exact then."""
        blocks = [(segment.row_ids, segment.vectors(self.card.match_output)) for segment in self.segments]
        return LiveIndex.open(blocks, self.card.metric, self.snapshot.index_path(self.card.id))

    def search(self, vectors: ArrayLike, k: int, where: str | None = None, *, exact: bool = False) -> pa.Table:
        """The k nearest patches of each vector (m, d) among those that `where`, SQL over `patches`, keeps.

        A vector (d,) is one query. Rows come query by query, the nearest first; fewer than k where fewer are kept.
        """
        asked = np.asarray(vectors)
        asked = asked[None] if asked.ndim == 1 else asked
        return self._rows(self.index.search(asked, k, self._among(where), exact=exact))

    def _among(self, where: str | None) -> RowIds | None:
        if where is None:
            return None
        chosen = self.snapshot.matching("patches", where, ["patch"]).column("patch").to_numpy()  # of every encoder
        return np.intersect1d(chosen, np.concatenate([segment.row_ids for segment in self.segments]))

    def _rows(self, hits: Hits) -> pa.Table:
        import pyarrow as pa

        query, rank = np.nonzero(hits.found)
        patch = hits.row_ids[query, rank]
        scan, place = self._places(patch)
        table = self.snapshot.table("scans")
        subject_of = dict(zip(table.column("scan").to_pylist(), table.column("subject").to_pylist(), strict=True))
        return pa.table(
            {
                "query": pa.array(query, pa.int64()),
                "patch": pa.array(patch, pa.int64()),
                "scan": pa.array(scan, pa.string()),
                "subject": pa.array([subject_of[name] for name in scan], pa.string()),
                **{name: pa.array(place[:, axis]) for axis, name in enumerate(_PLACE)},
                "distance": pa.array(hits.distances[query, rank]),
            }
        )

    def _places(self, patches: RowIds) -> tuple[Sequence[str], NDArray[np.float64]]:
        """The scan and the RAS+ mm (n, 3) of each patch."""
        firsts = np.array([segment.first_row_id for segment in self.segments], dtype=np.int64)
        owner = np.searchsorted(firsts, patches, side="right") - 1
        scans = np.empty(len(patches), dtype=object)
        places = np.empty((len(patches), 3))
        for number in np.unique(owner):
            segment, mine = self.segments[number], owner == number
            rows = np.searchsorted(segment.row_ids, patches[mine])
            table = segment.patches(_PLACE)
            places[mine] = np.stack([table.column(name).to_numpy()[rows] for name in _PLACE], axis=1)
            scans[mine] = self.snapshot.scan_of[segment.scan_artefact]
        return scans.tolist(), places
