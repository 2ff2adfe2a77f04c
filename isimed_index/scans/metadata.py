"""Metadata tables: CSV or TSV rows by scan or subject, cells typed as what they plainly are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from isimed_index.errors import UsageError
from isimed_index.scans.read import read_rows

_ID_COLUMNS = ("scan", "participant_id", "subject", "subject_id")
_MISSING = ("", "n/a", "na", "nan")
# No leading zeros and no underscores: `007` and `1_2` are names, not numbers.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,17})", re.ASCII)
_FLOAT = re.compile(r"[+-]?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?", re.ASCII)
Value = str | int | float | None


def read_metadata(path: Path) -> dict[str, dict[str, Value]]:
    """Rows of a CSV or TSV table by their id column (scan, participant_id, subject or subject_id), values typed.

    A column becomes integer or float when all its filled cells read as one; empty cells and `n/a` are missing.
    `UsageError` without an id column, or when two rows of one id differ.
    """
    columns, rows = read_rows(path, "the metadata table")
    key = next((column for column in _ID_COLUMNS if column in columns), None)
    if key is None:
        raise UsageError(
            f"the metadata table {path.name} has none of the columns {', '.join(_ID_COLUMNS)}",
            next_step="name the column with the ids participant_id",
        )
    typed: dict[str, list[Value]] = {}
    for column in columns:
        name = column.strip().lower().replace(" ", "_")
        if column == key or not name:
            continue
        if name in typed:
            raise UsageError(f"the metadata table {path.name} has two columns {name!r}")
        typed[name] = _typed([row[column] for row in rows])
    words = [value for value in typed.get("age", ()) if isinstance(value, str) and plain_number(value) is None]
    if words:
        raise UsageError(
            f"the metadata table {path.name}, column age: expected numbers, found {words[0]!r}",
            next_step="give ages in years, or rename the column",
        )
    result: dict[str, dict[str, Value]] = {}
    for number, row in enumerate(rows):
        values = {column: cells[number] for column, cells in typed.items()}
        if result.setdefault((row[key] or "").strip(), values) != values:
            raise UsageError(f"the metadata table {path.name} has two different rows for one id (row {number + 2})")
    return result


def _typed(cells: Sequence[str | None]) -> list[Value]:
    """Cells as integers when all that are filled read as such, else as floats, else as the text they are."""
    texts = [None if (cell or "").strip().lower() in _MISSING else (cell or "").strip() for cell in cells]
    numbers = [None if text is None else plain_number(text) for text in texts]
    if any(number is None and text is not None for number, text in zip(numbers, texts, strict=True)):
        return list(texts)
    if any(isinstance(number, float) for number in numbers):
        return [None if number is None else float(number) for number in numbers]
    return list(numbers)


def plain_number(text: str) -> int | float | None:
    """The number that a text is, or None: `007`, `1_000`, `nan` and integers of 20 digits are names, not numbers."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else None
