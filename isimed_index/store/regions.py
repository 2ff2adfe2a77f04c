"""Regions: one vector of each scan by an encoder, and one of each labelled region of it, as they are stored.

    regions/<ulid>/   regions.parquet · mean.npy (r, d) · sd.npy (r, d) · regions.json

Row i of the table lies beside row i of the arrays. A row holds for a segment as it was when the row was made: where
the segment is gone, or patches of it were deleted, no reader gives the row. No row names a scan: its segment does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import conform, view_schema
from isimed_index.errors import StoreDamaged
from isimed_index.store.place.faults import numbered, spare
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, MEAN, SD, MADE = "regions.parquet", "mean.npy", "sd.npy", "regions.json"
_AGAIN = "isimed index"
Vectors = NDArray[np.float32]  # (r, d)


@dataclass(frozen=True, slots=True, eq=False)
class StoredRegions:
    """Pooled vectors of one encoder: a table (contract `regions`), and beside each of its rows mean and sd (r, d).

    `made` says how: the output that was pooled, the standard that made its vectors unit vectors, and the least weight
    of a region. Vectors that were made in different ways cannot be compared.
    """

    rows: pa.Table
    mean: Vectors
    sd: Vectors
    made: Mapping[str, Any]

    def take(self, which: NDArray[np.int64]) -> StoredRegions:
        """Some rows (m,) of it, rising; all of them stay memory maps."""
        if len(which) == self.rows.num_rows:
            return self
        return StoredRegions(self.rows.take(which), self.mean[which], self.sd[which], self.made)


def write_regions(directory: Path, regions: StoredRegions) -> None:
    """Write an artefact of the kind `region` into a staged folder."""
    import pyarrow.parquet as pq

    pq.write_table(conform("regions", regions.rows), directory / ROWS, compression="zstd")
    for name, vectors in ((MEAN, regions.mean), (SD, regions.sd)):
        with numbered(directory):
            np.save(directory / name, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)
    (directory / MADE).write_text(json.dumps(regions.made), encoding="utf-8")


def read_regions(directory: Path) -> StoredRegions:
    """What `write_regions` wrote, arrays as memory maps; `StoreDamaged` when it is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = conform("regions", pq.read_table(directory / ROWS, partitioning=None))
        mean, sd = (np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in (MEAN, SD))
        made = dict(json.loads((directory / MADE).read_text(encoding="utf-8")))
        whole = mean.dtype == sd.dtype == np.float32 and mean.shape == sd.shape == (rows.num_rows, mean.shape[-1])
    except (OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
        spare(error, "the regions")
        raise StoreDamaged("the regions of an encoder cannot be read", next_step=_AGAIN) from None
    if not whole:
        raise StoreDamaged("the regions of an encoder have not one vector a row", next_step=_AGAIN)
    return StoredRegions(rows, mean, sd, made)


def living_regions(snapshot: Snapshot, encoder_id: str) -> StoredRegions | None:
    """The rows that hold of an encoder's newest regions; None when there are no regions."""
    artefact = snapshot.newest("region", encoder_id)
    if artefact is None:
        return None
    import pyarrow as pa
    import pyarrow.compute as pc

    stored = read_regions(snapshot.verified(artefact))
    segments = snapshot.segments(encoder_id)
    ids = pa.array([segment.first_row_id for segment in segments], pa.int64())
    counts = pa.array([segment.rows for segment in segments], pa.int64())
    now = counts.take(pc.index_in(stored.rows["segment"], ids).combine_chunks())  # null where the segment is gone
    return stored.take(np.flatnonzero(pc.fill_null(pc.equal(stored.rows["rows"], now), False)))


def described(snapshot: Snapshot, encoder_id: str, rows: pa.Table) -> pa.Table:
    """Living rows as the view `regions` shows them: with scan, encoder and the label's name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    segments = snapshot.segments(encoder_id)
    ids = pa.array([segment.first_row_id for segment in segments], pa.int64())
    scans = pa.array([snapshot.scan_of[segment.scan_artefact] for segment in segments], pa.string())
    place = pc.index_in(rows["segment"], ids).combine_chunks()
    labels = snapshot.table("labels")
    known = _keys(pc.index_in(labels["scan"], scans, skip_nulls=True), labels["label"])
    named = pc.index_in(_keys(place, rows["label"]), known, skip_nulls=True)  # a null is found nowhere
    found = {
        "scan": scans.take(place),
        "encoder": pa.array([encoder_id] * rows.num_rows, pa.string()),
        "name": labels["name"].take(named),
        **{name: rows[name] for name in ("label", "patches", "weight", "foreground")},
    }
    schema = view_schema("regions")
    return pa.table([found[name] for name in schema.names], names=schema.names).cast(schema)


def _keys(scans: pa.Array, labels: pa.ChunkedArray) -> pa.Array:
    """Scan numbers (n,) and labels (n,) as one number each; null where one of them is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.add(pc.multiply(pc.cast(scans, pa.int64()), 1 << 32), pc.cast(labels, pa.int64()))


def regions_view(snapshot: Snapshot) -> pa.Table:
    """All rows of the view `regions`."""
    import pyarrow as pa

    pieces = [view_schema("regions").empty_table()]
    for artefact in snapshot.artefacts("encoder"):
        encoder = artefact.fields["encoder"]
        stored = living_regions(snapshot, encoder)
        if stored is not None:
            pieces.append(described(snapshot, encoder, stored.rows))
    return pa.concat_tables(pieces)
