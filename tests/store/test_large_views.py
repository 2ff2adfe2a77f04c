"""A view too large to send whole: only what a query reads of it is loaded, and the answer is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from store_builders import add_encoder, add_scan, add_segment, whole_store

from isimed_index import contracts
from isimed_index.errors import SqlRefused, StoreDamaged
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql import needs, patches, sandbox
from isimed_index.store.sql.wire import UNLOADED, Need, Request
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches

QUERIES = [
    "SELECT * FROM patches ORDER BY patch",
    "FROM patches",
    "SELECT count(*) FROM patches",
    "SELECT scan, avg(foreground) FROM patches WHERE x_mm BETWEEN 1 AND 5 GROUP BY scan ORDER BY scan",
    "SELECT patch, cx_mm FROM patches WHERE encoder LIKE '%' AND scan = 'sub-01_T1w'",
    "SELECT DISTINCT patches FROM patches ORDER BY 1",
    "SELECT count(*) FROM patches NATURAL JOIN scans",
    "SELECT a.i, b.z_mm FROM patches a JOIN patches b USING (j) WHERE b.x_mm > 1 ORDER BY ALL",
    "WITH q AS (SELECT * FROM patches) SELECT max(i), min(scan) FROM q",
    "SELECT (SELECT max(p.y_mm) FROM patches p WHERE p.scan = s.scan) FROM scans s ORDER BY 1",
    "SELECT COLUMNS('.*_mm') FROM patches ORDER BY ALL",
    "SELECT x_mm + 1 AS i FROM patches ORDER BY i LIMIT 3",
    "SELECT * FROM patches LIMIT 4",
    "SELECT scan FROM patches LIMIT 2 OFFSET 3",
    "SELECT scan FROM (SELECT * FROM patches LIMIT 6) WHERE foreground >= 0 LIMIT 5",
    "SELECT a.scan FROM (FROM patches LIMIT 2) a, (FROM patches LIMIT 3) b, patches c ORDER BY ALL",
    "SELECT * FROM patches LIMIT 50%",
    "SELECT patch FROM patches LIMIT ALL OFFSET 2",
    "SELECT patch FROM patches LIMIT 9223372036854775807 OFFSET 2",
    "FROM (SELECT patch FROM patches OFFSET 5) LIMIT 3",
    "SELECT * FROM patches LIMIT 0",
    "SELECT unnest([patch, 10]) FROM patches LIMIT 5",
    "SELECT * REPLACE (round(avg::DOUBLE, 9) AS avg, round(std::DOUBLE, 9) AS std) FROM (SUMMARIZE patches)",
    "DESCRIBE patches",
    "SHOW TABLES",
    "SELECT * FROM query('SELECT x_mm FROM patches ORDER BY 1')",
    "SELECT 1 WHERE EXISTS (FROM patches WHERE k > 100)",
    "SELECT scan, patch, row_number() OVER (PARTITION BY scan ORDER BY patch) FROM patches ORDER BY ALL",
    "SELECT 1",
    "VALUES (1), (2)",
    "WITH RECURSIVE r AS (SELECT min(patch) AS n FROM patches UNION ALL SELECT n + 1 FROM r WHERE n < 5) FROM r",
    "SELECT i FROM patches UNION ALL SELECT label FROM labels ORDER BY 1",
    "(SELECT i FROM patches ORDER BY 1 LIMIT 2) UNION ALL (SELECT k FROM patches ORDER BY 1 LIMIT 1) ORDER BY 1",
]
REFUSED = ["SELECT nothing FROM patches", "SELECT", "COPY patches TO 'x'", "SELECT 1; SELECT 2", "DROP TABLE patches"]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Plain segments, packed ones, and dead rows."""
    repository = whole_store(tmp_path / "c")
    compact(repository)
    add_scan(repository, "late")
    add_segment(repository, "late", 4)
    delete_patches(repository, "patch IN (1, 9)")
    return repository


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Need]:
    """What was loaded of views, every one of which counts as large."""
    found: list[Need] = []

    class Spied(sandbox.Large):
        def __init__(self, schema: pa.Schema, rows: int, read: Any) -> None:
            super().__init__(schema, rows, lambda need: (found.append(need), read(need))[1])

    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    monkeypatch.setattr(patches, "Large", Spied)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_the_answer_is_that_of_a_whole_table(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    snapshot = repository.snapshot()
    whole = snapshot.sql(query)
    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    assert snapshot.sql(query).equals(whole)


def test_a_summary_is_that_of_a_whole_table(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last digits of a mean and a deviation, which are those of the threads that summed them."""

    def summary() -> tuple[list[float], dict[str, list[Any]]]:
        columns = repository.snapshot().sql("SUMMARIZE patches").to_pydict()
        numbers = columns.pop("avg") + columns.pop("std")
        return [float(text) for text in numbers if text is not None], columns

    numbers, others = summary()
    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    assert summary() == (pytest.approx(numbers, rel=1e-12), others)


@pytest.mark.parametrize("query", REFUSED)
def test_what_is_refused_is_refused_with_the_same_words(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    def said() -> str:
        with pytest.raises(SqlRefused) as refused:
            repository.snapshot().sql(query)
        return str(refused.value)

    before = said()
    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    assert said() == before


@pytest.mark.parametrize(
    ("query", "need"),
    [
        (
            "SELECT scan, avg(foreground) FROM patches WHERE x_mm > 1 GROUP BY scan",
            Need(["scan", "x_mm", "foreground"]),
        ),
        ("SELECT count(*) FROM patches", Need(["patch"])),
        ("SELECT j FROM patches LIMIT 2 OFFSET 1", Need(["j"], 3)),
        ("SELECT j FROM patches WHERE j > 0 LIMIT 2", Need(["j"])),
        ("EXPLAIN ANALYZE SELECT max(k) FROM patches", Need(["k"])),
        ("EXPLAIN SELECT max(k) FROM patches", Need(["k"])),
        ("EXPLAIN (ANALYZE, FORMAT JSON) SELECT max(k) FROM patches", Need(contracts.view_schema("patches").names)),
    ],
)
def test_only_what_the_plan_reads_is_loaded(repository: Repository, loaded: list[Need], query: str, need: Need) -> None:
    repository.snapshot().sql(query)
    assert loaded == [need]


NESTED = [  # a limit of more than 10,000 rows keeps the order of rows in the plan
    "FROM (SELECT patch FROM t OFFSET 90000) LIMIT 20000",
    "FROM (SELECT patch FROM t LIMIT 20000 OFFSET 5000) LIMIT 15000",
    "FROM (SELECT patch FROM t LIMIT 20000) OFFSET 15000",
    "FROM (FROM (SELECT patch FROM t LIMIT 30000 OFFSET 7) LIMIT 20000 OFFSET 11) LIMIT 12000 OFFSET 13",
    "FROM (SELECT patch FROM t LIMIT 20000) WHERE patch > 15000 LIMIT 12000",
    "SELECT patch FROM t LIMIT 20000 OFFSET 90000",
]


@pytest.mark.parametrize("query", NESTED)
def test_the_rows_that_a_limit_needs_are_enough(query: str) -> None:
    rows = pa.table({"patch": range(100_000)})
    with duckdb.connect(":memory:") as whole, duckdb.connect(":memory:") as connection:
        whole.register("t", rows)
        connection.execute("CREATE TABLE t (patch BIGINT)")
        request = Request(query, pa.table({}), None, 1.0, 1 << 30)
        need = needs.find(connection, request, ["t"], lambda: None)["t"]
        needs.replace(connection, "t", rows.slice(0, need.rows))
        assert connection.sql(query).fetchall() == whole.sql(query).fetchall()


def test_a_condition_loads_its_columns_and_those_that_are_told(repository: Repository, loaded: list[Need]) -> None:
    found = repository.snapshot().matching("patches", "i >= 2 AND scan = 'late'", ["patch"])
    assert loaded == [Need(["patch", "scan", "i"])]
    assert found.column_names == ["patch"]
    assert found["patch"].to_pylist() == [10, 11]


@pytest.mark.parametrize("query", REFUSED)
def test_nothing_is_loaded_for_what_is_refused(repository: Repository, loaded: list[Need], query: str) -> None:
    with pytest.raises(SqlRefused):
        repository.snapshot().sql(query)
    assert loaded == []


def test_nothing_is_loaded_for_a_description(repository: Repository, loaded: list[Need]) -> None:
    repository.snapshot().sql("DESCRIBE patches")
    assert loaded == []


def test_columns_beside_the_contract_are_there_where_a_segment_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import store_builders

    repository = Repository.create(tmp_path / "c")
    add_encoder(repository)
    plain = store_builders.patch_rows
    for scan in ("with", "without"):
        add_scan(repository, scan)
        if scan == "with":
            monkeypatch.setattr(
                store_builders, "patch_rows", lambda s, n: plain(s, n).append_column("grade", pa.array(range(n)))
            )
        add_segment(repository, scan, 3)
        monkeypatch.undo()
    snapshot: Snapshot = repository.snapshot()
    query = "SELECT scan, grade FROM patches ORDER BY patch"
    whole = snapshot.sql(query)
    assert whole["grade"].to_pylist() == [0, 1, 2, None, None, None]
    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    assert snapshot.sql(query).equals(whole)


def test_columns_of_any_type_can_stand_beside_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import store_builders

    repository = Repository.create(tmp_path / "c")
    add_encoder(repository)
    add_scan(repository, "one")
    plain = store_builders.patch_rows
    odd = {
        "none": pa.nulls(3),
        "list": pa.array([[1], None, []]),
        "long": pa.array(["a", "b", None], pa.large_string()),
    }

    def rows(scan: str, n: int) -> pa.Table:
        table = plain(scan, n)
        for name, column in odd.items():
            table = table.append_column(name, column)
        return table

    monkeypatch.setattr(store_builders, "patch_rows", rows)
    add_segment(repository, "one", 3)
    whole = repository.snapshot().sql("FROM patches")
    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    assert repository.snapshot().sql("FROM patches").to_pylist() == whole.to_pylist()


def test_labels_that_are_no_map_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import store_builders

    repository = Repository.create(tmp_path / "c")
    add_encoder(repository)
    add_scan(repository, "one")
    bare = store_builders.patch_rows("one", 3).drop_columns("label_shares")
    monkeypatch.setattr(
        store_builders, "patch_rows", lambda *_: bare.append_column("label_shares", pa.array([1, 2, 3]))
    )
    add_segment(repository, "one", 3)
    with pytest.raises(StoreDamaged, match="expected a map"):
        repository.snapshot().sql("FROM patch_labels")


def test_more_than_memory_holds_is_refused_before_it_is_loaded(
    repository: Repository, loaded: list[Need], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_free_bytes", lambda: 100)
    with pytest.raises(SqlRefused, match=r"take 0\.0 GB, 0\.0 GB are free"):
        repository.snapshot().sql("FROM patches")
    assert loaded == []
    assert repository.snapshot().sql("SELECT i FROM patches LIMIT 2").num_rows == 2


def test_a_column_that_was_not_loaded_is_an_error_and_never_null() -> None:
    with duckdb.connect(":memory:") as connection:
        connection.execute("CREATE TABLE t (a INTEGER, b VARCHAR)")
        needs.replace(connection, "t", pa.table({"a": [1, 2]}))
        assert connection.sql("SELECT a FROM t").fetchall() == [(1,), (2,)]
        assert [kind for _, kind, *_ in connection.sql("DESCRIBE t").fetchall()] == ["INTEGER", "VARCHAR"]
        with pytest.raises(duckdb.Error, match=UNLOADED):
            connection.sql("SELECT a FROM t WHERE b IS NULL").fetchall()


def test_a_query_whose_plan_deceived_is_asked_again_with_everything(
    repository: Repository, loaded: list[Need], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = sandbox._send_large

    def forgetful(stream: Any, tables: Any, wanted: Any) -> Any:
        less = {name: need if len(need.columns) > 5 else Need(need.columns[:1]) for name, need in wanted.items()}
        return send(stream, tables, less)

    monkeypatch.setattr(sandbox, "_send_large", forgetful)
    assert repository.snapshot().sql("SELECT max(i), max(k) FROM patches").num_rows == 1
    assert [len(need.columns) for need in loaded] == [1, 13]


def test_a_leaf_that_is_not_known_loads_everything() -> None:
    with duckdb.connect(":memory:") as connection:
        connection.execute("CREATE TABLE t (a INTEGER, b VARCHAR)")
        for query, need in (
            ("SELECT a FROM t", Need(["a"])),
            ("SELECT estimated_size FROM duckdb_tables()", Need(["a", "b"])),
            ("SELECT 1", Need(["a"], 0)),
        ):
            request = Request(query, pa.table({}), None, 1.0, 1 << 30)
            assert needs.find(connection, request, ["t"], lambda: None) == {"t": need}
