"""Rows of `scans`, `subjects` and `labels` for files that were taken, and what a batch adds to the head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isimed_index.contracts import TableName, arrow_schema, conform
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.take import SIZES, Staged
from isimed_index.scans.discover import unique_ids
from isimed_index.scans.layouts.found import Image
from isimed_index.scans.metadata import Metadata
from isimed_index.scans.tables import Value
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal

if TYPE_CHECKING:
    import pyarrow as pa

_SUBJECT_COLUMNS = ("sex", "age")
_TEXTS = ("subject", "session", "modality", "split", "sex")  # columns that are texts, whatever a code looks like
# Those that the file alone fills.
_BY_FILE = ("scan", *SIZES, "orientation", "stated_orientation", "format", "digest", "artefact", "study_day")


def proposal(staged: Sequence[Staged], metadata: Metadata, head: Snapshot) -> Proposal:
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
            "subjects": _table("subjects", _subject_rows(fresh, rows, metadata, subjects)),
            "labels": _table("labels", labels),
        },
    )


def _free_ids(items: Sequence[Staged], taken: set[str]) -> list[str]:
    """Each item's name, or, where another scan has it already, its folder's name before it and then a number."""
    ids = []
    for item in items:
        scan = item.file.name
        if scan in taken and (item.file.series or item.file.hidden or item.file.image):  # the same with other content
            scan = next(name for n in itertools.count(2) if (name := f"{item.file.name}-{n}") not in taken)
        elif scan in taken:
            scan = unique_ids([item.file.path], taken, _ending(item))[0]
        taken.add(scan)
        ids.append(scan)
    return ids


def _ending(item: Staged) -> str:
    """What the ids of one volume of several end in."""
    return f"_vol-{item.row['volume']}" if "volume" in item.row else ""


def _scan_row(item: Staged, scan: str, metadata: Metadata) -> dict[str, Any]:
    """A row of `scans`: the file's own facts, those of its data set, and what the tables of metadata say.

    A scan whose names say no subject is its own: its id is unique, a stem such as `T1` is not. So is each volume of
    a file: nothing that is stored says which file a volume came from, and two people must not become one.
    """
    given = given_of(item.file, scan, metadata)
    own = {"scan": scan, **item.row, "subject": item.file.subject or scan}
    row = own | {
        key: value for key, value in given.items() if key not in own or (value is not None and key != "volume")
    }
    if item.file.series and item.file.series.day:
        row["study_day"] = item.file.series.day.number(row["subject"])
    return row


def given_of(file: Chosen, scan: str, metadata: Metadata) -> dict[str, Value]:
    """What is known of a scan beside its file: by its data set, and, going before that, by the tables given.

    `ScanRefused` where the tables contradict themselves.
    """
    told = {} if file.image is None else _told(file.image)
    given = _typed(metadata.of(file.called(scan)))
    if file.hidden:
        subject, session = given.get("subject"), given.get("session")
        whose = None if subject is None else str(subject)
        given |= {} if whose is None else {"subject": file.hidden.subject_id(whose)}
        given |= {} if session is None else {"session": file.hidden.session_id(str(session), whose)}
    return told | {key: value for key, value in given.items() if value is not None or key not in told}


def _told(image: Image) -> dict[str, Value]:
    facts = {key: value for key, value in _typed(image.facts).items() if key not in ("subject", "session")}
    said = {"modality": image.modality, "split": image.split}
    return facts | {key: value for key, value in said.items() if value is not None}


def _typed(extra: Mapping[str, Value]) -> dict[str, Value]:
    """What may be said of a scan: its facts come from the file; our own other columns are texts, an age is a number."""
    free = {key: value for key, value in extra.items() if key not in _BY_FILE}
    free |= {key: str(free[key]) for key in _TEXTS if free.get(key) is not None}
    age = free.get("age")
    return free if age is None or isinstance(age, str) else free | {"age": float(age)}


def person_of(file: Chosen, scan: str, metadata: Metadata) -> dict[str, Value]:
    """Columns of `subjects` that the data set and the tables give to the person in a scan."""
    told = {} if file.image is None else {k: v for k, v in file.image.person.items() if v is not None}
    given = {k: v for k, v in metadata.of_subject(file.called(scan)).items() if v is not None}
    person = _typed(told | given)
    return {key: value for key, value in person.items() if key not in ("subject", "session", "modality", "split")}


def _subject_rows(
    items: Sequence[Staged], rows: Sequence[Mapping[str, Any]], metadata: Metadata, known: set[str]
) -> list[dict[str, Any]]:
    """A row for each person who is new: what is said of the person, else what is said of the first scan."""
    new: dict[str, dict[str, Any]] = {}
    for item, row in zip(items, rows, strict=True):
        subject = row["subject"]
        if subject not in known and subject not in new:
            first = {key: row.get(key) for key in _SUBJECT_COLUMNS}
            new[subject] = {"subject": subject, **first, **person_of(item.file, row["scan"], metadata)}
    return list(new.values())


def _table(name: TableName, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    if not rows:
        return arrow_schema(name).empty_table()
    columns = dict.fromkeys(key for row in rows for key in row)
    return conform(name, pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns}))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return str(kind) in ("string", "large_string")


def holds(kind: pa.DataType, value: Value) -> bool:
    """Whether a column of this type can hold a value as it is, as a real number, or as a text."""
    if is_text(kind) or str(kind) == "null":
        return True
    return not isinstance(value, str) and isinstance(value, bool) == (str(kind) == "bool")


def digests(snapshot: Snapshot) -> dict[str, str]:
    rows = snapshot.table("scans")
    return dict(zip(rows.column("digest").to_pylist(), rows.column("scan").to_pylist(), strict=True))


def unnamed(staged: Sequence[Staged]) -> set[int]:
    return {row["label"] for item in staged for row in item.labels if row["name"] is None}


def overlaps(staged: Sequence[Staged]) -> list[int]:
    return [item.row["label_overlap_voxels"] for item in staged if "label_overlap_voxels" in item.row]
