"""What goes through the pipes between a process that asks and an engine that answers.

asks ──▶   length, JSON [request, names of tables, names of large tables], then Arrow streams: the parameters, each
           table, and of each large table its schema alone
◀── needs  where there are large tables: by name, the columns that the request reads and how many rows at most
asks ──▶   an Arrow stream of each large table, with these columns only
◀── rows   an Arrow stream a batch, the first without rows; then an end, or a refusal
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import IO, Any

import pyarrow as pa

LENGTH = struct.Struct(">Q")
FRAME = struct.Struct(">cQ")  # kind and length of what follows
ROWS, END, REFUSED, NEEDS = b"R", b"E", b"X", b"N"
UNLOADED = "a column that was not loaded is read"  # the kind of refusal after which all columns are sent


@dataclass(frozen=True, slots=True)
class Request:
    """One question: a statement (`view` None), or a condition that chooses rows of `view`, of which `columns` are told.

    `everything` has all columns of large tables sent, whatever the plan of the query reads.
    """

    sql: str
    params: pa.Table  # one row, a column each
    view: str | None
    timeout_s: float
    memory_bytes: int  # beyond the tables sent along
    columns: list[str] | None = None
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer: `kind` is memory, time, size, load, crash, or the name of DuckDB's exception."""

    kind: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """What a request reads of a large table: these columns, and no more than `rows` of its first rows (None: all)."""

    columns: list[str]
    rows: int | None = None


def header(request: Request, tables: list[str], large: list[str]) -> bytes:
    """The beginning of a request, with its length before it."""
    plain = {key: value for key, value in asdict(request).items() if key != "params"}
    content = json.dumps([plain, tables, large]).encode()
    return LENGTH.pack(len(content)) + content


def exactly(stream: IO[bytes], length: int) -> bytes:
    """So many bytes; `EOFError` when the other side ends before."""
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def put(stream: IO[bytes], kind: bytes, content: Any) -> None:
    """Send one frame."""
    stream.write(FRAME.pack(kind, len(content)))
    stream.write(content)
    stream.flush()


def arrow_stream(schema: pa.Schema, *batches: pa.RecordBatch) -> pa.Buffer:
    """Batches as an Arrow stream in memory."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()
