"""What is said of scans that are stored already: what was not known is filled in, what is otherwise is refused.

A file whose content is stored may bring metadata: cells that are empty get them, in a commit of their own. A cell that
says something else stays, and the file is told of; so does a scan that another person's file is a copy of. Labels are
never changed: a label map that is not the stored one is told of too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from isimed_index.errors import ScanRefused
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.report import Refusal
from isimed_index.ingest.rows import given_of, holds, is_text, person_of
from isimed_index.scans.discover import could_be_id, is_numbered
from isimed_index.scans.metadata import Metadata
from isimed_index.scans.tables import Value, plain_number
from isimed_index.store.snapshot import Snapshot, StoredTable
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    import pyarrow as pa

_PLACE = ("x_mm", "y_mm", "z_mm")
_ROUNDING = 1e-9  # of centroids, relative and in mm: far below what one voxel of a label moves
_Rows = Sequence[Mapping[str, Any]]  # of `labels`, of one scan
_Cells = dict[str, dict[str, Value]]  # by scan or subject, by column


@dataclass(frozen=True, slots=True)
class Late:
    """Cells to fill, and refusals by the identity of the file."""

    scans: _Cells = field(default_factory=dict)
    subjects: _Cells = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)


def late_labels(given: _Rows, stored: _Rows) -> ScanRefused | None:
    """The refusal of a label map whose rows are not those of its stored scan; None where they say the same.

    Rows hold a label's voxels and centroid: two maps that differ in neither, for any label, are not told apart.
    """
    if given and not stored:  # an empty label map has no rows to come late
        return ScanRefused(
            "the scan is stored already, without labels; a stored scan is not given labels later",
            next_step="add it with its labels to a new store",
        )
    old = {row["label"]: row for row in stored}
    if old.keys() == {row["label"] for row in given} and all(_is_in_place(row, old[row["label"]]) for row in given):
        return None
    return ScanRefused(
        "its label map differs from the stored one; a stored scan keeps its labels",
        next_step="delete the scan and add it again",
    )


def labels_of(scans: Sequence[str], head: Snapshot) -> dict[str, list[dict[str, Any]]]:
    """The rows of `labels` of each of these scans; of one without labels, none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = head.table("labels").select(["scan", "label", "voxels", *_PLACE])
    rows: dict[str, list[dict[str, Any]]] = {scan: [] for scan in scans}
    for row in table.filter(pc.is_in(table["scan"], pa.array(list(rows), pa.string()))).to_pylist():
        rows[row["scan"]].append(row)
    return rows


def late_metadata(files: Sequence[tuple[Chosen, str]], metadata: Metadata, head: Snapshot) -> Late:
    """Hold what is said of files, given with their digests, against the rows of the scans that they are."""
    late = Late()
    if not files:
        return late
    scans, subjects = head.table("scans"), head.table("subjects")
    stored = {row["digest"]: row for row in scans.to_pylist()}
    people = {row["subject"]: row for row in subjects.to_pylist()}
    for file, digest in files:
        row = stored[digest]
        scan = row["scan"] if may_be_called(file, row["scan"]) else file.name
        given = {key: value for key, value in given_of(file, scan, metadata).items() if value is not None}
        theirs = late.scans.get(row["scan"], {})
        mine = _is_the_same(file, row)
        wrong = [key for key, value in given.items() if not _fits(key, value, row | theirs, scans.schema, fill=mine)]
        if wrong:
            late.refused[id(file)] = Refusal.of(file.shown, _too_late(wrong))
            continue
        _note(late.scans, row["scan"], given, row)
        if mine and (person := people.get(row["subject"])) is not None:
            known = person | late.subjects.get(row["subject"], {})
            told = person_of(file, scan, metadata).items()
            fitting = {k: v for k, v in told if v is not None and _fits(k, v, known, subjects.schema, fill=True)}
            _note(late.subjects, row["subject"], fitting, person)
    return late


def commit_late(transaction: Transaction, late: Late) -> Snapshot | None:
    """Fill the cells in a generation of its own; None when there are none."""
    return transaction.commit(partial(_filled, late)) if late.scans or late.subjects else None


def _filled(late: Late, head: Snapshot) -> Proposal:
    """All rows of the tables with the cells filled that are still empty in this head."""
    import pyarrow as pa

    rewrite: dict[StoredTable, pa.Table] = {}
    tables: tuple[tuple[StoredTable, str, _Cells], ...] = (
        ("scans", "scan", late.scans),
        ("subjects", "subject", late.subjects),
    )
    for name, key, cells in tables:
        table = head.table(name)
        keys = table.column(key).to_pylist()
        for column in dict.fromkeys(column for values in cells.values() for column in values):
            given = [cells.get(one, {}).get(column) for one in keys]
            old = table.column(column).to_pylist() if column in table.column_names else [None] * len(keys)
            both = [new if was is None else was for was, new in zip(old, given, strict=True)]
            if both == old:
                continue
            if column in table.column_names:
                table = table.set_column(
                    table.column_names.index(column), column, _array(both, table.column(column).type)
                )
            else:
                table = table.append_column(column, pa.array(both))
            rewrite[name] = table
    return Proposal(rewrite=rewrite)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values in the type of their column, in real numbers where whole ones do not do, or as texts."""
    import pyarrow as pa

    if is_text(kind):
        return pa.array([None if value is None else str(value) for value in values], kind)
    return pa.array([None if value is None else float(value) for value in values] if _has_parts(values) else values)


def _has_parts(values: Sequence[Any]) -> bool:
    return any(isinstance(value, float) for value in values)


def _is_the_same(file: Chosen, row: Mapping[str, Any]) -> bool:
    """Whether a file with the content of a stored scan is that scan's file by its names, and no one else's copy."""
    if file.subject is not None:
        return bool(file.subject == row["subject"])
    return may_be_called(file, row["scan"])


def may_be_called(file: Chosen, scan: str) -> bool:
    """Whether `add` could have called this file so, whatever other files and scans there were."""
    if file.series or file.hidden:  # a surrogate, and no path
        return is_numbered(file.name, scan)
    ours = file.name == scan or could_be_id(file.path, scan)
    return ours or (file.image is not None and is_numbered(file.image.name, scan))


def _is_in_place(given: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether two rows of a label have as many voxels and one centroid."""
    same = (math.isclose(given[axis], stored[axis], rel_tol=_ROUNDING, abs_tol=_ROUNDING) for axis in _PLACE)
    return bool(given["voxels"] == stored["voxels"]) and all(same)


def _fits(key: str, value: Value, row: Mapping[str, Any], schema: pa.Schema, *, fill: bool) -> bool:
    """Whether a cell says this already, or is empty, may be filled, and has a type that can say it."""
    if row.get(key) is not None:
        return _same(value, row[key])
    return fill and (key not in schema.names or holds(schema.field(key).type, value))


def _note(cells: _Cells, key: str, given: Mapping[str, Value], row: Mapping[str, Any]) -> None:
    new = {column: value for column, value in given.items() if row.get(column) is None}
    if new:
        cells.setdefault(key, {}).update(new)


def _too_late(columns: Sequence[str]) -> ScanRefused:
    return ScanRefused(
        f"the scan is stored already, with other metadata ({', '.join(columns)}); a stored scan keeps its own",
        next_step="add it with its metadata to a new store",
    )


def _same(given: Value, stored: Value) -> bool:
    """Whether two cells say the same; the type that a column got may differ from one table to the next."""
    if given == stored:
        return True
    texts = str(given), str(stored)
    number = plain_number(texts[0])
    return texts[0] == texts[1] or (number is not None and number == plain_number(texts[1]))
