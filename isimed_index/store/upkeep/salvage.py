"""What of a damaged generation is whole, and which rows that it has lost older generations still hold.

rows of whole pieces + rows of older pieces whose voxels are whole ─▶ tables ─▶ scans that stay ─▶ segments that stay
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isimed_index.contracts import table_contract
from isimed_index.errors import IsimedError
from isimed_index.store.files import DERIVED
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import SCAN_COLUMNS, STORED_TABLES, Snapshot, StoredTable
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.audit import History
from isimed_index.store.upkeep.soundness import first_of_key, joined, parts_in, read_piece

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.store.manifest import Manifest
    from isimed_index.store.place.storage import Storage

_FOR_SUBJECT = ("sex", "age")  # columns that a row of subjects takes from the subject's scans, as adding does


@dataclass(frozen=True, slots=True, eq=False)
class Salvage:
    """What of a generation is whole, and which rows that it has lost older ones still hold."""

    head: Snapshot
    bad: Mapping[str, str]
    names: Mapping[str, str]  # scan id by path of voxels, as far as any generation tells
    there: Mapping[StoredTable, pa.Table]  # rows of the pieces that are whole
    recovered: Mapping[StoredTable, pa.Table]
    tables: Mapping[StoredTable, pa.Table]  # rows that the next generation has

    @classmethod
    def of(cls, head: Snapshot, bad: Mapping[str, str], past: History) -> Salvage:
        """Read what is there and search older generations, the newest first, for what is not."""
        there = {name: joined(name, _pieces(head, name, bad)) for name in STORED_TABLES}
        older_scans = joined("scans", list(_older_pieces(head, "scans", past)))
        names = {**_by_voxels(older_scans), **_by_voxels(there["scans"])}
        voxels = {made.path for made in head.artefacts("scan") if made.path not in bad}
        recovered = {name: rows.slice(0, 0) for name, rows in there.items()}
        if _lacks(head, "scans", bad):
            recovered["scans"] = _unknown("scans", _only(older_scans, "artefact", voxels), there["scans"])
        scans = _only(first_of_key("scans", joined("scans", [there["scans"], recovered["scans"]])), "artefact", voxels)
        by_scan, by_subject = (set(scans.column(key).to_pylist()) for key in ("scan", "subject"))
        tables: dict[StoredTable, pa.Table] = {"scans": scans}
        for name in (name for name in SCAN_COLUMNS if name != "scans"):
            if _lacks(head, name, bad):
                older = joined(name, list(_older_pieces(head, name, past, scans)))
                recovered[name] = _unknown(name, older, there[name])
            rows = first_of_key(name, joined(name, [there[name], recovered[name]]))
            tables[name] = _of_scans(name, rows, by_scan)
        gone = set(there["scans"].column("subject").to_pylist()) - by_subject
        stay = set(there["subjects"].column("subject").to_pylist()) - gone
        subjects = _only(first_of_key("subjects", there["subjects"]), "subject", stay)
        if _lacks(head, "subjects", bad):
            older = joined("subjects", list(_older_pieces(head, "subjects", past)))
            recovered["subjects"] = _unknown("subjects", _only(older, "subject", by_subject), subjects)
            subjects = _with_subjects(joined("subjects", [subjects, recovered["subjects"]]), scans)
        return cls(head, bad, names, there, recovered, {**tables, "subjects": subjects})

    def proposal(self) -> Proposal:
        """The change from the head to what is whole."""
        before = [made for made in self.head.manifest.artefacts if made.kind not in ("segment", "table")]
        scans = set(self._voxels_kept())
        encoders = {made.fields["encoder"] for made in self.head.artefacts("encoder")}
        drop = [
            made.path
            for made in before
            if (made.path in self.bad and made.kind != "encoder")
            or (made.kind == "scan" and made.path not in scans)
            or (made.kind in DERIVED and made.fields["encoder"] not in encoders)
        ]
        rewrite = {name: rows for name, rows in self.tables.items() if self._changed(name)}
        return Proposal(drop=drop, drop_segments=self.segments_lost(), rewrite=rewrite)

    def segments_lost(self) -> list[Segment]:
        """Parts of segments that are damaged, or whose voxels, encoder or tombstone are."""
        scans = set(self._voxels_kept())
        encoders = {made.fields["encoder"] for made in self.head.artefacts("encoder")}
        buried = {
            key for made in self.head.artefacts("tombstone") if made.path in self.bad for key in made.fields["dead"]
        }
        return [
            part
            for part in parts_in(self.head)
            if part.path in self.bad
            or part.scan_artefact not in scans
            or part.encoder not in encoders
            or part.key in buried  # what was deleted from it must not come back
        ]

    def add_again(self) -> list[str]:
        """Scans that leave the store: by id where it is known, else by the name of their voxels."""
        kept = set(self._voxels_kept())
        paths = {made.path for made in self.head.artefacts("scan")} | set(_by_voxels(self.there["scans"]))
        return sorted(self._name(path) for path in paths - kept)

    def encode_again(self) -> list[str]:
        """Scans that stay and have lost a segment."""
        kept = set(self._voxels_kept())
        return sorted({self._name(part.scan_artefact) for part in self.segments_lost() if part.scan_artefact in kept})

    def index_again(self) -> list[str]:
        """Encoders that have lost a frame, an index or regions."""
        derived = [made for made in self.head.manifest.artefacts if made.kind in DERIVED]
        return sorted({made.fields["encoder"] for made in derived if made.path in self.bad})

    def lost_rows(self) -> dict[str, int]:
        """How many rows of each table are nowhere; rows of subjects are told again by those of their scans."""
        lost: dict[str, int] = {}
        for name in STORED_TABLES:
            pieces = [made for made in self.head.artefacts("table") if made.fields["table"] == name]
            gone = sum(int(made.fields["rows"]) for made in pieces if made.path in self.bad)
            again = self.recovered[name].num_rows
            if name == "subjects":
                again = max(again, self.tables[name].num_rows - self.there[name].num_rows)
            lost[name] = max(0, gone - again)
        return lost

    def _voxels_kept(self) -> list[str]:
        paths: list[str] = self.tables["scans"].column("artefact").to_pylist()
        return paths

    def _changed(self, name: StoredTable) -> bool:
        same = self.tables[name].num_rows == self.there[name].num_rows
        return _lacks(self.head, name, self.bad) or not same

    def _name(self, path: str) -> str:
        """The id of a scan by its voxels: from any generation's rows, else from the rows of its segments."""
        if path not in self.names:
            for part in parts_in(self.head):
                if part.scan_artefact == path and (scan := _scan_in(part)):
                    return scan
        return self.names.get(path, Path(path).stem)


def _scan_in(part: Segment) -> str | None:
    """The scan that a segment's rows name; None when they cannot be read."""
    try:
        scans = part.patches(["scan"]).column("scan").to_pylist()
    except IsimedError:
        return None
    return str(scans[0]) if scans else None


def _pieces(head: Snapshot, name: StoredTable, bad: Mapping[str, str]) -> list[pa.Table]:
    pieces = [made for made in head.artefacts("table") if made.fields["table"] == name and made.path not in bad]
    return [rows for made in pieces if (rows := read_piece(head.storage, made)) is not None]


def _lacks(head: Snapshot, name: StoredTable, bad: Mapping[str, str]) -> bool:
    return any(made.path in bad for made in head.artefacts("table") if made.fields["table"] == name)


def _older_pieces(
    head: Snapshot, name: StoredTable, past: History, scans: pa.Table | None = None
) -> Iterator[pa.Table]:
    """Pieces of a table that only older generations have, the newest first.

    With `scans`, only rows of scans whose voxels were the same then: an id that was free may name another scan now.
    """
    seen = {made.path for made in head.manifest.artefacts}
    for manifest in past.manifests.values():
        for made in reversed(manifest.find("table")):
            if made.fields["table"] == name and made.path not in seen:
                seen.add(made.path)
                rows = read_piece(head.storage, made)
                if rows is not None:
                    yield rows if scans is None else _of_scans(name, rows, _unchanged(head.storage, manifest, scans))


def _unchanged(storage: Storage, manifest: Manifest, scans: pa.Table) -> set[str]:
    """Ids of the scans that had the same voxels in another generation."""
    now = _by_voxels(scans)
    pieces = [made for made in manifest.find("table") if made.fields["table"] == "scans"]
    then = [rows for made in pieces if (rows := read_piece(storage, made)) is not None]
    return {scan for rows in then for path, scan in _by_voxels(rows).items() if now.get(path) == scan}


def _only(rows: pa.Table, column: str, known: Set[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    return rows.filter(pc.is_in(rows.column(column), pa.array(sorted(known), pa.string())))


def _of_scans(name: StoredTable, rows: pa.Table, known: Set[str]) -> pa.Table:
    """The rows of a table all of whose scans are known."""
    for column in SCAN_COLUMNS[name]:
        rows = _only(rows, column, known)
    return rows


def _unknown(name: StoredTable, rows: pa.Table, there: pa.Table) -> pa.Table:
    """The rows whose key is not there, the first of each."""
    import pyarrow as pa

    keys = table_contract(name)["key"]
    have = set(zip(*(there.column(key).to_pylist() for key in keys), strict=True))
    new = [key not in have for key in zip(*(rows.column(key).to_pylist() for key in keys), strict=True)]
    return first_of_key(name, rows.filter(pa.array(new, pa.bool_())))


def _by_voxels(scans: pa.Table) -> dict[str, str]:
    return dict(zip(scans.column("artefact").to_pylist(), scans.column("scan").to_pylist(), strict=True))


def _with_subjects(subjects: pa.Table, scans: pa.Table) -> pa.Table:
    """Rows of subjects with one for every subject that has a scan, as adding writes them."""
    import pyarrow as pa

    known = set(subjects.column("subject").to_pylist())
    new: dict[str, dict[str, Any]] = {}
    for row in scans.to_pylist():
        if row["subject"] not in known:
            given = {key: row[key] for key in _FOR_SUBJECT if row.get(key) is not None}
            new.setdefault(row["subject"], {"subject": row["subject"], **given})
    if not new:
        return subjects
    fields = {name: [row.get(name) for row in new.values()] for name in ("subject", *_FOR_SUBJECT)}
    own = {name: pa.array(values, subjects.schema.field(name).type) for name, values in fields.items()}
    return joined("subjects", [subjects, pa.table(own)])
