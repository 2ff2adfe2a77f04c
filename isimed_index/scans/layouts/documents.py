"""JSON documents of a data set: read when they are plain files of a sensible size, and nothing otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isimed_index.errors import UsageError
from isimed_index.scans.layouts.found import Found
from isimed_index.scans.tables import TextTable, read_table

_MOST_BYTES = 64 << 20


def read_text(path: Path) -> str | None:
    """The text of a file; None when there is none, or it is no plain file, too large, or no text."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:  # a pipe would never end
            return None
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when it holds none."""
    text = read_text(path)
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_facts(path: Path, found: Found, lost: str) -> TextTable | None:
    """The metadata table of a data set; None when it is unsound, with a note that says what is `lost` by that."""
    try:
        return read_table(path, "the metadata table")
    except UsageError as error:
        found.notes.append(f"{error.message}; {lost}")
        return None
