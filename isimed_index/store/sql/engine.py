"""The process that answers SQL: DuckDB in memory, locked, under limits that the kernel keeps. Started by `sandbox`."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from isimed_index.store.sql import needs, wire
from isimed_index.store.sql.wire import Need, Refusal, Request

_BATCH_ROWS = 1 << 16
_LEAN = 256 << 20  # bytes that an engine may still hold after an answer; one that holds more is not kept
_SLACK = 512 << 20  # bytes beyond DuckDB's own limit, for what it allocates without counting
_LONGEST_S = 1e6  # a timer takes no more
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
Reader = Callable[[], Any]  # opens the Arrow stream that comes next
Load = Callable[[dict[str, Need]], Mapping[str, Reader]]  # sends needs; readers of what then comes


def serve() -> None:
    """The engine's main loop: answer requests from stdin until it closes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))  # not a byte to any file; pipes are none
    requests, answers = os.fdopen(0, "rb", closefd=False), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with answers
    _warm_up()
    at_rest = _held("VmRSS")
    while requests.peek(1):
        length = wire.exactly(requests, wire.LENGTH.size)
        plain, names, large = json.loads(wire.exactly(requests, *wire.LENGTH.unpack(length)))
        request = Request(params=pa.ipc.open_stream(requests).read_all(), **plain)

        def stream() -> Any:
            return pa.ipc.open_stream(requests)

        def load(what: dict[str, Need], large: list[str] = large) -> Mapping[str, Reader]:
            plainly = {name: [need.columns, need.rows] for name, need in what.items()}
            wire.put(answers, wire.NEEDS, json.dumps(plainly).encode())
            return dict.fromkeys(large, stream)

        refusal = None
        try:
            for rows in _answer(request, dict.fromkeys(names, stream), dict.fromkeys(large, stream), load):
                wire.put(answers, wire.ROWS, rows)
        except Exception as error:  # noqa: BLE001 — whatever a query brings about is a refusal of that query
            refusal = _refusal(error)
        kept = _held("VmRSS") < at_rest + _LEAN and (refusal is None or refusal.kind != "memory")
        why = () if refusal is None else (refusal.kind, refusal.message)
        wire.put(answers, wire.END if refusal is None else wire.REFUSED, json.dumps([kept, *why]).encode())


def _warm_up() -> None:
    """What DuckDB and Arrow load on first use is loaded now, because later no file can be opened."""
    trial = Request(
        "SELECT n + $n FROM t WHERE n = 1", pa.table({"n": [1]}), None, timeout_s=60.0, memory_bytes=1 << 30
    )
    rows = pa.table({"n": [1, 2]})
    for _ in _answer(trial, {}, {"t": rows.to_reader}, lambda _: {"t": rows.to_reader}):
        pass


def _answer(
    request: Request, tables: Mapping[str, Reader], large: Mapping[str, Reader], load: Load
) -> Iterator[pa.Buffer]:
    """The answer as Arrow streams, the first without rows, from a locked database that holds `tables`."""
    import duckdb

    with duckdb.connect(":memory:", config=_CONFIG) as connection:
        for name, read in {**tables, **large}.items():
            connection.register("incoming", read())
            connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM incoming')
            connection.unregister("incoming")
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET enable_external_access = false")
        if large:
            with _limits(request.timeout_s, request.memory_bytes + _SLACK):
                wanted = needs.find(connection, request, list(large), lambda: _relation(connection, request))
            for name, read in load(wanted).items():
                needs.replace(connection, name, read().read_all())
        used = connection.execute("SELECT sum(memory_usage_bytes) FROM duckdb_memory()").fetchone()[0]
        connection.execute(f"SET memory_limit = '{int(used) + request.memory_bytes} B'")
        connection.execute("SET lock_configuration = true")
        with _limits(request.timeout_s, request.memory_bytes + _SLACK):
            reader = _relation(connection, request).to_arrow_reader(_BATCH_ROWS)
            yield wire.arrow_stream(reader.schema)
            for batch in reader:
                yield wire.arrow_stream(reader.schema, batch)


def _relation(connection: Any, request: Request) -> Any:
    """What the request asks for, bound to the tables and not run yet."""
    if request.view is None:
        values = request.params.to_pylist()[0] if request.params.num_columns else None
        return connection.sql(_one_statement(connection, request.sql), params=values)
    kept = _filtered(connection.table(request.view), request.sql)
    return kept if request.columns is None else kept.select(*request.columns)


@contextmanager
def _limits(timeout_s: float, memory_bytes: int) -> Iterator[None]:
    """Within it no file can be opened and so much memory taken; past the time-out the kernel ends the process."""
    soft = {resource.RLIMIT_DATA: _held("VmData") + memory_bytes, resource.RLIMIT_NOFILE: 0}
    before = {limit: resource.getrlimit(limit) for limit in soft}
    try:
        for limit, value in soft.items():
            hard = before[limit][1]
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        signal.setitimer(signal.ITIMER_REAL, min(timeout_s, _LONGEST_S))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for limit, both in before.items():
            resource.setrlimit(limit, both)


def _filtered(relation: Any, condition: str) -> Any:
    """The rows that a condition keeps; a number or text, which DuckDB would take for true, is no condition."""
    kind = str(relation.project(f"({condition}\n) AS kept").types[0])
    if kind not in ("BOOLEAN", "NULL", '"NULL"'):
        raise _NotReadingError(f"expected a condition that is true or false, found one of type {kind}")
    return relation.filter(condition)


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
    if wire.UNLOADED in text:
        return Refusal(wire.UNLOADED)
    return Refusal("reading" if isinstance(error, _NotReadingError) else name, text[:_MESSAGE])


def _held(what: str) -> int:
    """Bytes of this process: VmRSS (resident) or VmData (what RLIMIT_DATA counts)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    return 0
