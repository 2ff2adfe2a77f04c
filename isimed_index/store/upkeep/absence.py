"""Proof of absence: every file below a store is searched for words, in its bytes and in what it decodes to.

    bytes of any file · strings of JSON · text columns, statistics and metadata of Parquet · file names

A word counts where no letter or digit stands beside it. Short words occur in any bytes by chance: these, and words
that also stand in ids of others, are looked for as whole values of the columns `scan` and `subject` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isimed_index.errors import StoreDamaged
from isimed_index.store import files
from isimed_index.store.place.storage import Storage

_LONG = 6  # characters: shorter words are found in compressed bytes by chance
_COLUMNS = ("scan", "subject")


@dataclass(frozen=True, slots=True)
class Words:
    """What to look for: `anywhere` as a word in any text or bytes, `cells` as a whole value of a column of ids."""

    anywhere: tuple[str, ...]
    cells: frozenset[str]

    @classmethod
    def of(cls, words: Collection[str], others: Collection[str]) -> Words:
        """`words` sorted by how they can be looked for, when `others` are ids that rightly stay."""
        text = "\n".join(others)
        loose = [word for word in sorted(words) if len(word) >= _LONG and not re.search(_pattern(word), text)]
        return cls(tuple(loose), frozenset(words) - set(others))

    def in_text(self, text: str) -> bool:
        """Whether one of them is a word of a text."""
        return re.search("|".join(map(_pattern, self.anywhere)) or "(?!)", text) is not None

    def in_bytes(self, content: bytes) -> bool:
        """Whether one of them is a word in bytes."""
        there = [word for word in self.anywhere if word.encode() in content]  # a hundred times as fast as a pattern
        return any(re.search(_pattern(word).encode(), content) for word in there)


def _pattern(word: str) -> str:
    return rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"


@dataclass(frozen=True, slots=True)
class Searched:
    """How much was searched, and the files that hold a word; of a name that holds one, the folder alone is told."""

    files: int
    bytes: int
    hits: tuple[str, ...]


def search(storage: Storage, words: Words) -> Searched:
    """Search every file; `StoreDamaged` when one cannot be decoded, because then nothing is proved."""
    count = size = 0
    hits = []
    for relative, path in storage.every_file():
        with suppress(FileNotFoundError):  # of a writer that is at work
            content = path.read_bytes()
            count, size = count + 1, size + len(content)
            if words.in_text(relative):
                hits.append(f"{relative.split('/')[0]}/…" if "/" in relative else "…")
            elif words.in_bytes(content) or _decoded(path, content, words):
                hits.append(relative)
    return Searched(count, size, tuple(hits))


def _decoded(path: Path, content: bytes, words: Words) -> bool:
    """Whether a word stands in what a file decodes to."""
    if path.suffix == ".parquet":
        return _in_parquet(path, words)
    if path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        return any(words.in_text(text) for line in lines for text in _strings(_json(line)))
    return False


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None  # a line that was cut short; its bytes were searched


def _strings(value: Any) -> Iterator[str]:
    """Every text in a decoded value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _in_parquet(path: Path, words: Words) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            footer = list(_strings([dict(file.metadata.metadata or {}), *_schema(file.schema_arrow)]))
            statistics = list(_strings(list(_statistics(file.metadata))))
            table = file.read()
    except (OSError, pa.ArrowException):
        raise StoreDamaged(f"{path.name} cannot be read, so nothing is proved of it", next_step=files.REPAIR) from None
    return any(map(words.in_text, [*footer, *statistics])) or any(
        _in_column(column, name, words) for name, column in zip(table.column_names, table.columns, strict=True)
    )


def _schema(schema: Any) -> Iterator[Any]:
    for field in schema:
        yield field.name
        yield dict(field.metadata or {})


def _statistics(metadata: Any) -> Iterator[Any]:
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            found = metadata.row_group(group).column(column).statistics
            if found is not None and found.has_min_max:
                yield found.min
                yield found.max


def _in_column(column: Any, name: str, words: Words) -> bool:
    values = _values(column)
    return any(map(words.in_text, values)) or (name in _COLUMNS and not words.cells.isdisjoint(values))


def _values(column: Any) -> set[str]:
    """The texts of a column, each once."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return set()
    flat: Iterable[Any] = column.to_pylist() if pa.types.is_nested(kind) else column.unique().to_pylist()
    return set(_strings(list(flat)))
