"""Rows of `scans`, `subjects` and `labels` for files that were taken, and what a batch adds to the head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isimed_index.contracts import TableName, arrow_schema, conform
from isimed_index.errors import ScanRefused
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.report import Refusal
from isimed_index.ingest.take import SIZES, Staged
from isimed_index.scans.discover import stem, unique_ids
from isimed_index.scans.metadata import Value, plain_number
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal

if TYPE_CHECKING:
    import pyarrow as pa

_SUBJECT_COLUMNS = ("sex", "age")
_SETTABLE = ("subject", "session", "modality", "split")  # our own columns of `scans` that a metadata table may fill
_BY_FILE = ("scan", *SIZES, "orientation", "format", "digest", "artefact")  # those that the file alone fills


def proposal(staged: Sequence[Staged], metadata: Mapping[str, Mapping[str, Value]], head: Snapshot) -> Proposal:
    """What a batch adds to the head: ids are given here, and content that another process added is left out."""
    known = digests(head)
    fresh = [item for item in staged if item.digest not in known]
    ids = _free_ids(fresh, set(head.scan_ids()))
    rows = [_scan_row(item, scan, metadata) for item, scan in zip(fresh, ids, strict=True)]
    subjects = set(head.table("subjects").column("subject").to_pylist())
    labels = [{"scan": scan, **row} for item, scan in zip(fresh, ids, strict=True) for row in item.labels]
    return Proposal(
        add=[item.artefact for item in fresh],
        tables={
            "scans": _table("scans", rows),
            "subjects": _table("subjects", _subject_rows(rows, subjects)),
            "labels": _table("labels", labels),
        },
    )


def _free_ids(items: Sequence[Staged], taken: set[str]) -> list[str]:
    """Each item's name, or, where another scan has it already, its folder's name before it and then a number."""
    ids = []
    for item in items:
        scan = item.file.name
        if scan in taken and item.file.series is not None:  # the same series with other content
            scan = next(name for n in itertools.count(2) if (name := f"{item.file.name}-{n}") not in taken)
        elif scan in taken:
            scan = unique_ids([item.file.path], taken)[0]
        taken.add(scan)
        ids.append(scan)
    return ids


def _scan_row(item: Staged, scan: str, metadata: Mapping[str, Mapping[str, Value]]) -> dict[str, Any]:
    """A row of `scans`: the file's own facts, and the metadata found by scan id, file stem or subject.

    A scan whose names say no subject is its own: its id is unique, a stem such as `T1` is not.
    """
    given = _given(_metadata_of(metadata, scan, stem(item.file.path), item.file.subject))
    own = {"scan": scan, **item.row, "subject": item.file.subject or scan}
    return own | {key: value for key, value in given.items() if key not in own or value is not None}


def _metadata_of(metadata: Mapping[str, Mapping[str, Value]], *keys: str | None) -> Mapping[str, Value]:
    """The metadata under the first of the keys that has any."""
    return next((metadata[key] for key in keys if key is not None and key in metadata), {})


def _given(extra: Mapping[str, Value]) -> dict[str, Value]:
    """What a row of metadata may say of a scan: its facts come from the file, its own other columns are text."""
    free = {key: value for key, value in extra.items() if key not in _BY_FILE}
    return free | {key: str(free[key]) for key in _SETTABLE if free.get(key) is not None}


def _subject_rows(rows: Sequence[Mapping[str, Any]], known: set[str]) -> list[dict[str, Any]]:
    new: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["subject"] not in known:
            new.setdefault(row["subject"], {"subject": row["subject"], **{k: row.get(k) for k in _SUBJECT_COLUMNS}})
    return list(new.values())


def _table(name: TableName, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    if not rows:
        return arrow_schema(name).empty_table()
    columns = dict.fromkeys(key for row in rows for key in row)
    return conform(name, pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns}))


def digests(snapshot: Snapshot) -> dict[str, str]:
    rows = snapshot.table("scans")
    return dict(zip(rows.column("digest").to_pylist(), rows.column("scan").to_pylist(), strict=True))


def labelled(snapshot: Snapshot) -> set[str]:
    return set(snapshot.table("labels").column("scan").to_pylist())


def unnamed(staged: Sequence[Staged]) -> set[int]:
    return {row["label"] for item in staged for row in item.labels if row["name"] is None}


def late_labels() -> ScanRefused:
    return ScanRefused(
        "the scan is stored already, without labels; a stored scan is not given labels later",
        next_step="add it with its labels to a new store",
    )


def late_metadata(
    files: Sequence[tuple[Chosen, str]], metadata: Mapping[str, Mapping[str, Value]], snapshot: Snapshot
) -> Iterator[Refusal]:
    """A refusal for each file with a stored digest whose metadata say something else than the stored row does."""
    stored = {row["digest"]: row for row in snapshot.table("scans").to_pylist()}
    for file, digest in files:
        row = stored[digest]
        name, scan = stem(file.path), row["scan"]
        keys = (scan, name) if name in scan else (name, scan)  # a copy under another name has its own metadata
        given = _given(_metadata_of(metadata, *keys, file.subject, row["subject"]))
        late = [key for key, value in given.items() if value is not None and not _same(value, row.get(key))]
        if late:
            error = ScanRefused(
                f"the scan is stored already, with other metadata ({', '.join(late)}); a stored scan keeps its own",
                next_step="add it with its metadata to a new store",
            )
            yield Refusal.of(file.path.name, error)


def _same(given: Value, stored: Value) -> bool:
    """Whether two cells say the same; the type that a column got may differ from one table to the next."""
    if given == stored or stored is None:
        return given == stored
    texts = str(given), str(stored)
    number = plain_number(texts[0])
    return texts[0] == texts[1] or (number is not None and number == plain_number(texts[1]))
