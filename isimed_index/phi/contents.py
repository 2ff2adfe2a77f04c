"""A file of a store → texts with their places, and bytes as they were before they were compressed.

JSON        keys and values                     .npy            its header
Parquet     names, metadata, cells by column    .safetensors    its header
Zarr        attributes, and voxels decoded      others          text if they are text; else bytes, unzipped
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from isimed_index.contracts import TableName, table_contract
from isimed_index.errors import StoreDamaged
from isimed_index.store import files

_MOST_UNZIPPED_BYTES = 2**30
_ZIPPED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OWN_TIMES = ("time", "created")  # keys under which the store writes when something was done to it


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a file, where in it (a column, a key, a header), and how often.

    `column` is the name of the column or key that holds it; `own_time` says that it stands where the store writes its
    own times.
    """

    text: str
    place: str
    count: int = 1
    column: str = ""
    own_time: bool = False


def texts_of(path: Path, content: bytes) -> Iterator[Text]:
    """The texts of a file by its suffix; `StoreDamaged` for one that cannot be decoded."""
    name = path.name.removesuffix(files.COPY)
    if name.endswith(".parquet"):
        yield from _parquet(path)
    elif name.endswith((".json", ".jsonl")):
        yield from _json_lines(content) if name.endswith(".jsonl") else _json(content)
    elif content[:6] == b"\x93NUMPY":
        start = 10 if content[6:7] == b"\x01" else 12
        size = int.from_bytes(content[8:start], "little")
        yield Text(content[start : start + size].decode("latin-1"), "header")
    elif name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        yield from _json(content[8 : 8 + size], "header")
    elif (plain := _plain(unzipped(path, content) or content)) is not None:
        for line in plain.splitlines():
            yield Text(line, "text")


def unpacked(path: Path, content: bytes, *, voxels: bool) -> Iterator[bytes]:
    """What a file's bytes stand for: its own bytes, what is zipped in them, and with `voxels` those of an array."""
    yield content
    if (plain := unzipped(path, content)) is not None:
        yield plain
    if voxels and path.name == "zarr.json" and b'"array"' in content:
        from isimed_index.scans.chunks import slabs

        for slab in slabs(path.parent):
            yield slab.tobytes()


def _plain(content: bytes) -> str | None:
    if b"\0" in content and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return None
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError:
        return None


def _json_lines(content: bytes) -> Iterator[Text]:
    for line in content.splitlines():
        yield from _json(line)


def _json(content: bytes, place: str = "") -> Iterator[Text]:
    try:
        decoded = json.loads(content)
    except ValueError:
        text = content.decode("utf-8", "replace")  # torn, or none of ours: it is searched as it is
        yield Text(text, place or "text")
        return
    yield from _walk(decoded, place)


def _walk(value: Any, place: str, column: str = "", depth: int = 0) -> Iterator[Text]:
    if isinstance(value, dict):
        for key, inner in value.items():
            below = f"{place}.{key}" if place else str(key)
            yield Text(str(key), "the name of a key", column="")
            yield from _walk(inner, below, str(key), depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, place, column, depth + 1)
    elif isinstance(value, str):
        yield Text(value, f"key {place}", column=column, own_time=column in _OWN_TIMES and depth == 1)
    elif isinstance(value, int) and not isinstance(value, bool) and ".attributes." in f".{place}.":
        yield Text(str(value), f"key {place}", column=column)


def _parquet(path: Path) -> Iterator[Text]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for holder in (file.metadata.metadata, *(field.metadata for field in file.schema_arrow)):
                for key, value in (holder or {}).items():
                    # Arrow's own copy of names and metadata is searched as these; what the contract says is known.
                    if key != b"ARROW:schema" and value not in _of_the_contract():
                        yield Text(f"{key.decode('utf-8', 'replace')} {value.decode('utf-8', 'replace')}", "metadata")
            for field in file.schema_arrow:
                yield Text(field.name, "the name of a column")
                yield from _cells(field, file.read([field.name]).column(0) if file.metadata.num_rows else None)
    except (OSError, pa.ArrowException, IndexError):
        raise StoreDamaged(f"{path.name} cannot be read", next_step=files.REPAIR) from None


@lru_cache
def _own_numbers(kind: str) -> frozenset[str]:
    """Columns of numbers (`int`, `float`) that the store makes itself: millions of row ids are no one's."""
    fields = [field for table in get_args(TableName) for field in table_contract(table)["fields"]]
    return frozenset(field["name"] for field in fields if field["type"].startswith(kind))


@lru_cache
def _of_the_contract() -> frozenset[bytes]:
    """Units and descriptions that the store's own columns carry."""
    tables: tuple[TableName, ...] = get_args(TableName)
    fields = [field for table in tables for field in table_contract(table)["fields"]]
    return frozenset((field[key] or "").encode() for field in fields for key in ("unit", "description"))


def _cells(field: Any, column: Any) -> Iterator[Text]:
    """The distinct values of a column with how often they occur; of the store's own real numbers the largest."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column is None or column.null_count == len(column):
        return
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_boolean(kind):
        yield Text("", f"column {field.name}", column=field.name)
        return
    if pa.types.is_floating(kind):
        column = column.cast(pa.float64())
        if field.name in _own_numbers("float"):
            yield Text(str(pc.max(column).as_py()), f"column {field.name}", column=field.name)  # an age above 89
            return
    if pa.types.is_integer(kind) and field.name in _own_numbers("int"):
        return
    if pa.types.is_nested(kind):
        for value in column.to_pylist():
            yield from _walk(value, f"column {field.name}", field.name, 1)
        return
    for item in column.value_counts().to_pylist():
        value = item["values"]
        if value is not None:
            yield Text(_as_text(value), f"column {field.name}", int(item["counts"]), field.name)


def _as_text(value: Any) -> str:
    """A cell as it was written: 12345678.0 is the number 12345678, made real by another cell of its column."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def unzipped(path: Path, content: bytes) -> bytes | None:
    """What a gzip or Zstandard file holds, up to 1 GiB of it; None for any other file."""
    import pyarrow as pa

    kind = next((kind for magic, kind in _ZIPPED.items() if content.startswith(magic)), None)
    if kind is None:
        return None
    try:
        with pa.input_stream(pa.BufferReader(content), compression=kind) as stream:
            return bytes(stream.read(_MOST_UNZIPPED_BYTES))
    except (OSError, pa.ArrowException):
        raise StoreDamaged(f"{path.name} cannot be unzipped", next_step=files.REPAIR) from None
