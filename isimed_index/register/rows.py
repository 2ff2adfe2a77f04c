"""Rows of the table `transforms`, and the changes that a commit makes to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import arrow_schema
from isimed_index.errors import NotFound
from isimed_index.register.align import Alignment, Kind
from isimed_index.space import Affine
from isimed_index.store.manifest import utc_now
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal
from isimed_index.store.transforms import TABLE, affine_of, cells_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, eq=False)
class Registered:
    """One scan's transform, as it will be stored; `voxels` is the artefact that was registered."""

    scan: str
    voxels: str
    found: Alignment
    centre_mm: NDArray[np.float64]
    rounds: int


def row_of(done: Registered, reference: str, kind: Kind, settings: str) -> dict[str, Any]:
    """A row of the table."""
    return {
        "scan": done.scan,
        "reference": reference,
        "kind": kind,
        **cells_of(done.found.affine),
        **dict(zip(("x_mm", "y_mm", "z_mm"), map(float, done.centre_mm), strict=True)),
        "metric_before": done.found.metric_before,
        "metric_after": done.found.metric_after,
        "overlap": done.found.overlap,
        "rounds": done.rounds,
        "settings": settings,
        "time": utc_now(),
    }


def centre_of_row(row: Mapping[str, Any]) -> NDArray[np.float64]:
    """The centre (3,) of what is not air in the scan of a row, patient RAS+ mm."""
    return np.array([row["x_mm"], row["y_mm"], row["z_mm"]])


def transform_of(head: Snapshot, scan: str, reference: str | None, kind: str | None) -> Affine:
    """The newest transform of a scan, to a reference (its id) and of a kind where these are given."""
    head.scan_row(scan)
    fits = [
        row
        for row in head.table(TABLE).to_pylist()
        if row["scan"] == scan and reference in (None, row["reference"]) and kind in (None, row["kind"])
    ]
    if not fits:
        raise NotFound(f"scan {scan!r} has no such transform", next_step="isimed register")
    return affine_of(max(fits, key=lambda row: row["time"]))


def replacing(head: Snapshot, new: Sequence[Mapping[str, Any]], gone: Iterable[tuple[str, str, str]]) -> Proposal:
    """The change that puts rows into the table in place of those of the same key, and takes others (by key) out."""
    keys = {(row["scan"], row["reference"], row["kind"]) for row in new} | set(gone)
    there = head.table(TABLE)
    left = _without(there, keys)
    if left.num_rows == there.num_rows:
        return Proposal(tables={TABLE: _table(new)})
    return Proposal(rewrite={TABLE: _joined(left, new)})


def moved(head: Snapshot, new: Sequence[Mapping[str, Any]], references: Set[str]) -> pa.Table:
    """All rows of the table with those to `references` (ids) taken out and `new` ones put in."""
    there = head.table(TABLE)
    keys = {(row["scan"], row["reference"], row["kind"]) for row in there.to_pylist() if row["reference"] in references}
    return _joined(_without(there, keys), new)


def _without(rows: pa.Table, keys: Set[tuple[str, str, str]]) -> pa.Table:
    import pyarrow as pa

    names = zip(*(rows.column(name).to_pylist() for name in ("scan", "reference", "kind")), strict=True)
    return rows.filter(pa.array([key not in keys for key in names], pa.bool_()))


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=arrow_schema(TABLE))


def _joined(rows: pa.Table, new: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables([rows, _table(new)], promote_options="permissive")
