"""A process of its own for SQL, whose limits the kernel keeps: DuckDB's own hold neither in time nor in memory.

    ask ── request, Arrow tables ──▶ stdin ─▶ `engine`: DuckDB in memory, locked: no files, no settings, one statement
     ▲                                          │  SIGALRM at the time-out; RLIMIT_DATA, RLIMIT_FSIZE, RLIMIT_NOFILE
     └── Arrow batches or a refusal ◀── stdout ─┘

An engine starts in about 0.25 s and then answers one question after another, each in a new database. One that ran past
a limit is ended with its question. It has an empty environment and no way to the store: the tables are sent to it, and
of large ones only the columns that the plan of the query reads.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pyarrow as pa

from isimed_index.store.sql import wire
from isimed_index.store.sql.wire import Need, Refusal, Request

_KEPT = 2  # idle engines a process keeps for its next questions
_START = "import sys; sys.path[:] = sys.argv[1:]; from isimed_index.store.sql.engine import serve; serve()"
_GUESSED_WIDTH = 32
_LOADED_SHARE = 0.7  # of the memory that is free: what the columns of large tables may take


@dataclass(frozen=True, slots=True)
class Large:
    """A table that is read piece by piece: its schema, its rows, and batches of some columns of its first rows."""

    schema: pa.Schema
    rows: int
    read: Callable[[Need], Iterable[pa.RecordBatch]]


Tables = Mapping[str, pa.Table | Large]


def ask(request: Request, tables: Callable[[], Tables], result_bytes: int) -> pa.Table | Refusal:
    """The rows that answer a request; `tables` is called while a new engine starts."""
    engine = _taken()
    kept = False
    try:
        given = tables()
        answer, kept = _asked(engine, request, given, result_bytes)
    finally:
        idle = _idle()
        if kept and len(idle) < _KEPT:
            idle.append(engine)
        else:
            _end(engine)
    if isinstance(answer, Refusal) and answer.kind == wire.UNLOADED and not request.everything:
        return ask(replace(request, everything=True), lambda: given, result_bytes)
    return answer


_engines: dict[int, list[subprocess.Popen[bytes]]] = {}  # by process: after a fork, those of the parent are not ours


def _idle() -> list[subprocess.Popen[bytes]]:
    return _engines.setdefault(os.getpid(), [])


def _taken() -> subprocess.Popen[bytes]:
    """An idle engine, or a new one that is still loading its libraries."""
    with contextlib.suppress(IndexError):
        while True:
            engine = _idle().pop()
            if engine.poll() is None:
                return engine
            _end(engine)  # something ended it while it was idle
    path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 — '' is the current folder
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _START, *path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        cwd="/",
    )


def _end(engine: subprocess.Popen[bytes]) -> int:
    """End an engine, busy or not, and return how it ended."""
    engine.kill()
    for stream in (engine.stdin, engine.stdout):
        with contextlib.suppress(OSError):  # what was still to be sent has no reader
            stream.close()  # type: ignore[union-attr]
    return engine.wait()


@atexit.register
def _end_all() -> None:
    for engine in _engines.pop(os.getpid(), []):
        _end(engine)


def _asked(
    engine: subprocess.Popen[bytes], request: Request, tables: Tables, result_bytes: int
) -> tuple[pa.Table | Refusal, bool]:
    """The answer, and whether the engine can take the next question."""
    assert engine.stdin is not None
    assert engine.stdout is not None
    pieces: list[pa.Table] = []
    size = 0
    try:
        _send(engine.stdin, request, tables)
        while True:
            kind, length = wire.FRAME.unpack(wire.exactly(engine.stdout, wire.FRAME.size))
            if kind == wire.ROWS:
                size += length
                if size > result_bytes:
                    return Refusal("size"), False
                pieces.append(pa.ipc.open_stream(wire.exactly(engine.stdout, length)).read_all())
                continue
            content = json.loads(wire.exactly(engine.stdout, length))
            if kind == wire.NEEDS:
                if too_much := _send_large(engine.stdin, tables, {name: Need(*need) for name, need in content.items()}):
                    return too_much, False
                continue
            kept, *why = content
            return (Refusal(*why) if kind == wire.REFUSED else pa.concat_tables(pieces)), kept
    except (BrokenPipeError, EOFError):
        return _how_it_ended(engine.wait()), False


def _how_it_ended(code: int) -> Refusal:
    if code == -signal.SIGALRM:
        return Refusal("time")
    if code in (-signal.SIGABRT, -signal.SIGKILL):  # C++ out of memory in a thread; the kernel out of memory
        return Refusal("memory")
    return Refusal("crash", f"the SQL engine stopped with code {code}")


def _send(stream: IO[bytes], request: Request, tables: Tables) -> None:
    whole = {name: table for name, table in tables.items() if not isinstance(table, Large)}
    large = {name: table for name, table in tables.items() if isinstance(table, Large)}
    stream.write(wire.header(request, list(whole), list(large)))
    for table in (request.params, *whole.values()):
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    for table in large.values():
        pa.ipc.new_stream(stream, table.schema).close()
    stream.flush()


def _send_large(stream: IO[bytes], tables: Tables, needs: Mapping[str, Need]) -> Refusal | None:
    """Send what is needed of large tables; a refusal when that is more than this machine's memory holds."""
    chosen = {name: (table, needs[name]) for name, table in tables.items() if isinstance(table, Large)}
    size = sum(_bytes(table, need) for table, need in chosen.values())
    if size > _LOADED_SHARE * (free := _free_bytes()):
        return Refusal(
            "load", f"the columns that the query reads take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
    for table, need in chosen.values():
        schema = pa.schema([_narrow(table.schema.field(name)) for name in need.columns])
        with pa.ipc.new_stream(stream, schema) as writer:
            for batch in table.read(need) if need.rows != 0 else ():
                writer.write_batch(batch.cast(schema))
    stream.flush()
    return None


def _narrow(field: pa.Field) -> pa.Field:
    """Text as a dictionary: ids repeat a million times."""
    return field.with_type(pa.dictionary(pa.int32(), pa.string())) if pa.types.is_string(field.type) else field


def _bytes(table: Large, need: Need) -> int:
    rows = table.rows if need.rows is None else min(table.rows, need.rows)
    return rows * sum(_width(_narrow(table.schema.field(name)).type) for name in need.columns)


def _width(kind: pa.DataType) -> int:
    """Bytes of a value; of what has no fixed width, a guess."""
    if pa.types.is_dictionary(kind):
        return 4
    return (kind.bit_width + 7) // 8 if pa.types.is_primitive(kind) else _GUESSED_WIDTH


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return sys.maxsize
