"""Whether what a generation names fits together: rows, row ids, references, coverage; no file is hashed here.

tables ── rows, keys ── scans ↔ voxels ── segments ── encoders
                                             ├── tombstones name rows of them
                                             └── indexes and regions cover rows of them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isimed_index.contracts import arrow_schema, table_contract
from isimed_index.errors import IsimedError, StoreUnreadable
from isimed_index.store.checks import check_coverage
from isimed_index.store.files import CARD, MODEL, WEIGHTS, file_digest
from isimed_index.store.integrity import check_hash, check_size
from isimed_index.store.manifest import Artefact
from isimed_index.store.place.faults import spare
from isimed_index.store.place.storage import Storage
from isimed_index.store.regions import read_regions
from isimed_index.store.segment import LATTICE, Segment, check_segment, parts_of
from isimed_index.store.snapshot import SCAN_COLUMNS, STORED_TABLES, Snapshot, StoredTable
from isimed_index.store.upkeep.findings import Finding

if TYPE_CHECKING:
    import pyarrow as pa

CHARTS = "charts.parquet"  # of a frame


def read_piece(storage: Storage, artefact: Artefact) -> pa.Table | None:
    """The rows of a piece of a table, read past the process's memory of good hashes; None unless it is as committed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        path = check_size(storage, artefact)
        check_hash(path, artefact)
        rows = pq.read_table(path, partitioning=None)
    except StoreUnreadable:
        raise
    except (OSError, pa.ArrowException) as error:
        spare(error, f"the table {artefact.name}")
        return None
    return rows if rows.num_rows == artefact.fields["rows"] else None


def joined(name: StoredTable, pieces: Sequence[pa.Table]) -> pa.Table:
    """Pieces of a table as one, the contract's columns first."""
    import pyarrow as pa

    return pa.concat_tables([arrow_schema(name).empty_table(), *pieces], promote_options="permissive")


def first_of_key(name: StoredTable, rows: pa.Table) -> pa.Table:
    """The first row of each key of a table, in order."""
    import pyarrow as pa

    keys = list(zip(*(rows.column(column).to_pylist() for column in table_contract(name)["key"]), strict=True))
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    return rows if len(first) == len(keys) else rows.take(pa.array(sorted(first.values()), pa.int64()))


@dataclass(frozen=True, slots=True, eq=False)
class Soundness:
    """The checks of one generation; artefacts in `bad` are known to be damaged and are left out."""

    head: Snapshot
    bad: Set[str]
    tables: dict[StoredTable, pa.Table]  # rows of the pieces that are good
    hashed: Set[str]  # paths of artefacts that were read whole: weights are compared with cards for these

    @classmethod
    def of(cls, head: Snapshot, bad: Set[str], hashed: Set[str]) -> Soundness:
        """The checks of a generation, its tables read."""
        return cls(head, bad, {name: _good_rows(head, name, bad) for name in STORED_TABLES}, hashed)

    def findings(self) -> Iterator[Finding]:
        """Everything in this generation that does not fit."""
        yield from self._keys()
        yield from self._scans()
        yield from self._row_ids()
        for artefact in self.head.manifest.artefacts:
            check = _CHECKS.get(artefact.kind)
            if check is not None and artefact.path not in self.bad:
                yield from self._guarded(check, artefact)

    def _guarded(self, check: Check, artefact: Artefact) -> list[Finding]:
        """What a check finds; one that cannot go on is a finding too."""
        kind = _FORMS[artefact.kind]
        try:
            return list(check(self, artefact))
        except StoreUnreadable:
            raise
        except IsimedError as error:
            return [Finding.of(kind, artefact.path, error.message)]
        except Exception as error:  # noqa: BLE001 — whatever a parser makes of damaged bytes is a finding
            spare(error, f"the {artefact.kind} {artefact.name}")
            return [Finding.of(kind, artefact.path, f"a {artefact.kind} cannot be read ({type(error).__name__})")]

    def scans_of(self, artefact: Artefact) -> list[str]:
        """Ids of the scans that an artefact holds, or holds rows of."""
        names = dict(zip(*(self.tables["scans"].column(key).to_pylist() for key in ("artefact", "scan")), strict=True))
        paths = [artefact.path] if artefact.kind == "scan" else []
        if artefact.kind == "segment":
            paths = [part["scan_artefact"] for part in parts_of(artefact)]
        return [names[path] for path in paths if path in names]

    def whole(self, name: StoredTable) -> bool:
        """Whether every piece of a table is good."""
        return not any(
            piece.path in self.bad for piece in self.head.artefacts("table") if piece.fields["table"] == name
        )

    def known(self, kind: str, field: str = "") -> set[str]:
        """Paths, or one field, of the artefacts of a kind."""
        return {made.fields[field] if field else made.path for made in self.head.artefacts(kind)}

    def _keys(self) -> Iterator[Finding]:
        for name, rows in self.tables.items():
            again = rows.num_rows - first_of_key(name, rows).num_rows
            if again:
                pieces = [piece.path for piece in self.head.artefacts("table") if piece.fields["table"] == name]
                yield Finding.of("key_repeated", pieces[-1], f"{again} rows of the table {name} repeat a key")

    def _scans(self) -> Iterator[Finding]:
        scans, voxels = self.tables["scans"], self.known("scan")
        for scan, path in zip(scans.column("scan").to_pylist(), scans.column("artefact").to_pylist(), strict=True):
            if path not in voxels:
                yield Finding.of("scan_without_voxels", "", "a row of scans names voxels that are not there", [scan])
        if not self.whole("scans"):
            return  # what follows from lost rows is no finding of its own
        for path in sorted(voxels - set(scans.column("artefact").to_pylist())):
            yield Finding.of("voxels_without_scan", path, "voxels have no row in scans")
        known = set(scans.column("scan").to_pylist())
        for name, columns in SCAN_COLUMNS.items():
            rows = self.tables[name]
            lost = sorted({scan for column in columns for scan in rows.column(column).to_pylist()} - known)
            if lost:
                yield Finding.of("row_without_scan", "", f"{name} of {len(lost)} scans that are not there", lost)

    def _row_ids(self) -> Iterator[Finding]:
        spans = sorted(
            ((part.first_row_id, part.end_row_id, part.artefact) for part in parts_in(self.head)),
            key=lambda span: span[:2],
        )
        for (_, end, _), (first, _, later) in pairwise(spans):
            if first < end:
                yield Finding.of(
                    "row_ids_overlap", later.path, "two segments hold the same row ids", self.scans_of(later)
                )
        for _, end, made in spans:
            if end > self.head.manifest.next_row_id:
                yield Finding.of(
                    "row_ids_beyond", made.path, "a segment holds row ids that were never given", self.scans_of(made)
                )


def parts_in(head: Snapshot) -> list[Segment]:
    """The parts of all segments of a generation, dead rows included; no file is opened."""
    return [Segment(head.storage, made, part) for made in head.artefacts("segment") for part in parts_of(made)]


def _good_rows(head: Snapshot, name: StoredTable, bad: Set[str]) -> pa.Table:
    pieces = [piece for piece in head.artefacts("table") if piece.fields["table"] == name and piece.path not in bad]
    return joined(name, [rows for piece in pieces if (rows := read_piece(head.storage, piece)) is not None])


def _segment(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    scans = sound.scans_of(artefact)
    path = sound.head.storage.fetch(artefact.path)
    check_segment(path, artefact.fields)
    lattices = json.loads((path / LATTICE).read_text(encoding="utf-8"))
    for part in parts_in(sound.head):
        if part.path != artefact.path:
            continue
        if not isinstance(lattices[int(part.part["part"])] if "part" in part.part else lattices, dict):
            yield Finding.of("segment_form", artefact.path, f"{LATTICE} of a segment is malformed", scans)
        if not _rising(part, path):
            yield Finding.of("segment_rows", artefact.path, "row ids of a segment are not those it was given", scans)
        if part.scan_artefact not in sound.known("scan"):
            yield Finding.of("segment_without_scan", artefact.path, "a segment was made from voxels not there", scans)
    if artefact.fields["encoder"] not in sound.known("encoder", "encoder"):
        yield Finding.of("encoder_unknown", artefact.path, "a segment was made by an encoder that is not there", scans)


def _rising(part: Segment, directory: Path) -> bool:
    ids = part.row_ids_in(directory)
    inside = not ids.size or (ids[0] >= part.first_row_id and ids[-1] < part.end_row_id)
    return bool(inside and (np.diff(ids) > 0).all() and ids.size == part.stored_rows)


def _encoder(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    path = sound.head.storage.fetch(artefact.path)
    card = json.loads((path / CARD).read_text(encoding="utf-8"))
    if card["id"] != artefact.fields["encoder"]:
        yield Finding.of("encoder_mismatch", artefact.path, "an encoder's card carries another id than its manifest")
    for name, sha256 in ((WEIGHTS, card["weights_sha256"]), (MODEL, card.get("model_sha256"))):
        if sha256 is not None and artefact.path in sound.hashed and file_digest(path / name)[1] != sha256:
            yield Finding.of("weights_mismatch", artefact.path, f"{name} does not match the hash on its card")


def _frame(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    charted = set(charted_scans(sound.head.storage.fetch(artefact.path)))
    yield from _made_by_known(sound, artefact)
    if sound.whole("scans"):
        unknown = sorted(charted - set(sound.tables["scans"].column("scan").to_pylist()))
        if unknown:
            message = f"a frame has charts of {len(unknown)} scans that are not there"
            yield Finding.of("chart_of_unknown_scan", artefact.path, message, unknown, "info")


def charted_scans(frame: Path) -> list[str]:
    """Ids of the scans that a frame's folder has charts of."""
    import pyarrow.parquet as pq

    scans: list[str] = pq.read_table(frame / CHARTS, columns=["scan"], partitioning=None).column("scan").to_pylist()
    return scans


def _index(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    yield from _made_by_known(sound, artefact)
    check_coverage(artefact, sound.head.manifest.artefacts, sound.head.manifest.next_row_id)
    json.loads((sound.head.storage.fetch(artefact.path) / "index.json").read_text(encoding="utf-8"))


def _region(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    yield from _made_by_known(sound, artefact)
    check_coverage(artefact, sound.head.manifest.artefacts, sound.head.manifest.next_row_id)
    read_regions(sound.head.storage.fetch(artefact.path))


def _made_by_known(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    if artefact.fields["encoder"] not in sound.known("encoder", "encoder"):
        message = f"a {artefact.kind} was made by an encoder that is not there"
        yield Finding.of("encoder_unknown", artefact.path, message)


def _tombstone(sound: Soundness, artefact: Artefact) -> Iterator[Finding]:
    import pyarrow.parquet as pq

    path = sound.head.storage.fetch(artefact.path)
    rows = np.sort(pq.read_table(path, partitioning=None).column("patch").to_numpy())
    spans = {part.key: (part.first_row_id, part.end_row_id) for part in parts_in(sound.head)}
    counted = all(
        int(np.diff(np.searchsorted(rows, spans[key]))[0]) == count
        for key, count in artefact.fields["dead"].items()
        if key in spans
    )
    if len(rows) != artefact.fields["rows"] or not counted:
        yield Finding.of("tombstone_damaged", artefact.path, "a tombstone has lost rows")


Check = Callable[[Soundness, Artefact], Iterator[Finding]]
_CHECKS: dict[str, Check] = {
    "segment": _segment,
    "encoder": _encoder,
    "frame": _frame,
    "index": _index,
    "region": _region,
    "tombstone": _tombstone,
}
_FORMS = {  # what is said of an artefact that cannot be checked, by its kind
    "segment": "segment_form",
    "encoder": "encoder_mismatch",
    "frame": "frame_form",
    "index": "index_coverage",
    "region": "region_form",
    "tombstone": "tombstone_damaged",
}
