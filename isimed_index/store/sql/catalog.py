"""Read-only SQL over one pinned generation: the views, and what is said when a query is refused.

Views: the stored tables, `patches`, `patch_labels`, `regions`, `encoders`, `segments`, `indexes`, `generations`
(columns in `isimed_schemas/views`). The ones that a query names are sent to a process of its own (see `sandbox`), as
tables of a database in memory, which is then locked: no external access, no configuration, no spilling, one statement
of SELECT, EXPLAIN, DESCRIBE or SHOW, a memory limit and a time-out. What a query could change is that copy.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from isimed_index.contracts import ViewName, arrow_schema, view_schema
from isimed_index.errors import SqlRefused, StoreUnreadable, StoreWarning, UsageError
from isimed_index.store.manifest import Artefact, history
from isimed_index.store.regions import regions_view
from isimed_index.store.snapshot import STORED_TABLES, Snapshot, StoredTable
from isimed_index.store.sql import sandbox
from isimed_index.store.sql.patches import patch_labels_view, patches_view
from isimed_index.store.sql.sandbox import Large
from isimed_index.store.sql.wire import Refusal, Request

QUERY_BYTES = 1 << 30  # what a query may use beyond the tables it reads, and what its result may hold
_QUERY_CHARACTERS = 1_000_000
_MESSAGE = 300  # characters of what DuckDB says that a person reads
# Ways to name a table without spelling it, or to ask about all of them: then every view is filled.
_INDIRECT = re.compile(
    r"query|json_execute|information_schema|duckdb_|pragma_|\bpg_|sqlite_|show\s+all|\\|U&", re.IGNORECASE
)
_FILES = re.compile(r"file system operations are disabled|external access|disabled by configuration", re.IGNORECASE)
_MISSING = re.compile(r"Values were not provided for the following [a-z ]*parameters: (\w+)")
_REST = re.compile(r"\s*(\bLINE \d+:|Candidate functions:|Use \"SET )")  # pictures, lists, forbidden advice
_TELLING = ("ConversionException", "InvalidInputException", "OutOfRangeException")  # quote values of the data
_VALUE = re.compile(r"'[^']*'")
_PLACE = re.compile(r"(?<![\w.)])/(?:[^\s'\"/]+/)+([^\s'\"/]*)")  # an absolute path, by its base name


def run(snapshot: Snapshot, query: str, params: Mapping[str, Any] | None, timeout_s: float) -> pa.Table:
    """The result of one read-only statement; `SqlRefused` when it is not one, fails, or passes a limit."""
    unused = [name for name in params or {} if not re.search(rf"\${re.escape(name)}\b", query)]
    if unused:
        raise SqlRefused(f"the query has no ${unused[0]}", next_step=f"leave out -p {unused[0]}")
    values = pa.table({name: _parameter(name, value) for name, value in (params or {}).items()})
    return _answer(snapshot, query, Request(query, values, None, timeout_s, QUERY_BYTES))


def matching(
    snapshot: Snapshot, view: StoredTable | ViewName, where: str, columns: Sequence[str] | None, timeout_s: float
) -> pa.Table:
    """The rows of a view (all columns, or some) that an SQL condition keeps; `SqlRefused` when it is no condition."""
    chosen = None if columns is None else list(columns)
    return _answer(snapshot, f"{view} {where}", Request(where, pa.table({}), view, timeout_s, QUERY_BYTES, chosen))


def _answer(snapshot: Snapshot, mentioned: str, request: Request) -> pa.Table:
    """What a locked database that holds the views named in `mentioned` says."""
    if len(mentioned) > _QUERY_CHARACTERS:
        raise SqlRefused(
            f"expected at most {_QUERY_CHARACTERS:,} characters of SQL, found {len(mentioned):,}",
            next_step="select by a condition instead of a list",
        )
    if not request.timeout_s > 0:
        raise UsageError(f"expected a time-out above 0 s, found {request.timeout_s:g}")
    answer = sandbox.ask(request, lambda: _tables(snapshot, mentioned), QUERY_BYTES)
    if isinstance(answer, Refusal):
        raise _refused(answer, request)
    return answer


def _parameter(name: str, value: Any) -> pa.Array:
    """A value as a column of one row."""
    try:
        column = pa.array([value.item() if isinstance(value, np.generic) else value])
        if pa.types.is_struct(column.type):
            raise TypeError
    except (pa.ArrowException, OverflowError, TypeError):
        raise SqlRefused(
            f"parameter {name}: expected a number, text, date, None or a list of one of these, "
            f"found {type(value).__name__}",
            next_step="give plain values; tables cannot be parameters",
        ) from None
    return column


def _refused(refusal: Refusal, request: Request) -> SqlRefused:
    """A refusal in one line that says how to go on, without places of this machine."""
    if refusal.kind == "time":
        return SqlRefused(f"the query ran past {request.timeout_s:g} s", next_step="ask for less or raise the time-out")
    if refusal.kind == "memory":
        return SqlRefused(f"the query needs more than {QUERY_BYTES >> 20} MiB", next_step="read less, or aggregate")
    if refusal.kind == "size":
        return SqlRefused(f"the result is larger than {QUERY_BYTES >> 20} MiB", next_step="add a LIMIT or aggregate")
    if refusal.kind == "load":
        return SqlRefused(refusal.message, next_step="name fewer columns, add a LIMIT, or ask on a larger machine")
    if refusal.kind == "reading":
        return SqlRefused(refusal.message, next_step="send one statement that only reads")
    if refusal.kind == "PermissionException" or _FILES.search(refusal.message):
        return SqlRefused("a query reads the views, no files or settings", next_step='isimed sql "SHOW TABLES"')
    missing = _MISSING.search(refusal.message)
    if missing:
        return SqlRefused(
            f"the query asks for ${missing[1]}, which has no value", next_step=f"add -p {missing[1]} VALUE"
        )
    said = _VALUE.sub("'…'", refusal.message) if refusal.kind in _TELLING else refusal.message
    message = " ".join(_REST.split(said, maxsplit=1)[0].split())
    if len(message) > _MESSAGE:
        message = f"{message[:_MESSAGE]}…"
    return SqlRefused(_PLACE.sub(r"\1", message), next_step=_next_step(message, request.view or request.sql))


def _next_step(message: str, asked: str) -> str:
    """How to find out what an unknown name should have been."""
    if ("column" in message and "not found" in message) or "Candidate bindings" in message:
        named = [view for view in _VIEWS if re.search(rf"\b{view}\b", asked, re.IGNORECASE)]
        return f'isimed sql "DESCRIBE {named[0] if named else "scans"}"'
    return "isimed sql --help" if message.startswith("Parser Error") else 'isimed sql "SHOW TABLES"'


def _tables(snapshot: Snapshot, query: str) -> dict[str, pa.Table | Large]:
    """Every view by name: filled where `query` may read it, else empty so that SHOW TABLES lists it."""
    everything = _INDIRECT.search(query) is not None
    return {
        name: build(snapshot) if everything or re.search(rf"\b{name}\b", query, re.IGNORECASE) else _empty(name)
        for name, build in _VIEWS.items()
    }


def _empty(name: Any) -> pa.Table:
    return (arrow_schema(name) if name in STORED_TABLES else view_schema(name)).empty_table()


def _encoders(snapshot: Snapshot) -> pa.Table:
    return _rows("encoders", [_encoder(snapshot, artefact) for artefact in snapshot.artefacts("encoder")])


def _encoder(snapshot: Snapshot, artefact: Artefact) -> dict[str, Any]:
    from ulid import ULID

    card = snapshot.card(artefact)
    return {
        "encoder": card["id"],
        "name": card["name"],
        "method": card.get("training", {}).get("method"),
        "dim": card["outputs"][card["match_output"]]["dim"],
        "patch_vox": card["patch_vox"],
        "spacing_mm": card["spacing_mm"],
        "metric": card["metric"],
        "folder": artefact.path,
        "time": ULID.from_str(_ulid(artefact)).datetime.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }


def _segments(snapshot: Snapshot) -> pa.Table:
    return _rows(
        "segments",
        [
            {
                "segment": _ulid(segment.artefact),
                "encoder": segment.encoder,
                "scan": snapshot.scan_of.get(segment.scan_artefact),
                "first_patch": segment.first_row_id,
                "rows": segment.rows,
                "bytes": segment.artefact.bytes,
                "grid": segment.grid,
            }
            for segment in snapshot.segments()
        ],
    )


def _indexes(snapshot: Snapshot) -> pa.Table:
    return _rows("indexes", [_index(snapshot, artefact) for artefact in snapshot.artefacts("index")])


def _index(snapshot: Snapshot, artefact: Artefact) -> dict[str, Any]:
    try:
        described = json.loads((snapshot.verified(artefact) / "index.json").read_text(encoding="utf-8"))
    except StoreUnreadable:
        raise
    except (OSError, ValueError):  # an index is derived: a damaged one is listed, with what the manifest knows of it
        described = {}
        warnings.warn(
            f"the index {artefact.name} is damaged; its kind and recall are not known. Next: isimed index",
            StoreWarning,
            stacklevel=2,
        )
    return {
        "index": _ulid(artefact),
        "encoder": artefact.fields["encoder"],
        "kind": described.get("recipe", {}).get("factory"),
        "rows": sum(stop - first for first, stop in artefact.fields["covers"]),
        "bytes": artefact.bytes,
        "recall_at_10": described.get("recall_at_10"),
    }


def _generations(snapshot: Snapshot) -> pa.Table:
    names = view_schema("generations").names
    return _rows(
        "generations",
        [dict(zip(names, astuple(line), strict=True)) for line in history(snapshot.storage, snapshot.generation)],
    )


def _rows(view: ViewName, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=view_schema(view))


def _ulid(artefact: Artefact) -> str:
    return artefact.path.split("/")[1]


_VIEWS: Mapping[str, Callable[[Snapshot], pa.Table | Large]] = {
    **{name: partial(Snapshot.table, name=name) for name in STORED_TABLES},
    "patches": patches_view,
    "patch_labels": patch_labels_view,
    "regions": regions_view,
    "encoders": _encoders,
    "segments": _segments,
    "indexes": _indexes,
    "generations": _generations,
}
