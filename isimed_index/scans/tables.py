"""Tables that people write: CSV and TSV files as rows of text, with the line that each row ends on."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isimed_index.errors import UsageError

Value = str | int | float | None
_MISSING = ("", "n/a", "na", "nan")
# No leading zeros and no underscores: `007` and `1_2` are names, not numbers.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,17})", re.ASCII)
_FLOAT = re.compile(r"[+-]?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TextTable:
    """Column names as they are written, rows by column, and the line of the file that each row ends on.

    A cell that a short row lacks is None.
    """

    columns: list[str]
    rows: list[Mapping[str, str | None]]
    lines: list[int]


def read_table(path: Path, what: str) -> TextTable:
    """Read a table whose first line names its columns; its separator is a tab, else a semicolon, else a comma.

    A semicolon separates only where the first line has one and no comma. `UsageError` when the file cannot be read as
    text, and for a row that has more cells than there are columns: an unquoted separator moved them.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=_separator(first))
            columns = next(reader, [])
            rows: list[Mapping[str, str | None]] = []
            lines: list[int] = []
            for cells in reader:
                if not cells:
                    continue
                if any(cells[len(columns) :]):
                    line = f"{what} {path.name}, line {reader.line_num}"
                    raise UsageError(
                        f"{line}: expected {len(columns)} cells, found {len(cells)}",
                        next_step="put cells that hold a separator in quotation marks",
                    )
                filled: list[str | None] = [*cells, *[None] * (len(columns) - len(cells))]
                rows.append(dict(zip(columns, filled, strict=False)))
                lines.append(reader.line_num)
            return TextTable(columns, rows, lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{what} {path.name} cannot be read", next_step="give a CSV or TSV file") from error


def _separator(first: str) -> str:
    if "\t" in first:
        return "\t"
    return ";" if ";" in first and "," not in first else ","


def column_name(text: str) -> str:
    """The name that a column gets: lower case, `_` for spaces."""
    return text.strip().lower().replace(" ", "_")


def cell(text: str | None) -> str | None:
    """What a cell says, without space around it; None for an empty one and for `n/a`."""
    stripped = (text or "").strip()
    return None if stripped.lower() in _MISSING else stripped


def typed(cells: Sequence[str | None]) -> list[Value]:
    """Cells (from `cell`) as integers when all that are filled read as such, else as floats, else as text."""
    numbers = [None if text is None else plain_number(text) for text in cells]
    if any(number is None and text is not None for number, text in zip(numbers, cells, strict=True)):
        return list(cells)
    if any(isinstance(number, float) for number in numbers):
        return [None if number is None else float(number) for number in numbers]
    return list(numbers)


def plain_number(text: str) -> int | float | None:
    """The number that a text is, or None: `007`, `1_000`, `nan` and integers of 20 digits are names, not numbers."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else None
