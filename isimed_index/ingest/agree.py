"""What must agree before anything is read: tables of metadata with themselves, and each subject with one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from isimed_index.errors import ScanRefused
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.report import AddReport, Refusal
from isimed_index.ingest.rows import given_of, holds, is_text
from isimed_index.scans.layouts.found import some
from isimed_index.scans.metadata import Metadata
from isimed_index.scans.tables import Value
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa


def agreeing(chosen: Sequence[Chosen], metadata: Metadata, head: Snapshot, report: AddReport) -> list[Chosen]:
    """The files of which nothing contradictory is said; the others are refused by name in the report.

    Rows of the tables that are about none of the files, nor about a scan or subject of the store, are noted.
    """
    chosen = _with_stored_types(chosen, head, report)
    everyone = [file.called(file.name) for file in chosen]
    wrong: dict[int, ScanRefused] = {
        place: ScanRefused(message, next_step="name the scan in the table, or the end of the file's path")
        for place, message in metadata.ambiguous(everyone).items()
    }
    splits: dict[str, set[str]] = {}
    for row in head.table("scans").select(["subject", "split"]).to_pylist():
        if row["split"] is not None:
            splits.setdefault(row["subject"], set()).add(row["split"])
    mine: dict[int, tuple[str, str]] = {}  # subject and split
    for place, file in enumerate(chosen):
        try:
            given = given_of(file, file.name, metadata)
        except ScanRefused as error:
            wrong.setdefault(place, error)
            continue
        subject, split = given.get("subject") or file.subject or file.name, given.get("split")
        if split is not None:
            mine[place] = str(subject), str(split)
            splits.setdefault(str(subject), set()).add(str(split))
    for place, (subject, _) in mine.items():
        if len(splits[subject]) > 1:
            wrong.setdefault(
                place,
                ScanRefused(
                    f"its subject would be in more than one split ({', '.join(sorted(splits[subject]))})",
                    next_step="put all scans of a subject into one split",
                ),
            )
    for place in sorted(wrong):
        report.refused.append(Refusal.of(chosen[place].shown, wrong[place]))
    _note_unmatched(metadata, chosen, head, report)
    return [file for place, file in enumerate(chosen) if place not in wrong]


def _with_stored_types(chosen: Sequence[Chosen], head: Snapshot, report: AddReport) -> list[Chosen]:
    """The files with facts of their data sets that the columns of the store can hold.

    Two data sets may mean different things by one column. Numbers go into a column of texts; a text that would have to
    go into a column of numbers is left out, and said to be, for nobody named that table.
    """
    scans, subjects = head.table("scans").schema, head.table("subjects").schema
    left: set[str] = set()

    def turned(facts: Mapping[str, Value], schema: pa.Schema) -> dict[str, Value]:
        kept = {}
        for column, value in facts.items():
            kind = schema.field(column).type if column in schema.names else None
            if kind is None or value is None or holds(kind, value):
                kept[column] = str(value) if kind is not None and value is not None and is_text(kind) else value
            else:
                left.add(column)
        return kept

    fitting = [
        file
        if file.image is None
        else replace(
            file,
            image=replace(
                file.image, facts=turned(file.image.facts, scans), person=turned(file.image.person, subjects)
            ),
        )
        for file in chosen
    ]
    if left:
        report.notes.append(
            f"columns that hold another type in the store than in this data set were left out: "
            f"{', '.join(sorted(left))}"
        )
    return fitting


def _note_unmatched(metadata: Metadata, chosen: Sequence[Chosen], head: Snapshot, report: AddReport) -> None:
    """A typing error in a table loses its row: rows that nothing was found for are told of."""
    stored = head.table("scans").select(["scan", "subject"])
    known = {value for column in stored.columns for value in column.to_pylist()}
    for table, rows in metadata.unmatched([file.called(file.name) for file in chosen]).items():
        left = [row for row in rows if row not in known]
        if left:
            report.notes.append(
                f"{len(left)} rows of the metadata table {table} are about no scan that was given or is stored: "
                f"{some(left)}"
            )
