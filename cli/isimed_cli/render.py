"""Rows and fields to stdout or a file: table, JSON, NDJSON, CSV; Arrow and Parquet to files."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isimed_cli.app import Format
from isimed_index.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, Sequence[Any]]

_SUFFIXES = {
    ".json": Format.JSON,
    ".ndjson": Format.NDJSON,
    ".jsonl": Format.NDJSON,
    ".csv": Format.CSV,
    ".arrow": Format.ARROW,
    ".parquet": Format.PARQUET,
}


def resolve_format(asked: Format | None, out: Path | None, *, takes_out: bool) -> Format:
    """The format asked for, else the one that the suffix of `out` names, else a table.

    `UsageError` when the suffix names none, or a binary format has no file; a command without --out never has one.
    """
    if out is None and asked in (Format.ARROW, Format.PARQUET):
        raise UsageError(
            f"{asked} is a binary format and needs a file",
            next_step="add --out FILE" if takes_out else "leave out --format, or choose json, ndjson or csv",
        )
    if asked is not None or out is None:
        return asked or Format.TABLE
    if out.suffix not in _SUFFIXES:
        raise UsageError(
            f"expected --out with one of {', '.join(_SUFFIXES)}, found {out.name!r}", next_step="add --format"
        )
    return _SUFFIXES[out.suffix]


def show_table(table: pa.Table, output_format: Format, out: Path | None = None) -> None:
    """Write an Arrow table to stdout, or to `out`."""
    if out is None:
        show_columns(table.to_pydict(), output_format)
    elif output_format is Format.PARQUET:
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, out)
    elif output_format is Format.ARROW:
        import pyarrow.feather

        pyarrow.feather.write_feather(table, str(out), compression="zstd")
    else:
        out.write_text(as_text(table.to_pydict(), output_format), encoding="utf-8")


def show_columns(columns: Columns, output_format: Format) -> None:
    """Write columns of equal length to stdout."""
    sys.stdout.write(as_text(columns, output_format))


def show_fields(fields: Mapping[str, Any], output_format: Format) -> None:
    """Write one record: `name  value` lines as a table, one object as JSON, one row otherwise."""
    if output_format is Format.JSON:
        sys.stdout.write(to_json(fields, indent=2) + "\n")
    elif output_format is Format.TABLE:
        width = max(map(len, fields), default=0)
        for name, value in fields.items():
            sys.stdout.write(f"{name:<{width}}  {_cell(value)}\n")
    else:
        show_columns({name: [value] for name, value in fields.items()}, output_format)


def as_text(columns: Columns, output_format: Format) -> str:
    """Columns of equal length as table, JSON array of objects, NDJSON or CSV."""
    if output_format is Format.TABLE:
        return _table(columns)
    if output_format is Format.JSON:
        return to_json(list(_records(columns)), indent=2) + "\n"
    if output_format is Format.NDJSON:
        return "".join(to_json(record) + "\n" for record in _records(columns))
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(columns)
    rows.writerows([_csv_cell(value) for value in row] for row in zip(*columns.values(), strict=True))
    return text.getvalue()


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which NaN and infinity are null, dates are ISO 8601 and arrays are lists."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _records(columns: Columns) -> Iterator[dict[str, Any]]:
    """One dictionary a row."""
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _plain(value: Any) -> Any:
    """What the json module can write."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _table(columns: Columns) -> str:
    """Aligned text, numbers to the right; not cut at the edge of the screen, so that it can be piped."""
    if not columns:
        return ""
    cells = [[name, *map(_cell, values)] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    right = [all(isinstance(v, int | float | None) for v in values) and len(values) > 0 for values in columns.values()]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in zip(*cells, strict=True)
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _cell(value: Any) -> str:
    """One value as a person reads it: two decimals, empty for null."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_cell, value))
    return " ".join(str(value).split())


def _csv_cell(value: Any) -> Any:
    """One value for CSV: full precision, lists with spaces, empty for null."""
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return "" if value is None else value
