"""Compaction: many small segments into a few large ones, many pieces of a table into one, without the dead rows.

Nothing that can be asked changes: row ids, values and order stay, so indexes and frames stay too. What another process
commits meanwhile is kept: a segment that it dropped is left out, rows that it deleted stay deleted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isimed_index.progress import Progress, Silent
from isimed_index.store.repository import Repository
from isimed_index.store.segment import LATTICE, PATCHES, ROW_IDS, Segment, parts_of
from isimed_index.store.snapshot import STORED_TABLES, Snapshot, StoredTable
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.store.manifest import Artefact

TARGET_BYTES = 256 << 20  # that a packed segment reaches
MAX_SEGMENTS = 64  # in all; larger stores get larger segments
_SMALL = 0.5  # a segment below this share of the target is packed with others,
_SPARSE = 0.8  # and so is one of whose rows less than this share lives


@dataclass(frozen=True, slots=True)
class Compacted:
    """Numbers of segments and table pieces before and after, and the generation that has the latter."""

    generation: int
    segments: tuple[int, int]
    pieces: tuple[int, int]


def compact(
    repository: Repository,
    target_bytes: int = TARGET_BYTES,
    max_segments: int = MAX_SEGMENTS,
    progress: Progress | None = None,
) -> Compacted:
    """Pack segments up to `target_bytes` and `max_segments`, and write each table as one piece; one commit."""
    progress = progress or Silent()
    with repository.pin() as head, repository.transaction("compact") as transaction:
        before = _counts(head)
        groups = _groups(head, target_bytes, max_segments)
        progress.start("compact", sum(map(len, groups)), "segments")
        packed = [pack(transaction, group, progress) for group in groups]
        progress.finish()
        now = transaction.commit(lambda newer: _proposal(newer, packed, head))
    after = _counts(now)
    return Compacted(now.generation, (before[0], after[0]), (before[1], after[1]))


def _counts(snapshot: Snapshot) -> tuple[int, int]:
    return len(snapshot.artefacts("segment")), len(snapshot.artefacts("table"))


def _groups(head: Snapshot, target_bytes: int, max_segments: int) -> list[list[Segment]]:
    """What to pack together: by encoder and outputs, small and sparse artefacts, by rising row id to the target."""
    total = sum(artefact.bytes for artefact in head.artefacts("segment"))
    target = max(target_bytes, -(-total // max_segments))
    pool = sorted(_wanting(head, target, max_segments), key=lambda segment: (_form(segment), segment.first_row_id))
    groups: list[list[Segment]] = []
    for _, alike in groupby(pool, key=_form):
        group: list[Segment] = []
        size = 0
        for segment in alike:
            group.append(segment)
            size += _size(segment)
            if size >= target:
                groups.append(group)
                group, size = [], 0
        if group:
            groups.append(group)
    return [group for group in groups if len({segment.path for segment in group}) > 1 or _sparse(group)]


def _wanting(head: Snapshot, target: int, max_segments: int) -> list[Segment]:
    by_path: dict[str, list[Segment]] = {}
    for segment in head.segments():
        by_path.setdefault(segment.path, []).append(segment)
    small = _SMALL * target if len(by_path) <= max_segments else target
    return [
        segment for parts in by_path.values() if parts[0].artefact.bytes < small or _sparse(parts) for segment in parts
    ]


def _sparse(parts: Sequence[Segment]) -> bool:
    """Whether too few of the rows in the files of one or several artefacts live."""
    stored = sum({segment.path: int(segment.artefact.fields["rows"]) for segment in parts}.values())
    return sum(segment.rows for segment in parts) < _SPARSE * stored


def _form(segment: Segment) -> tuple[str, str]:
    return segment.encoder, json.dumps(segment.outputs, sort_keys=True)


def _size(segment: Segment) -> int:
    return segment.artefact.bytes * segment.rows // max(int(segment.artefact.fields["rows"]), 1)


def pack(transaction: Transaction, group: Sequence[Segment], progress: Progress) -> Artefact:
    """Write a group as one segment, part after part, without dead rows; memory holds one part."""
    import pyarrow as pa

    group = sorted(group, key=lambda segment: (segment.rows == 0, segment.first_row_id))  # row groups are never empty
    path = transaction.stage("segment")
    rows = sum(segment.rows for segment in group)
    outputs = group[0].outputs
    parts, lattices, start = [], [], 0
    with ExitStack() as open_files:
        writer = open_files.enter_context(_patches_writer(path / PATCHES, group))
        arrays = {
            name: open_files.enter_context(_Column(path / f"{name}.npy", (rows, form["dim"]), form["dtype"]))
            for name, form in outputs.items()
        }
        row_ids = open_files.enter_context(_Column(path / ROW_IDS, (rows,), "int64"))
        for number, segment in enumerate(group):
            for name, column in arrays.items():
                column.append(segment.vectors(name))
            row_ids.append(segment.row_ids)
            if segment.rows:
                whole = pa.concat_tables([writer.schema.empty_table(), segment.patches()], promote_options="permissive")
                writer.write_table(whole, row_group_size=segment.rows)
            lattices.append(segment.lattice())
            parts.append(_part(segment, number, start))
            start += segment.rows
            progress.advance(1)
    (path / LATTICE).write_text(json.dumps(lattices), encoding="utf-8")
    fields = {"encoder": group[0].encoder, "outputs": dict(outputs), "rows": rows, "parts": parts}
    ran = _runtime([segment.artefact.fields.get("runtime", {}) for segment in group])
    if ran:
        fields["runtime"] = ran
    return transaction.add("segment", path, **fields)


def _runtime(ran: list[dict[str, Any]]) -> dict[str, Any]:
    """What encoded all parts, if it was one for all, and the longest job that `auto` chose it for; else nothing."""
    programs = [{name: said for name, said in one.items() if name != "auto"} for one in ran]
    if any(program != programs[0] for program in programs):
        return {}
    jobs = [one["auto"] for one in ran if "auto" in one]
    if not jobs:
        return programs[0]
    longest = {"patches": max(job["patches"] for job in jobs), "trial": any(job["trial"] for job in jobs)}
    return {**programs[0], "auto": longest}


def _part(segment: Segment, number: int, start: int) -> dict[str, Any]:
    return {
        "part": number,
        "start": start,
        "rows": segment.rows,
        "first_row_id": segment.first_row_id,
        "end_row_id": segment.end_row_id,
        "scan_artefact": segment.scan_artefact,
        "grid": segment.grid,
        "task": segment.task,
    }


class _Column:
    """A .npy file that grows by rows up to a shape known before."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        self._stream = path.open("wb")
        np.lib.format.write_array_header_1_0(self._stream, header)
        self._dtype = np.dtype(dtype)

    def append(self, rows: np.ndarray[Any, Any]) -> None:
        self._stream.write(np.ascontiguousarray(rows, dtype=self._dtype).data)

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def _patches_writer(path: Path, group: Sequence[Segment]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = [segment.patch_columns().remove_metadata() for segment in group]
    return pq.ParquetWriter(path, pa.unify_schemas(schemas, promote_options="permissive"), compression="zstd")


def _proposal(head: Snapshot, packed: Sequence[Artefact], was: Snapshot) -> Proposal:
    """The packed segments in place of those parts that the head has as they were packed; each table as one piece."""
    there = {segment.first_row_id: segment for segment in head.segments()}
    now, then = _origins(head), _origins(was)
    # Another compaction may have packed a part without rows that ours still has, and forgotten who died; a restore may
    # have brought back rows that ours lacks. Such a part stays as it is.
    same = {row_id for row_id, origin in then.items() if row_id in now and origin <= now[row_id]}
    buried = [artefact.path for artefact in was.artefacts("tombstone")]
    add, replaced = [], []
    for artefact in packed:
        left = [part for part in parts_of(artefact) if part["first_row_id"] in same]
        if left:
            add.append(replace(artefact, fields={**artefact.fields, "parts": left}))
            replaced += [there[part["first_row_id"]] for part in left]
    pieces = [artefact.fields["table"] for artefact in head.artefacts("table")]
    rewrite: dict[StoredTable, pa.Table] = {name: head.table(name) for name in STORED_TABLES if pieces.count(name) > 1}
    return Proposal(add=add, drop_segments=replaced, rewrite=rewrite, buried=buried)


def _origins(snapshot: Snapshot) -> dict[int, set[str]]:
    """By first row id of each segment, the paths that its living rows come from: its files and its tombstones."""
    dead = [(piece.path, piece.fields["dead"]) for piece in snapshot.artefacts("tombstone")]
    return {
        segment.first_row_id: {segment.path, *(path for path, keys in dead if segment.key in keys)}
        for segment in snapshot.segments()
    }
