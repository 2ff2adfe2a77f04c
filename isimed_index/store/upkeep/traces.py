"""Traces: everything in a store, in any generation, that holds something of one subject.

rows of scans ─▶ ids, voxels, digests ─▶ segments (packed ones hold rows that nothing names) ─▶ row ids
                                      └▶ labels, charts of frames, references                    └▶ indexes, regions

What a collector took leaves holes in what the rows tell. So whatever no scan of somebody else accounts for is taken for
the subject's: rows in packed segments, rows that an index covers, charts, voxels, and templates (see `lineage`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import StoreUnreadable
from isimed_index.store import files
from isimed_index.store.files import NEXT_FRAME, REFERENCE
from isimed_index.store.manifest import Artefact, Manifest
from isimed_index.store.place.storage import Storage
from isimed_index.store.segment import PATCHES, ROW_IDS, parts_of
from isimed_index.store.snapshot import SCAN_COLUMNS, Snapshot
from isimed_index.store.upkeep.lineage import frames_in_doubt, regions_in_doubt
from isimed_index.store.upkeep.soundness import CHARTS, read_piece

if TYPE_CHECKING:
    import pyarrow as pa

Spans = list[tuple[int, int]]  # half-open ranges of row ids
_SCAN = ("scan", "subject", "session", "digest", "artefact")


@dataclass(frozen=True, slots=True)
class Traces:
    """What is known of a subject, and of all others, from rows of `scans`, old ones included."""

    subject: str
    known: bool  # whether any row names it
    scans: frozenset[str] = frozenset()  # ids
    sessions: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    voxels: frozenset[str] = frozenset()  # paths
    shared: frozenset[str] = frozenset()  # ids and digests that somebody else's scans have now
    their_scans: frozenset[str] = frozenset()  # ids that scans of others have, or had
    their_voxels: frozenset[str] = frozenset()  # paths that are others' alone

    @classmethod
    def read(cls, storage: Storage, subject: str) -> Traces:
        """Search every table file that lies in the store, whether a generation names it or not.

        Read it after the manifests that it is to be held against: the tables that these name are there then.
        """
        found: dict[str, set[str]] = {name: set() for name in _SCAN}
        theirs: dict[str, set[str]] = {"scan": set(), "artefact": set()}
        known = False
        for table in _tables(storage):
            if "subject" not in table.column_names:
                continue
            ours, rest = _split(table, subject)
            known = known or ours.num_rows > 0
            for name in set(_SCAN) & set(table.column_names):
                found[name] |= _texts(ours, name)
            for name in theirs.keys() & set(table.column_names):
                theirs[name] |= _texts(rest, name)
        return cls(
            subject,
            known,
            scans=frozenset(found["scan"]),
            sessions=frozenset(found["session"]),
            digests=frozenset(found["digest"]),
            voxels=frozenset(found["artefact"]),
            their_scans=frozenset(theirs["scan"]),
            their_voxels=frozenset(theirs["artefact"] - found["artefact"]),
        )

    def beside(self, head: Snapshot) -> Traces:
        """The same, knowing the scans of others in a generation, and which of its ids and digests these have."""
        _, theirs = _split(head.table("scans"), self.subject)
        taken = _texts(theirs, "scan") | _texts(theirs, "digest")
        return replace(
            self,
            shared=frozenset((self.scans | self.digests) & taken),
            their_scans=self.their_scans | _texts(theirs, "scan"),
            their_voxels=self.their_voxels | (_texts(theirs, "artefact") - self.voxels),
        )

    def joined(self, later: Traces) -> Traces:
        """What was known before and what is known later."""
        voxels = self.voxels | later.voxels
        return replace(
            later,
            known=self.known or later.known,
            scans=self.scans | later.scans,
            sessions=self.sessions | later.sessions,
            digests=self.digests | later.digests,
            voxels=voxels,
            their_scans=self.their_scans | later.their_scans,
            their_voxels=(self.their_voxels | later.their_voxels) - voxels,
        )

    @property
    def own(self) -> frozenset[str]:
        """Ids of scans that are nobody else's now."""
        return self.scans - self.shared

    def spans(self, manifests: Iterable[Manifest]) -> Spans:
        """Half-open ranges of row ids that the subject's patches ever had."""
        return _spans(manifests, self.voxels)

    def held_by(self, storage: Storage, manifests: Mapping[int, Manifest]) -> set[str]:
        """Paths of all artefacts that hold something of the subject, or of which it cannot be told that they do not."""
        every: dict[str, list[Artefact]] = {}
        for manifest in manifests.values():
            for made in manifest.artefacts:
                every.setdefault(made.path, []).append(made)
        theirs = _merged(_spans(manifests.values(), self.their_voxels))
        doubtful = frames_in_doubt(manifests, self.their_voxels)
        doubtful |= regions_in_doubt(manifests, doubtful)
        return {path for path, entries in every.items() if path in doubtful or self._holds(storage, entries, theirs)}

    def _holds(self, storage: Storage, entries: Sequence[Artefact], theirs: NDArray[np.int64]) -> bool:
        """Whether an artefact does; `entries` are what generations say of it, which differs for packed segments."""
        made = entries[0]
        if made.kind == "scan":
            return made.path not in self.their_voxels
        if made.kind in ("index", "region"):
            covers = np.array(made.fields["covers"], dtype=np.int64).reshape(-1, 2)
            return not _within(covers[:, 0], covers[:, 1], theirs)
        if made.kind == "reference":
            sources = voxels_averaged(storage, made)
            return self._shown_in(made) or sources is None or not sources <= self.their_voxels
        parts = [part for entry in entries if made.kind == "segment" for part in parts_of(entry)]
        if any(part["scan_artefact"] not in self.their_voxels for part in parts):
            return True
        if made.kind in ("table", "frame") or (made.kind == "segment" and "parts" in made.fields):
            return self._in_rows(storage, made, theirs)
        return False

    def _shown_in(self, reference: Artefact) -> bool:
        """Whether a reference is an atlas that is a scan of the subject, stored before it was registered to or since.

        `made_from` names the voxels that were stored then; the id of an atlas begins the digest of its file's content.
        """
        told = str(reference.fields["reference"])
        return any(digest.startswith(told) for digest in self.digests - self.shared)

    def _in_rows(self, storage: Storage, made: Artefact, theirs: NDArray[np.int64]) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            path = storage.fetch(made.path)
            if made.kind == "segment":
                scans = pq.read_table(path / PATCHES, columns=["scan"], partitioning=None)
                rows = np.load(path / ROW_IDS, allow_pickle=False)
                known = len(rows) == scans.num_rows and _within(rows, rows + 1, theirs)
                return not known or bool(self.own & _texts(scans, "scan"))
            if made.kind == "frame":  # a chart may be of a scan that had the id before
                folders = [folder for folder in (path, path / NEXT_FRAME) if folder.is_dir()]
                return any(self._charted(pq.read_table(each / CHARTS, partitioning=None)) for each in folders)
        except StoreUnreadable:
            raise
        except (OSError, ValueError, KeyError, EOFError, pa.ArrowException):
            return True
        piece = read_piece(storage, made)
        if piece is None:
            return True
        name = made.fields["table"]  # a row of `scans` says whose it is, and its id may have been the subject's before
        columns = SCAN_COLUMNS.get(name, ()) if name != "scans" else ()
        if any(self._not_theirs(_texts(piece, column), self.own) for column in columns):
            return True
        return "subject" in piece.column_names and bool(_split(piece, self.subject)[0].num_rows)

    def _charted(self, charts: pa.Table) -> bool:
        voxels = _texts(charts, "voxels") if "voxels" in charts.column_names else set()
        return self._not_theirs(_texts(charts, "scan"), self.scans) or not voxels <= self.their_voxels

    def _not_theirs(self, scans: Set[str], ours: Set[str]) -> bool:
        return not scans <= self.their_scans or bool(scans & ours)


def voxels_averaged(storage: Storage, made: Artefact) -> set[str] | None:
    """Paths of the voxels that a reference was made from; None when it does not tell."""
    try:
        content = json.loads((storage.fetch(made.path) / REFERENCE).read_text(encoding="utf-8"))
        return {str(path) for path in content["made_from"]}
    except StoreUnreadable:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _texts(rows: pa.Table, column: str) -> set[str]:
    return {str(value) for value in rows.column(column).unique().to_pylist() if value is not None}


def _split(rows: pa.Table, subject: str) -> tuple[pa.Table, pa.Table]:
    """The rows of a subject, and those of all others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ours = pc.fill_null(pc.equal(rows.column("subject").cast(pa.string()), subject), False)
    return rows.filter(ours), rows.filter(pc.invert(ours))


def _spans(manifests: Iterable[Manifest], voxels: Set[str]) -> Spans:
    """Half-open ranges of the row ids of everything that was ever made from some voxels."""
    return sorted(
        {
            (part["first_row_id"], part.get("end_row_id", part["first_row_id"] + made.fields["rows"]))
            for manifest in manifests
            for made in manifest.find("segment")
            for part in parts_of(made)
            if part["scan_artefact"] in voxels
        }
    )


def _merged(spans: Spans) -> NDArray[np.int64]:
    """Sorted half-open ranges (n, 2) as disjoint ones, neighbours joined."""
    merged: list[list[int]] = []
    for first, end in spans:
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    return np.array(merged, dtype=np.int64).reshape(-1, 2)


def _within(first: NDArray[np.int64], end: NDArray[np.int64], ranges: NDArray[np.int64]) -> bool:
    """Whether each half-open range (n,) (n,) lies in one of some disjoint, rising ones (m, 2)."""
    if not len(ranges):
        return not len(first)
    place = np.searchsorted(ranges[:, 0], first, side="right") - 1
    return bool(((place >= 0) & (end <= ranges[place, 1])).all())


def _tables(storage: Storage) -> Iterator[pa.Table]:
    """Every table file that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = files.FOLDERS["table"]
    for name in storage.names(folder):
        try:
            yield pq.read_table(storage.fetch(f"{folder}/{name}"), partitioning=None)
        except StoreUnreadable:
            raise
        except (OSError, pa.ArrowException):
            continue
