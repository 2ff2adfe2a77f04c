"""A process of its own for SQL, whose limits the kernel keeps: DuckDB's own hold neither in time nor in memory.

    ask ── request, Arrow tables ──▶ stdin ─▶ DuckDB in memory, locked: no files, no settings, one reading statement
     ▲                                          │  SIGALRM at the time-out; RLIMIT_DATA, RLIMIT_FSIZE, RLIMIT_NOFILE
     └── Arrow batches or a refusal ◀── stdout ─┘

An engine starts in about 0.25 s and then answers one question after another, each in a new database. One that ran past
a limit is ended with its question. It has an empty environment and no way to the store: the tables are sent to it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

_BATCH_ROWS = 1 << 16
_KEPT = 2  # idle engines a process keeps for its next questions
_LEAN = 256 << 20  # bytes that an engine may still hold after an answer; one that holds more is not kept
_SLACK = 512 << 20  # bytes beyond DuckDB's own limit, for what it allocates without counting
_LENGTH = struct.Struct(">Q")
_FRAME = struct.Struct(">cQ")  # kind and length of what follows
_ROWS, _END, _REFUSED = b"R", b"E", b"X"
_START = "import sys; sys.path[:] = sys.argv[1:]; from isimed_index.store.sql.sandbox import serve; serve()"
_MESSAGE = 2000  # characters kept of what DuckDB says
_NO_MEMORY = re.compile(r"out of memory|bad_alloc|malloc of size|failed to allocate", re.IGNORECASE)
_ALLOWED = ("SELECT", "EXPLAIN")  # DESCRIBE, SHOW, SUMMARIZE, VALUES and FROM count as SELECT
_NOWHERE = "/nonexistent"  # in place of folders of the user's home, which a query could otherwise read out
_CONFIG = {
    "python_enable_replacements": "false",  # a name must never mean a Python variable
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "secret_directory": _NOWHERE,
    "extension_directory": _NOWHERE,
    "temp_directory": "",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One question: a statement (`view` None), or a condition that chooses rows of `view`."""

    sql: str
    params: pa.Table  # one row, a column each
    view: str | None
    timeout_s: float
    memory_bytes: int  # beyond the tables sent along


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer: `kind` is memory, time, size, crash, or the name of DuckDB's exception."""

    kind: str
    message: str = ""


def ask(request: Request, tables: Callable[[], Mapping[str, pa.Table]], result_bytes: int) -> pa.Table | Refusal:
    """The rows that answer a request; `tables` is called while a new engine starts."""
    engine = _taken()
    kept = False
    try:
        answer, kept = _asked(engine, request, tables(), result_bytes)
        return answer
    finally:
        idle = _idle()
        if kept and len(idle) < _KEPT:
            idle.append(engine)
        else:
            _end(engine)


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
    engine: subprocess.Popen[bytes], request: Request, tables: Mapping[str, pa.Table], result_bytes: int
) -> tuple[pa.Table | Refusal, bool]:
    """The answer, and whether the engine can take the next question."""
    assert engine.stdin is not None
    assert engine.stdout is not None
    pieces: list[pa.Table] = []
    size = 0
    try:
        _send(engine.stdin, request, tables)
        while True:
            kind, length = _FRAME.unpack(_exactly(engine.stdout, _FRAME.size))
            if kind == _ROWS:
                size += length
                if size > result_bytes:
                    return Refusal("size"), False
                pieces.append(pa.ipc.open_stream(_exactly(engine.stdout, length)).read_all())
                continue
            kept, *why = json.loads(_exactly(engine.stdout, length))
            return (Refusal(*why) if kind == _REFUSED else pa.concat_tables(pieces)), kept
    except (BrokenPipeError, EOFError):
        return _how_it_ended(engine.wait()), False


def _how_it_ended(code: int) -> Refusal:
    if code == -signal.SIGALRM:
        return Refusal("time")
    if code in (-signal.SIGABRT, -signal.SIGKILL):  # C++ out of memory in a thread; the kernel out of memory
        return Refusal("memory")
    return Refusal("crash", f"the SQL engine stopped with code {code}")


def _send(stream: IO[bytes], request: Request, tables: Mapping[str, pa.Table]) -> None:
    plain = {key: value for key, value in asdict(request).items() if key != "params"}
    header = json.dumps([plain, list(tables)]).encode()
    stream.write(_LENGTH.pack(len(header)) + header)
    for table in (request.params, *tables.values()):
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    stream.flush()


def _exactly(stream: IO[bytes], length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def serve() -> None:
    """The engine's main loop: answer requests from stdin until it closes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))  # not a byte to any file; pipes are none
    requests, answers = os.fdopen(0, "rb", closefd=False), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with answers
    trial = Request("SELECT $n AS n", pa.table({"n": [1]}), None, timeout_s=60.0, memory_bytes=1 << 30)
    for _ in _answer(trial, {}):
        pass  # what DuckDB loads on first use is loaded now, because later no file can be opened
    at_rest = _held("VmRSS")
    while requests.peek(1):
        plain, names = json.loads(_exactly(requests, *_LENGTH.unpack(_exactly(requests, _LENGTH.size))))
        request = Request(params=pa.ipc.open_stream(requests).read_all(), **plain)
        tables = {name: partial(pa.ipc.open_stream, requests) for name in names}
        refusal = None
        try:
            for rows in _answer(request, tables):
                _put(answers, _ROWS, rows)
        except Exception as error:  # noqa: BLE001 — whatever a query brings about is a refusal of that query
            refusal = _refusal(error)
        kept = _held("VmRSS") < at_rest + _LEAN and (refusal is None or refusal.kind != "memory")
        why = () if refusal is None else (refusal.kind, refusal.message)
        _put(answers, _END if refusal is None else _REFUSED, json.dumps([kept, *why]).encode())


def _answer(request: Request, tables: Mapping[str, Callable[[], Any]]) -> Iterator[pa.Buffer]:
    """The answer as Arrow streams, the first without rows, from a locked database that holds `tables`."""
    import duckdb

    with duckdb.connect(":memory:", config=_CONFIG) as connection:
        for name, read in tables.items():
            connection.register("incoming", read())
            connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM incoming')
            connection.unregister("incoming")
        used = connection.execute("SELECT sum(memory_usage_bytes) FROM duckdb_memory()").fetchone()[0]
        connection.execute(f"SET memory_limit = '{int(used) + request.memory_bytes} B'")
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        with _limits(request.timeout_s, request.memory_bytes + _SLACK):
            if request.view is None:
                values = request.params.to_pylist()[0] if request.params.num_columns else None
                relation = connection.sql(_one_statement(connection, request.sql), params=values)
            else:
                relation = connection.table(request.view).filter(request.sql)
            reader = relation.to_arrow_reader(_BATCH_ROWS)
            yield _stream(reader.schema)
            for batch in reader:
                yield _stream(reader.schema, batch)


@contextmanager
def _limits(timeout_s: float, memory_bytes: int) -> Iterator[None]:
    """Within it no file can be opened and so much memory taken; past the time-out the kernel ends the process."""
    soft = {resource.RLIMIT_DATA: _held("VmData") + memory_bytes, resource.RLIMIT_NOFILE: 0}
    before = {limit: resource.getrlimit(limit) for limit in soft}
    for limit, value in soft.items():
        hard = before[limit][1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for limit, both in before.items():
            resource.setrlimit(limit, both)


def _one_statement(connection: Any, query: str) -> Any:
    """The one statement in `query`, of a kind that only reads; `_NotReading` otherwise."""
    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise _NotReadingError(f"expected one SQL statement, found {len(statements)}")
    kind = statements[0].type.name
    if kind not in _ALLOWED:
        raise _NotReadingError(f"expected SELECT, EXPLAIN, DESCRIBE or SHOW, found {kind}")
    return statements[0]


class _NotReadingError(Exception):
    """A query is not one statement of a kind that only reads."""


def _refusal(error: Exception) -> Refusal:
    name = type(error).__name__
    text = str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryException" or _NO_MEMORY.search(text):
        return Refusal("memory")
    return Refusal("reading" if isinstance(error, _NotReadingError) else name, text[:_MESSAGE])


def _stream(schema: pa.Schema, *batches: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def _put(stream: IO[bytes], kind: bytes, content: Any) -> None:
    stream.write(_FRAME.pack(kind, len(content)))
    stream.write(content)
    stream.flush()


def _held(what: str) -> int:
    """Bytes of this process: VmRSS (resident) or VmData (what RLIMIT_DATA counts)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    return 0
