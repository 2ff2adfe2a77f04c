"""Read-only SQL over one pinned generation, in a DuckDB that can reach neither files nor settings.

Views: `scans`, `subjects`, `labels` (the stored tables), `patches`, `encoders`, `segments`, `indexes`, `generations`
(columns in `isimed_schemas/views`). The ones that a query names are filled as tables of a database in memory, which is
then locked: no external access, no configuration, no spilling, one statement of SELECT, EXPLAIN, DESCRIBE or SHOW, a
memory limit and a time-out. What a query could change is that copy, and it ends with the query.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import partial
from threading import Event, Timer
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isimed_index.contracts import ViewName, arrow_schema, view_schema
from isimed_index.errors import SqlRefused, StoreDamaged
from isimed_index.store.manifest import Artefact, history
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot, StoredTable

_STORED: tuple[StoredTable, ...] = ("scans", "subjects", "labels")
QUERY_BYTES = 1 << 30  # what a query may use beyond the tables it reads, and what its result may hold
_BATCH_ROWS = 1 << 16
_ALLOWED = ("SELECT", "EXPLAIN")  # DESCRIBE, SHOW, SUMMARIZE, VALUES and FROM count as SELECT
# Ways to name a table without spelling it, or to ask about all of them: then every view is filled.
_INDIRECT = re.compile(r"query|information_schema|duckdb_|pragma_|\bpg_|sqlite_|show\s+all", re.IGNORECASE)
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


def run(snapshot: Snapshot, query: str, params: Mapping[str, Any] | None, timeout_s: float) -> pa.Table:
    """The result of one read-only statement; `SqlRefused` when it is not one, fails, or passes a limit."""

    def ask(connection: Any) -> Any:
        statement = _checked_statement(connection, query)
        return connection.sql(statement, params=dict(params)) if params else connection.sql(statement)

    return _answer(snapshot, query, ask, timeout_s)


def matching(snapshot: Snapshot, view: StoredTable, where: str, timeout_s: float) -> pa.Table:
    """The rows of a view that an SQL condition keeps; `SqlRefused` when it is anything else than a condition."""
    return _answer(snapshot, f"{view} {where}", lambda connection: connection.table(view).filter(where), timeout_s)


def _answer(snapshot: Snapshot, mentioned: str, ask: Callable[[Any], Any], timeout_s: float) -> pa.Table:
    """What `ask` reads from a locked database that holds the views named in `mentioned`."""
    with duckdb.connect(":memory:", config=_CONFIG) as connection:
        used = sum(_fill(connection, name, table) for name, table in _tables(snapshot, mentioned).items())
        connection.execute(f"SET memory_limit = '{used + QUERY_BYTES} B'")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        late = Event()

        def stop() -> None:
            late.set()
            connection.interrupt()

        timer = Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            return _fetch(ask(connection))
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            if late.is_set():
                raise SqlRefused(f"the query ran past {timeout_s:g} s", next_step="raise the time-out") from None
            raise _refusal(error) from None
        finally:
            timer.cancel()


def _checked_statement(connection: Any, query: str) -> Any:
    """The one statement in `query`, of a kind that only reads."""
    try:
        statements = connection.extract_statements(query)
    except duckdb.Error as error:
        raise _refusal(error) from None
    if len(statements) != 1:
        raise SqlRefused(f"expected one SQL statement, found {len(statements)}", next_step="send them one by one")
    kind = statements[0].type.name
    if kind not in _ALLOWED:
        raise SqlRefused(
            f"expected SELECT, EXPLAIN, DESCRIBE or SHOW, found {kind}", next_step="only reading is allowed"
        )
    return statements[0]


def _fill(connection: Any, name: str, table: pa.Table) -> int:
    """Copy an Arrow table into the database and return its size in bytes."""
    connection.register("incoming", table)
    connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM incoming')
    connection.unregister("incoming")
    return int(table.nbytes)


def _fetch(relation: Any) -> pa.Table:
    reader = relation.to_arrow_reader(_BATCH_ROWS)
    batches = []
    size = 0
    for batch in reader:
        batches.append(batch)
        size += batch.nbytes
        if size > QUERY_BYTES:
            raise SqlRefused(f"the result is larger than {QUERY_BYTES >> 20} MiB", next_step="add a LIMIT or aggregate")
    return pa.Table.from_batches(batches, reader.schema)


def _refusal(error: Exception) -> SqlRefused:
    if isinstance(error, SqlRefused):
        return error
    if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in str(error):
        return SqlRefused(f"the query needs more than {QUERY_BYTES >> 20} MiB", next_step="read less, or aggregate")
    return SqlRefused(" ".join(str(error).split()), next_step="isimed sql 'SHOW TABLES'")


def _tables(snapshot: Snapshot, query: str) -> dict[str, pa.Table]:
    """Every view by name: filled where `query` may read it, else empty so that SHOW TABLES lists it."""
    everything = _INDIRECT.search(query) is not None
    return {
        name: build(snapshot) if everything or re.search(rf"\b{name}\b", query, re.IGNORECASE) else _empty(name)
        for name, build in _VIEWS.items()
    }


def _empty(name: Any) -> pa.Table:
    return (arrow_schema(name) if name in _STORED else view_schema(name)).empty_table()


def _patches(snapshot: Snapshot) -> pa.Table:
    charts = {
        artefact.fields["encoder"]: _charts(snapshot, artefact.fields["encoder"])
        for artefact in snapshot.artefacts("encoder")
    }
    return pa.concat_tables(
        [
            view_schema("patches").empty_table(),
            *(_segment_patches(snapshot, segment, charts[segment.encoder]) for segment in snapshot.segments()),
        ],
        promote_options="permissive",
    )


def _segment_patches(snapshot: Snapshot, segment: Segment, charts: Mapping[str, Any]) -> pa.Table:
    """Rows of one segment with row id, encoder, and canonical centres where the scan has a chart."""
    rows = segment.patches()
    chart = charts.get(snapshot.scan_of.get(segment.scan_artefact, ""))
    xyz = np.stack([rows.column(name).to_numpy() for name in ("x_mm", "y_mm", "z_mm")], axis=1)  # (n, 3)
    canonical = None if chart is None else xyz.astype(np.float64) @ chart[:, :3].T + chart[:, 3]
    made = {
        "patch": pa.array(segment.row_ids),
        "encoder": pa.array([segment.encoder]).take(pa.array([0] * segment.rows)),
    }
    for axis, name in enumerate(("cx_mm", "cy_mm", "cz_mm")):
        made[name] = pa.nulls(segment.rows) if canonical is None else pa.array(canonical[:, axis])
    schema = view_schema("patches")
    extra = [name for name in rows.column_names if name not in schema.names]
    columns = [
        (made[field.name] if field.name in made else rows.column(field.name)).cast(field.type) for field in schema
    ]
    fields = [*schema, *(rows.schema.field(name) for name in extra)]
    return pa.table([*columns, *(rows.column(name) for name in extra)], schema=pa.schema(fields))


def _charts(snapshot: Snapshot, encoder_id: str) -> dict[str, Any]:
    """By scan id: the affine (3, 4) from patient RAS+ mm to canonical mm."""
    path = snapshot.frame_path(encoder_id)
    if path is None:
        return {}
    try:
        table = pq.read_table(path / "charts.parquet", partitioning=None)
        cells = [table.column(f"a{row}{column}").to_numpy() for row in range(3) for column in range(4)]
        scans = table.column("scan").to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        raise StoreDamaged("the charts of a frame cannot be read", next_step="isimed index") from None
    return dict(zip(scans, np.stack(cells, axis=1).astype(np.float64).reshape(-1, 3, 4), strict=True))


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
    rows = {segment.path: segment.rows for segment in snapshot.segments()}
    return _rows("indexes", [_index(snapshot, artefact, rows) for artefact in snapshot.artefacts("index")])


def _index(snapshot: Snapshot, artefact: Artefact, rows: Mapping[str, int]) -> dict[str, Any]:
    try:
        described = json.loads((snapshot.verified(artefact) / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        described = {}  # an index is derived: a damaged one is listed, with what the manifest knows of it
    return {
        "index": _ulid(artefact),
        "encoder": artefact.fields["encoder"],
        "kind": described.get("recipe", {}).get("factory"),
        "rows": sum(rows.get(path, 0) for path in artefact.fields["covers"]),
        "bytes": artefact.bytes,
        "recall_at_10": described.get("recall_at_10"),
    }


def _generations(snapshot: Snapshot) -> pa.Table:
    names = view_schema("generations").names
    return _rows(
        "generations",
        [dict(zip(names, astuple(line), strict=True)) for line in history(snapshot.path, snapshot.generation)],
    )


def _rows(view: ViewName, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=view_schema(view))


def _ulid(artefact: Artefact) -> str:
    return artefact.path.split("/")[1]


_VIEWS: Mapping[str, Callable[[Snapshot], pa.Table]] = {
    **{name: partial(Snapshot.table, name=name) for name in _STORED},
    "patches": _patches,
    "encoders": _encoders,
    "segments": _segments,
    "indexes": _indexes,
    "generations": _generations,
}
