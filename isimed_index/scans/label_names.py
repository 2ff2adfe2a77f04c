"""What the numbers in a label map mean: tables of names in the formats that are about, told apart by content.

CSV, TSV          label (or index, value, LabelValue) and name by column: ours, BIDS `dseg.tsv`, 3D Slicer's CSV
colour table      index name r g b a: 3D Slicer (.ctbl, .txt), FreeSurfer's LUT
ITK-SNAP          index r g b a visible mesh "name"
JSON              {"1": "liver"} or {"liver": 1}, alone or under `labels` (MSD, nnU-Net) or `LabelMap`
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from isimed_index.errors import UsageError
from isimed_index.scans.tables import read_table

_LABEL_COLUMNS = ("label", "index", "value", "labelvalue")
_WHOLE = re.compile(r"[+-]?\d{1,9}", re.ASCII)
_SNAP = re.compile(r'\s*([+-]?\d+)((?:\s+[\d.]+){6,7})\s+"([^"]*)"\s*', re.ASCII)
_COLOURED = re.compile(r"\s*([+-]?\d+)\s+(\S.*?)\s+((?:[\d.]+\s+){3}[\d.]+)\s*", re.ASCII)
_JSON_TABLES = ("labels", "LabelMap")  # MSD and nnU-Net; BIDS
_NO_NAME = "(none)"  # what 3D Slicer writes for numbers that are not in use
_EXAMPLE = "add a header line such as label,name"
_Numbered = tuple[int, int, str]  # line, label, name


def read_label_names(path: Path) -> dict[int, str]:
    """Names by label from a table in any of the formats above, without that of 0, which is background.

    `UsageError`, with the line, for a table that is malformed, gives one label two names, or one name to two labels.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"label table {path.name} cannot be read", next_step="give a text table of names") from error
    if text.lstrip().startswith(("{", "[")):
        return names_in_json(path.name, text)
    lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    data = [(n, line) for n, line in lines if not line.lstrip().startswith("#")]
    if data and _SNAP.fullmatch(data[0][1]):
        return _distinct(path.name, _matches(path.name, data, _SNAP, name_group=3))
    if data and "\t" not in data[0][1].strip("\t ") and _COLOURED.fullmatch(data[0][1]):
        return _distinct(path.name, _matches(path.name, data, _COLOURED, name_group=2))
    if data and _COLOURED.fullmatch(data[0][1].replace("\t", " ")):
        spaced = [(n, line.replace("\t", " ")) for n, line in data]
        return _distinct(path.name, _matches(path.name, spaced, _COLOURED, name_group=2))
    return _distinct(path.name, _of_columns(path))


def names_in_json(file: str, text: str) -> dict[int, str]:
    """Names by label from the JSON text of a file of that name; `UsageError` as `read_label_names`."""
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"label table {file} is no sound JSON", next_step="mend the file") from error
    for key in _JSON_TABLES:
        if isinstance(found, _Pairs) and (inner := found.get(key)) is not None:
            found = inner
            break
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        found = _Pairs((str(label), name) for label, name in enumerate(found))  # BIDS: by place
    if not isinstance(found, _Pairs) or not found.pairs:
        raise UsageError(
            f"label table {file}: expected an object with names by label",
            next_step='write {"1": "liver", "2": "spleen"}',
        )
    return _distinct(file, ((0, *_label_and_name(file, key, value)) for key, value in found.pairs))


class _Pairs:
    """A JSON object that keeps a key that is there twice."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        self.pairs = list(pairs)

    def get(self, key: str) -> Any:
        """The value of a key that holds a table, or None."""
        return next((value for name, value in self.pairs if name == key and isinstance(value, _Pairs | list)), None)


def _label_and_name(file: str, key: str, value: Any) -> tuple[int, str]:
    """One entry, whichever of key and value is the number; an entry of two numbers or none is malformed."""
    by_label = _WHOLE.fullmatch(key.strip()) is not None
    number = None if isinstance(value, bool | _Pairs | list) else _WHOLE.fullmatch(str(value).strip())
    if isinstance(value, list):
        raise UsageError(
            f"label table {file}: {key!r} stands for several labels", next_step="give each label one name of its own"
        )
    if by_label and number is None and isinstance(value, str) and value.strip():
        return int(key), value.strip()
    if not by_label and number is not None and key.strip():
        return int(str(value)), key.strip()
    raise UsageError(
        f"label table {file}, entry {key!r}: expected a whole number and a name",
        next_step='write {"1": "liver"} or {"liver": 1}',
    )


def _matches(
    file: str, lines: Iterable[tuple[int, str]], pattern: re.Pattern[str], name_group: int
) -> Iterator[_Numbered]:
    for number, line in lines:
        match = pattern.fullmatch(line)
        if match is None or not _WHOLE.fullmatch(match[1]) or not match[name_group].strip():
            raise UsageError(
                f"label table {file}, line {number}: expected a whole number, a name and colours as before",
                next_step="mend the line",
            )
        name = match[name_group].strip().strip('"')
        if name != _NO_NAME:
            yield number, int(match[1]), name


def _of_columns(path: Path) -> Iterator[_Numbered]:
    table = read_table(path, "label table")
    folded = {column.strip().lower(): column for column in reversed(table.columns)}
    key = next((folded[column] for column in _LABEL_COLUMNS if column in folded), None)
    if key is None or "name" not in folded:
        raise UsageError(
            f"label table {path.name} needs a column label (or index, value) and a column name, found {table.columns}",
            next_step=_EXAMPLE,
        )
    for line, row in zip(table.lines, table.rows, strict=True):
        text, name = (row[key] or "").strip(), (row[folded["name"]] or "").strip()
        if not _WHOLE.fullmatch(text) or not name:
            raise UsageError(
                f"label table {path.name}, line {line}: expected a whole number and a name", next_step="mend the line"
            )
        if name != _NO_NAME:
            yield line, int(text), name


def _distinct(file: str, entries: Iterable[_Numbered]) -> dict[int, str]:
    """Names by label; a label with two names and a name of two labels are refused."""
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for line, label, name in entries:
        where = f"label table {file}" + (f", line {line}" if line else "")
        if label == 0:
            continue
        if names.setdefault(label, name) != name:
            raise UsageError(
                f"{where}: label {label} has two names, {names[label]!r} and {name!r}", next_step="keep one of them"
            )
        if labels.setdefault(name, label) != label:
            raise UsageError(
                f"{where}: the name {name!r} is that of label {labels[name]} and of label {label}",
                next_step="give each label a name of its own",
            )
    return names
