"""The views `patches` and `patch_labels`: rows of all segments, with row ids, and which labels they show.

Up to a quarter of a million patches they are one table, kept with the snapshot. More are read piece by piece, a few
columns at a time: every query is then given what its plan reads of them and nothing else (see `needs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from isimed_index.contracts import view_schema
from isimed_index.errors import StoreDamaged
from isimed_index.store.files import REPAIR
from isimed_index.store.segment import LABEL_SHARES, Segment, groups
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql.sandbox import Large
from isimed_index.store.sql.wire import Need

LARGE_ROWS = 1 << 18  # from so many on they are read piece by piece, in pieces of about as many
_CANONICAL = ("cx_mm", "cy_mm", "cz_mm")
_CENTRES = ("x_mm", "y_mm", "z_mm")
_MADE = ("patch", "encoder", *_CANONICAL)  # columns that no segment stores
_LABELS_OF_A_PATCH = 4  # a guess, for how much memory they will take
_kept: WeakKeyDictionary[Snapshot, pa.Table] = WeakKeyDictionary()  # a pinned generation does not change
Rows = Callable[[Sequence[Segment], Sequence[str] | None], pa.Table]  # of some segments, all columns or some


def patches_view(snapshot: Snapshot) -> pa.Table | Large:
    """All rows of `patches`."""
    segments = snapshot.segments()
    if (rows := sum(segment.rows for segment in segments)) >= LARGE_ROWS:
        return Large(_schema(segments), rows, lambda need: _batches(segments, need, partial(patch_rows, snapshot)))
    if snapshot not in _kept:
        table = patch_rows(snapshot, segments).combine_chunks()
        _kept[snapshot] = table.select([name for name in table.column_names if name != LABEL_SHARES])
    return _kept[snapshot]


def patch_labels_view(snapshot: Snapshot) -> pa.Table | Large:
    """All rows of `patch_labels`."""
    segments = [segment for segment in snapshot.segments() if tells_labels(segment)]
    if (rows := sum(segment.rows for segment in segments)) >= LARGE_ROWS:
        schema = view_schema("patch_labels")
        return Large(schema, _LABELS_OF_A_PATCH * rows, lambda need: _batches(segments, need, label_rows))
    return label_rows(segments, None)


def tells_labels(segment: Segment) -> bool:
    """Whether a segment holds rows of `patch_labels`: its scan had a label map."""
    columns = segment.patch_columns()
    if LABEL_SHARES not in columns.names:
        return False
    if not pa.types.is_map(found := columns.field(LABEL_SHARES).type):
        raise StoreDamaged(f"the column {LABEL_SHARES} of a segment is {found}, expected a map", next_step=REPAIR)
    return True


def label_rows(segments: Sequence[Segment], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of `patch_labels` that some segments hold: patch after patch, label after label."""
    schema = view_schema("patch_labels")
    pieces = [schema.empty_table()]
    for segment in segments:
        shares = segment.patches([LABEL_SHARES])[LABEL_SHARES].combine_chunks()
        ends = shares.offsets.to_numpy()
        told = slice(int(ends[0]), int(ends[-1]))
        cells = (np.repeat(segment.row_ids, np.diff(ends)), shares.keys[told], shares.items[told])
        pieces.append(pa.table(dict(zip(schema.names, cells, strict=True))).cast(schema))
    rows = pa.concat_tables(pieces)
    return rows if columns is None else rows.select(list(columns))


def patch_rows(snapshot: Snapshot, segments: Sequence[Segment], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of `patches` that some segments hold, in their order: all that is stored of them, or some columns."""
    schema = view_schema("patches")
    counts = [segment.rows for segment in segments]
    rows = _stored(segments, columns)
    extra = [name for name in rows.column_names if name not in schema.names]
    names = [*schema.names, *extra] if columns is None else list(columns)
    made: dict[str, Any] = {}
    if "patch" in names:
        made["patch"] = np.concatenate([np.empty(0, np.int64), *(segment.row_ids for segment in segments)])
    if "encoder" in names:
        encoders = pa.array([segment.encoder for segment in segments], pa.string())
        made["encoder"] = encoders.take(pa.array(np.repeat(np.arange(len(counts)), counts)))
    if any(name in names for name in _CANONICAL):
        made |= _canonical(rows, _segment_charts(snapshot, segments), counts)
    fields, cells = [], []
    for name in names:
        known = name in schema.names
        if name in made:
            column = pa.array(made[name], schema.field(name).type)
        else:
            column = rows[name] if name in rows.column_names else pa.nulls(sum(counts))
        fields.append(schema.field(name) if known else pa.field(name, column.type))
        cells.append(column)
    return pa.table(cells, schema=pa.schema(fields))


def _stored(segments: Sequence[Segment], columns: Sequence[str] | None) -> pa.Table:
    """What segments store of some columns (None: of all), and the centres if canonical ones are among them."""
    empty = view_schema("patches").empty_table()
    empty = empty.select([name for name in empty.column_names if name not in _MADE])
    if columns is None:
        pieces = [segment.patches() for segment in segments]
    else:
        wanted = {name for name in columns if name not in _MADE}
        wanted |= set(_CENTRES if any(name in columns for name in _CANONICAL) else ())
        empty = empty.select([name for name in empty.column_names if name in wanted])
        if not wanted:
            return empty
        pieces = [
            segment.patches([name for name in segment.patch_columns().names if name in wanted]) for segment in segments
        ]
    return pa.concat_tables([empty, *pieces], promote_options="permissive")


def _schema(segments: Sequence[Segment]) -> pa.Schema:
    """All columns of the view, with those that some segments have beside the contract's."""
    one_each = {segment.path: segment for segment in segments}  # parts of one artefact have the same
    contract = view_schema("patches")
    found = pa.unify_schemas(
        [contract, *(segment.patch_columns() for segment in one_each.values())], promote_options="permissive"
    )
    return pa.schema([*contract, *(field for field in found if field.name not in (*contract.names, LABEL_SHARES))])


def _batches(segments: Sequence[Segment], need: Need, rows: Rows) -> Iterator[pa.RecordBatch]:
    """Some columns of the rows of segments, in their order; of the first rows only, where these are enough."""
    left = need.rows
    for some in groups(segments, LARGE_ROWS if left is None else min(left, LARGE_ROWS)):
        piece = rows(some, need.columns).slice(0, left)
        yield from piece.combine_chunks().to_batches()
        if left is not None and (left := left - piece.num_rows) == 0:
            return


def _canonical(rows: pa.Table, charts: NDArray[np.float64], counts: Sequence[int]) -> dict[str, pa.Array]:
    """Canonical centres by column, from charts (segments, 3, 4) of which those that are unknown hold NaN."""
    xyz = [rows[name].to_numpy().astype(np.float64) for name in _CENTRES]
    made = {}
    for axis, name in enumerate(_CANONICAL):
        cells = np.repeat(charts[:, axis], counts, axis=0)  # (n, 4)
        centres = sum((cells[:, column] * xyz[column] for column in range(3)), cells[:, 3])
        made[name] = pa.array(centres, view_schema("patches").field(name).type, from_pandas=True)  # NaN is null
    return made


def _segment_charts(snapshot: Snapshot, segments: Sequence[Segment]) -> NDArray[np.float64]:
    """The affine of each segment's scan (segments, 3, 4), NaN where it has none."""
    charts = {encoder: _charts(snapshot, encoder) for encoder in {segment.encoder for segment in segments}}
    unknown = np.full((3, 4), np.nan)
    found = [
        charts[segment.encoder].get(snapshot.scan_of.get(segment.scan_artefact, ""), unknown) for segment in segments
    ]
    return np.stack([unknown, *found])[1:]


def _charts(snapshot: Snapshot, encoder_id: str) -> dict[str, Any]:
    """By scan id: the affine (3, 4) from patient RAS+ mm to canonical mm."""
    path = snapshot.frame_path(encoder_id)
    if path is None:
        return {}
    try:
        table = pq.read_table(path / "charts.parquet", partitioning=None)
        cells = [table.column(f"a{row}{column}").to_numpy() for row in range(3) for column in range(4)]
        scans = table.column("scan").to_pylist()
        fitted = table.column("voxels").to_pylist() if "voxels" in table.column_names else [None] * len(scans)
    except (OSError, KeyError, pa.ArrowException):
        raise StoreDamaged("the charts of a frame cannot be read", next_step="isimed index") from None
    affines = np.stack(cells, axis=1).astype(np.float64).reshape(-1, 3, 4)
    return {
        scan: affine
        for scan, affine, voxels in zip(scans, affines, fitted, strict=True)
        if voxels in (None, snapshot.voxels_of.get(scan))  # else another scan has the id now
    }
