"""Metadata tables: rows by scan, by session of a subject, or by subject; cells typed as what they plainly are.

    scan, file or filename                    a row is one scan's      (a file by its name, or by the end of its path)
    participant_id, subject, subject_id       a row is a subject's     (all its scans get it)
      and session or session_id beside it     a row is one session's

Where several rows speak of a scan, that of the scan itself goes before its session's, and that before its subject's.
Rows that contradict each other are kept apart: who asks for them is told, and everyone else gets theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans.tables import Value, cell, column_name, plain_number, read_table, typed

_SCAN_KEYS = ("scan", "file", "filename")
_SUBJECT_KEYS = ("participant_id", "subject", "subject_id")
_SESSION_KEYS = ("session", "session_id")
_TEXTS = ("subject", "session", "modality", "split", "sex")  # codes such as 1 and 2 stay texts
Level = Literal["subject", "session", "scan"]  # from the most general to the most special
_LEVELS: tuple[Level, ...] = ("subject", "session", "scan")
Key = tuple[str, ...]  # (scan,), (subject, session) or (subject,)


@dataclass(frozen=True, slots=True)
class Who:
    """What a scan may be called in a table: its id, the names of its file, its subject and session."""

    scan: str
    files: tuple[str, ...] = ()  # its stem, its name, and the ends of its path: `T1`, `T1.nii`, `anat/T1.nii`, …
    subject: str | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """One table: rows by what they are about, and why some of them cannot be used."""

    name: str
    level: Level
    rows: Mapping[Key, Mapping[str, Value]]
    conflicts: Mapping[Key, str] = field(default_factory=dict)
    sessions: Mapping[str, list[Key]] = field(default_factory=dict)  # by subject, where rows are about sessions

    def key_of(self, who: Who) -> Key | None:
        """Which of the rows is about a scan, if one is."""
        if self.level == "session":
            if who.subject is None:
                return None
            sessions = self.sessions.get(who.subject, [])
            if who.session is None:
                return sessions[0] if len(sessions) == 1 else None
            return next((key for key in sessions if key[1] == who.session), None)
        last = () if self.level == "scan" or who.subject is None else (who.subject,)
        return next(((name,) for name in (who.scan, *who.files, *last) if (name,) in self.rows), None)


@dataclass(frozen=True, slots=True)
class Metadata:
    """All tables that were given."""

    tables: tuple[Table, ...] = ()

    def resolved(self, who: Who) -> Who:
        """The same, with the subject and session that a row of the scan gives it."""
        own = self._at("scan", who)
        subject, session = own.get("subject"), own.get("session")
        return replace(
            who,
            subject=who.subject if subject is None else str(subject),
            session=who.session if session is None else str(session),
        )

    def of(self, who: Who) -> dict[str, Value]:
        """What the tables say of a scan; `ScanRefused` where they contradict themselves or each other."""
        who = self.resolved(who)
        merged: dict[str, Value] = {}
        for level in _LEVELS:
            merged |= {column: value for column, value in self._at(level, who).items() if value is not None}
        return merged

    def of_subject(self, who: Who) -> dict[str, Value]:
        """What the tables say of the person in a scan; `ScanRefused` as `of`."""
        return self._at("subject", self.resolved(who))

    def _at(self, level: Level, who: Who) -> dict[str, Value]:
        merged: dict[str, Value] = {}
        source: dict[str, str] = {}
        for table in self.tables:
            key = table.key_of(who) if table.level == level else None
            if key is None:
                continue
            if key in table.conflicts:
                raise ScanRefused(
                    f"the metadata table {table.name} says different things of {_spoken(key)}: {table.conflicts[key]}",
                    next_step="keep one of the rows",
                )
            for column, value in table.rows[key].items():
                if value is None:
                    merged.setdefault(column, None)
                elif merged.get(column) not in (None, value):
                    raise ScanRefused(
                        f"the metadata tables {source[column]} and {table.name} say different things of "
                        f"{_spoken(key)} in the column {column}",
                        next_step="mend one of the tables",
                    )
                else:
                    merged[column], source[column] = value, table.name
        return merged

    def ambiguous(self, everyone: Sequence[Who]) -> dict[int, str]:
        """By place in `everyone`: who is called by a row that calls another one by the same file name as well."""
        called: dict[tuple[str, Key], list[int]] = {}
        for table in self.tables:
            if table.level == "scan":
                for place, who in enumerate(everyone):
                    key = table.key_of(who)
                    if key not in (None, (who.scan,)):
                        called.setdefault((table.name, key or ()), []).append(place)
        return {
            place: f"the row {key[0]!r} of the metadata table {table} is about {len(places)} files of that name"
            for (table, key), places in called.items()
            if len(places) > 1
            for place in places
        }

    def unmatched(self, everyone: Iterable[Who]) -> dict[str, list[str]]:
        """By table: what its rows are about that are about none of these scans."""
        who = [self._resolved_or_not(one) for one in everyone]
        left = {}
        for table in self.tables:
            matched = {table.key_of(one) for one in who}
            if rest := [_spoken(key) for key in table.rows if key not in matched]:
                left[table.name] = rest
        return left

    def _resolved_or_not(self, who: Who) -> Who:
        try:
            return self.resolved(who)
        except ScanRefused:
            return who


def _spoken(key: Key) -> str:
    return " ".join(key)


def read_metadata(paths: Sequence[Path]) -> Metadata:
    """Read CSV and TSV tables; a column becomes integer or float when all its filled cells, in all tables, read as one.

    Empty cells and `n/a` are missing. `UsageError` for a table without a column that says whom its rows are about,
    with two columns of one name, or with ages that are no numbers.
    """
    return Metadata(tuple(_with_types([text_table(path) for path in paths])))


@dataclass(frozen=True, slots=True)
class Texts:
    """One table before its cells are typed: keys and cells row by row, and the lines they stand on."""

    name: str
    level: Level
    keys: list[Key]
    lines: list[int]
    cells: dict[str, list[str | None]]


def text_table(path: Path) -> Texts:
    """Read a table and find out whom its rows are about."""
    table = read_table(path, "the metadata table")
    names = [column_name(column) for column in table.columns]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"the metadata table {path.name} has two columns {twice!r}", next_step="rename or remove one of them"
        )
    by_name = dict(zip(names, table.columns, strict=True))
    cells = {name: [cell(row[column]) for row in table.rows] for name, column in by_name.items() if name}
    level, keys = _keys(path.name, cells)
    kept = [number for number, key in enumerate(keys) if all(key)]
    _check_ages(path.name, cells.get("age", ()))
    return Texts(
        path.name,
        level,
        [keys[number] for number in kept],
        [table.lines[number] for number in kept],
        {name: [column[number] for number in kept] for name, column in cells.items()},
    )


def _keys(name: str, cells: dict[str, list[str | None]]) -> tuple[Level, list[Key]]:
    """What level a table is of, and whom each row is about; the columns that say so are taken out of `cells`."""
    scan, subject, session = (
        next((key for key in keys if key in cells), None) for keys in (_SCAN_KEYS, _SUBJECT_KEYS, _SESSION_KEYS)
    )
    if scan is not None:
        keys: list[Key] = [(_file_key(text or ""),) for text in cells.pop(scan)]
        for own, given in (("subject", subject), ("session", session)):
            if given is not None:
                cells[own] = cells.pop(given)
        return "scan", keys
    if subject is None:
        raise UsageError(
            f"the metadata table {name} has none of the columns {', '.join((*_SCAN_KEYS, *_SUBJECT_KEYS))}",
            next_step="name the column with the ids participant_id",
        )
    subjects = cells.pop(subject)
    if session is None:
        return "subject", [(text or "",) for text in subjects]
    sessions = cells[session] if session == "session" else cells.pop(session)
    cells["session"] = sessions
    if not all(sessions):  # then it is a fact of the row, not what the row is about
        return "subject", [(text or "",) for text in subjects]
    return "session", [(one or "", other or "") for one, other in zip(subjects, sessions, strict=True)]


def _file_key(text: str) -> str:
    return text.replace("\\", "/").removeprefix("./")


def _check_ages(name: str, ages: Iterable[str | None]) -> None:
    words = [text for text in ages if text is not None and plain_number(text) is None]
    if words:
        raise UsageError(
            f"the metadata table {name}, column age: expected numbers, found {words[0]!r}",
            next_step="give ages in years, or rename the column",
        )


def _with_types(tables: Sequence[Texts]) -> list[Table]:
    """The tables with typed cells: a column has one type in all of them."""
    together: dict[str, list[str | None]] = {}
    for table in tables:
        for column, cells in table.cells.items():
            together.setdefault(column, []).extend(cells)
    values = {column: iter(cells if column in _TEXTS else typed(cells)) for column, cells in together.items()}
    return [
        _table(table, {column: [next(values[column]) for _ in table.keys] for column in table.cells})
        for table in tables
    ]


def _table(table: Texts, values: Mapping[str, Sequence[Value]]) -> Table:
    rows: dict[Key, dict[str, Value]] = {}
    first: dict[Key, int] = {}
    conflicts: dict[Key, str] = {}
    for number, key in enumerate(table.keys):
        row = {column: cells[number] for column, cells in values.items()}
        before = rows.setdefault(key, row)
        differ = [column for column in row if before[column] != row[column]]
        if differ and key not in conflicts:
            lines = f"lines {table.lines[first[key]]} and {table.lines[number]}"
            conflicts[key] = f"{lines} differ in {', '.join(differ)}"
        first.setdefault(key, number)
    sessions: dict[str, list[Key]] = {}
    if table.level == "session":
        for key in rows:
            sessions.setdefault(key[0], []).append(key)
    return Table(table.name, table.level, rows, conflicts, sessions)
