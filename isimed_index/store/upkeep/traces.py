"""Traces: everything in a store, in any generation, that holds something of one subject.

rows of scans ─▶ ids, voxels, digests ─▶ segments (packed ones hold rows that nothing names) ─▶ row ids
                                      └▶ labels, charts of frames                                └▶ indexes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from isimed_index.errors import StoreUnreachable
from isimed_index.store import files
from isimed_index.store.manifest import Artefact, Manifest
from isimed_index.store.place.storage import Storage
from isimed_index.store.segment import PATCHES, parts_of
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.upkeep.soundness import charted_scans, read_piece

if TYPE_CHECKING:
    import pyarrow as pa

Spans = list[tuple[int, int]]  # half-open ranges of row ids
_SCAN = ("scan", "subject", "session", "digest", "artefact")


@dataclass(frozen=True, slots=True)
class Traces:
    """What is known of a subject from rows of `scans`, old ones included."""

    subject: str
    known: bool  # whether any row names it
    scans: frozenset[str] = frozenset()  # ids
    sessions: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    voxels: frozenset[str] = frozenset()  # paths
    shared: frozenset[str] = frozenset()  # ids and digests that somebody else's scans have now

    @classmethod
    def read(cls, storage: Storage, subject: str) -> Traces:
        """Search every table file that lies in the store, whether a generation names it or not."""
        found: dict[str, set[str]] = {name: set() for name in _SCAN}
        known = False
        for table in _tables(storage):
            if "subject" not in table.column_names:
                continue
            ours = _of_subject(table, subject)
            known = known or ours.num_rows > 0
            for name in set(_SCAN) & set(table.column_names):
                found[name] |= {str(value) for value in ours.column(name).to_pylist() if value is not None}
        held = (frozenset(found[name]) for name in ("scan", "session", "digest", "artefact"))
        return cls(subject, known, *held)

    def beside(self, head: Snapshot) -> Traces:
        """The same, knowing which of its ids and digests scans of somebody else have in a generation."""
        import pyarrow.compute as pc

        scans = head.table("scans")
        theirs = scans.filter(pc.not_equal(scans.column("subject"), self.subject))
        taken = {str(value) for name in ("scan", "digest") for value in theirs.column(name).to_pylist()}
        return replace(self, shared=frozenset((self.scans | self.digests) & taken))

    @property
    def own(self) -> frozenset[str]:
        """Ids of scans that are nobody else's now."""
        return self.scans - self.shared

    def spans(self, manifests: Iterable[Manifest]) -> Spans:
        """Half-open ranges of row ids that the subject's patches ever had."""
        return sorted(
            {
                (part["first_row_id"], part.get("end_row_id", part["first_row_id"] + made.fields["rows"]))
                for manifest in manifests
                for made in manifest.find("segment")
                for part in parts_of(made)
                if part["scan_artefact"] in self.voxels
            }
        )

    def held_by(self, storage: Storage, manifests: Iterable[Manifest], spans: Spans) -> set[str]:
        """Paths of all artefacts that hold something of the subject, or that cannot be read to tell.

        `spans` are all row ids that its patches ever had: an index may hold rows whose segment is named no more.
        """
        every: dict[str, list[Artefact]] = {}
        for manifest in manifests:
            for made in manifest.artefacts:
                every.setdefault(made.path, []).append(made)
        return {path for path, entries in every.items() if self._holds(storage, entries, spans)}

    def _holds(self, storage: Storage, entries: Sequence[Artefact], spans: Spans) -> bool:
        """Whether an artefact does; `entries` are what generations say of it, which differs for packed segments."""
        made = entries[0]
        if made.kind == "scan":
            return made.path in self.voxels
        if made.kind == "index":
            covers = np.array(made.fields["covers"], dtype=np.int64).reshape(-1, 2)
            return any(((covers[:, 0] < end) & (covers[:, 1] > first)).any() for first, end in spans)
        if made.kind == "segment" and any(
            part["scan_artefact"] in self.voxels for entry in entries for part in parts_of(entry)
        ):
            return True
        if made.kind in ("table", "frame") or (made.kind == "segment" and "parts" in made.fields):
            return self._in_rows(storage, made)
        return False

    def _in_rows(self, storage: Storage, made: Artefact) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            path = storage.fetch(made.path)
            if made.kind == "segment":
                scans = pq.read_table(path / PATCHES, columns=["scan"], partitioning=None).column("scan").unique()
                return bool(self.own & set(scans.to_pylist()))
            if made.kind == "frame":  # a chart may be of a scan that had the id before
                return bool(self.scans & set(charted_scans(path)))
        except StoreUnreachable:
            raise
        except (OSError, pa.ArrowException):
            return True
        rows = read_piece(storage, made)
        if rows is None or "subject" not in rows.column_names:
            return rows is None or bool(self.own & set(rows.column("scan").to_pylist()))
        return bool(_of_subject(rows, self.subject).num_rows)


def _of_subject(rows: pa.Table, subject: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    return rows.filter(pc.equal(rows.column("subject").cast(pa.string()), subject))


def _tables(storage: Storage) -> Iterator[pa.Table]:
    """Every table file that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = files.FOLDERS["table"]
    for name in storage.names(folder):
        try:
            yield pq.read_table(storage.fetch(f"{folder}/{name}"), partitioning=None)
        except StoreUnreachable:
            raise
        except (OSError, pa.ArrowException):
            continue
