"""The tables of a BIDS data set: `participants.tsv`, `sub-01_sessions.tsv`, `sub-01[_ses-1]_scans.tsv`.

They are read because they lie there, not because a person named them: columns that by their name or their cells hold
dates or the like are left out, and said so. (A table that is given with --metadata is kept as it is.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isimed_index.errors import UsageError
from isimed_index.scans.allowed import years
from isimed_index.scans.layouts.documents import read_object
from isimed_index.scans.layouts.found import Found
from isimed_index.scans.tables import Value, cell, column_name, read_table, typed

_PRIVATE_NAME = re.compile(
    r"(^|_)(acq_time|name|first_?name|surname|initials|birth\w*|dob|born|date\w*|time|\w*_date|address|street|city|zip|"
    r"postcode|phone|telephone|fax|e?mail|ssn|mrn|nhs\w*|insurance\w*|accession\w*|uid|\w+_uid|physician|doctor|comments?|"
    r"notes?|institution\w*|hospital|station\w*|serial\w*|url|ip)($|_)"
)
_DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}|(19|20)\d{2}(0[1-9]|1[0-2])[0-3]\d"
)
_Rows = Mapping[str, Mapping[str, Value]]


class Tables:
    """The tables of one data set; each is read once."""

    def __init__(self, root: Path, found: Found) -> None:
        self._root = root
        self._found = found
        self._left_out: dict[str, set[str]] = {}  # by table, columns
        self._age_unit = _unit_of_ages(read_object(root / "participants.json") or {})
        self._participants = self._read(root / "participants.tsv", "participant_id")
        self._read_files: dict[Path, _Rows] = {}

    def of_subject(self, subject: str) -> Mapping[str, Value]:
        """The row of a subject in `participants.tsv`."""
        return self._participants.get(subject, {})

    def of_scan(self, path: Path, subject: str, session: str | None) -> dict[str, Value]:
        """What the tables say of a scan: of its subject, then its session, then itself; the last one goes first."""
        top = self._root / subject
        folder = top if session is None else top / session
        prefix = subject if session is None else f"{subject}_{session}"
        rows = [
            self.of_subject(subject),
            self._cached(top / f"{subject}_sessions.tsv", "session_id").get(session or "", {}),
            self._cached(folder / f"{prefix}_scans.tsv", "filename").get(path.relative_to(folder).as_posix(), {}),
        ]
        return {column: value for row in rows for column, value in row.items() if value is not None}

    def notes(self) -> list[str]:
        """Which columns were left out."""
        return [
            f"columns of {table} that may tell who or when were left out: {', '.join(sorted(columns))}"
            for table, columns in sorted(self._left_out.items())
        ]

    def _cached(self, path: Path, key: str) -> _Rows:
        if path not in self._read_files:
            self._read_files[path] = self._read(path, key)
        return self._read_files[path]

    def _read(self, path: Path, key: str) -> _Rows:
        """Rows by their key; a row that is there twice with different cells is left out, and refused by name."""
        if not path.is_file():
            return {}
        try:
            table = read_table(path, "the table")
        except UsageError as error:
            self._found.refuse(path.name, error.message, error.next_step)
            return {}
        names = [column_name(column) for column in table.columns]
        if key not in names or len(set(names)) < len(names):
            self._found.refuse(path.name, f"it has no column {key}, or one twice", "mend its first line")
            return {}
        cells = {
            name: [cell(row[column]) for row in table.rows]
            for name, column in zip(names, table.columns, strict=True)
            if name
        }
        ids = cells.pop(key)
        kind = re.sub(r"(sub|ses)-[A-Za-z0-9]+_", "", path.name)
        columns = {
            name: self._typed(path, name, texts) for name, texts in cells.items() if self._keeps(kind, name, texts)
        }
        rows: dict[str, dict[str, Value]] = {}
        conflicting: dict[str, str] = {}
        for number, one in enumerate(ids):
            row = {name: values[number] for name, values in columns.items()}
            if one is not None and rows.setdefault(one, row) != row:
                conflicting[one] = ", ".join(name for name in row if row[name] != rows[one][name])
        for one, differ in conflicting.items():
            del rows[one]
            self._found.refuse(path.name, f"it has rows of {one} that differ in {differ}", "keep one of the rows")
        return rows

    def _keeps(self, kind: str, name: str, texts: list[str | None]) -> bool:
        filled = [text for text in texts if text is not None]
        private = _PRIVATE_NAME.search(name) is not None or any(map(_DATE.fullmatch, filled))
        if private:
            self._left_out.setdefault(kind, set()).add(name)
        return not private

    def _typed(self, path: Path, name: str, texts: list[str | None]) -> list[Value]:
        """Cells as values. Ages are years, whatever their row: one that is no number is missing, and said to be."""
        if name == "sex":
            return list(texts)
        if name != "age":
            return typed(texts)
        if self._age_unit is not None and path.name == "participants.tsv":
            self._found.notes.append(f"{path.name}: ages are in {self._age_unit!r}, not in years, and were left out")
            return [None] * len(texts)
        ages: list[Value] = [None if text is None else years(text.removesuffix("+")) for text in texts]
        unread = sum(age is None and text is not None for age, text in zip(ages, texts, strict=True))
        if unread:
            self._found.notes.append(f"{path.name}: {unread} ages are no numbers and were left out")
        return ages


def _unit_of_ages(description: Mapping[str, Any]) -> str | None:
    """The unit that `participants.json` gives for ages, when it is another one than years."""
    age = description.get("age")
    unit = str(age.get("Units") or "") if isinstance(age, dict) else ""
    return unit[:20] if unit and not unit.strip().lower().startswith("y") else None
