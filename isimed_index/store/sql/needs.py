"""What a query reads of a large table, found from its plan over empty tables of the same names and types.

Only what is found is loaded. A column that the plan does not read is there by name and type, and reading it is an
error: the plan is an economy, never a reason for a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from isimed_index.store.sql.wire import UNLOADED, Need, Request

_COLUMNS_ONLY = "unused_columns"  # the optimizer that stays: others would see that a table is empty
_SCAN = "SEQ_SCAN"
_LIMIT = "STREAMING_LIMIT"  # one that keeps the order of the rows
_MOST_ROWS = 1 << 40  # of a limit that says anything
# Leaves of a plan that read no table. Any other, such as a function of DuckDB's catalogue, may tell of all of them.
_LEAVES = {
    "DUMMY_SCAN",
    "COLUMN_DATA_SCAN",
    "CTE_SCAN",
    "REC_CTE_SCAN",
    "DELIM_SCAN",
    "EMPTY_RESULT",
    "EXPRESSION_SCAN",
}
_LEAVES |= {"RANGE", "GENERATE_SERIES", "UNNEST", "REPEAT", "INOUT_FUNCTION"}


def find(connection: Any, request: Request, large: list[str], bind: Callable[[], Any]) -> dict[str, Need]:
    """By name, what `request` needs of the `large` tables, which are there and empty; everything, if that is not plain.

    `bind` gives the relation that it asks for, or raises what is wrong with it.
    """
    columns = {name: [entry[0] for entry in connection.execute(f'DESCRIBE "{name}"').fetchall()] for name in large}
    everything = {name: Need(names) for name, names in columns.items()}
    if request.everything:
        return everything
    relation = bind()
    try:
        roots = _plan(connection, request.sql if request.view is None else relation.sql_query(), request.params)
    except Exception:  # noqa: BLE001 — it can be run, so whatever stands against a plan is no reason to refuse it
        return everything
    nodes = [node for root in roots for node in _walk(root)]
    if any(not node.get("children") and node["name"].strip() not in {_SCAN, *_LEAVES} for node in nodes):
        return everything
    return {name: _need(name, names, nodes) for name, names in columns.items()}


def replace(connection: Any, name: str, rows: pa.Table) -> None:
    """Put a view with the columns of the empty table `name` in its place, over `rows`, which has some of them."""
    described = connection.execute(f'DESCRIBE "{name}"').fetchall()
    connection.execute(f'DROP TABLE "{name}"')
    cells = (
        f"CAST({_quoted(column) if column in rows.column_names else f'error({UNLOADED!r})'} AS {kind}) AS "
        f"{_quoted(column)}"
        for column, kind, *_ in described
    )
    connection.from_arrow(rows.unify_dictionaries()).project(", ".join(cells)).create_view(name)


def _quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _plan(connection: Any, query: str, params: pa.Table) -> list[dict[str, Any]]:
    """The roots of the plan of a statement (of the one that it explains, if it explains one)."""
    import duckdb

    names = [name for (name,) in connection.execute("SELECT name FROM duckdb_optimizers()").fetchall()]
    connection.execute(f"SET disabled_optimizers = '{','.join(name for name in names if name != _COLUMNS_ONLY)}'")
    try:
        values = params.to_pylist()[0] if params.num_columns else None
        words = [(query[place:].split(None, 1)[0].lower(), place) for place, _ in duckdb.tokenize(query)]
        if words and words[0][0] == "explain":
            query = query[next(place for word, place in words[1:] if word.strip("(") not in _EXPLAINING) :]
        [statement] = connection.extract_statements(query)
        if statement.type.name != "SELECT":
            raise ValueError(statement.type.name)
        rows = connection.execute(f"EXPLAIN (FORMAT json) {query}", values).fetchall()
    finally:
        connection.execute("RESET disabled_optimizers")
    plan: list[dict[str, Any]] = json.loads(rows[0][1])
    return plan


_EXPLAINING = ("analyze", "verbose")


def _walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("children", ()):
        yield from _walk(child)


def _need(name: str, columns: list[str], nodes: list[dict[str, Any]]) -> Need:
    scans = [node for node in nodes if _table(node) == name]
    if not scans:
        return Need(columns[:1], 0)
    read = {column for scan in scans for column in _listed(scan["extra_info"].get("Projections"))}
    chosen = [column for column in columns if column in read] or columns[:1]  # rows are counted by some column
    return Need(chosen, _first_rows(nodes, name) if len(scans) == 1 else None)


def _first_rows(nodes: list[dict[str, Any]], name: str) -> int | None:
    """How many of its first rows are enough, where a limit of constants stands right over the one scan of the table.

    It takes no more than that from the scan, whatever stands above it.
    """
    for node in nodes:
        if node["name"].strip() != _LIMIT or "Limit" not in node["extra_info"] or len(node["children"]) != 1:
            continue
        [below] = node["children"]
        while below["name"].strip() == "PROJECTION" and len(below["children"]) == 1:
            [below] = below["children"]
        rows = int(node["extra_info"]["Limit"]) + int(node["extra_info"].get("Offset", 0))
        if _table(below) == name and rows < _MOST_ROWS:
            return rows
    return None


def _table(node: dict[str, Any]) -> str | None:
    if node["name"].strip() != _SCAN:
        return None
    return str(node["extra_info"]["Table"]).rsplit(".", 1)[-1]


def _listed(found: str | list[str] | None) -> list[str]:
    return [found] if isinstance(found, str) else list(found or ())
