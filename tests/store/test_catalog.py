"""SQL sees the pinned generation and can do nothing else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import get_args

import numpy as np
import polars
import pytest
from store_builders import ENCODER, add_scan, add_segment, whole_store

from isimed_index import contracts
from isimed_index.errors import SqlRefused, StoreWarning, UsageError
from isimed_index.store.files import tree_digest
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql import catalog

VIEWS = ["encoders", "generations", "indexes", "labels", "matches", "patch_labels", "patches", "regions", "scans"]
VIEWS += ["segments", "subjects", "transforms"]


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return whole_store(tmp_path / "private" / "c").snapshot()


def test_all_views_are_listed(snapshot: Snapshot) -> None:
    assert snapshot.sql("SHOW TABLES").column("name").to_pylist() == VIEWS


@pytest.mark.parametrize("view", get_args(contracts.ViewName))
def test_views_have_the_columns_of_the_contract_full_or_empty(
    snapshot: Snapshot, tmp_path: Path, view: contracts.ViewName
) -> None:
    bare = Repository.create(tmp_path / "bare").snapshot()
    for store in (snapshot, bare):
        schema = store.sql(f"SELECT * FROM {view}").schema
        assert schema.names == contracts.view_schema(view).names
        assert [field.type for field in schema] == [field.type for field in contracts.view_schema(view)]


def test_patches_have_row_ids_and_canonical_centres_where_there_is_a_chart(snapshot: Snapshot) -> None:
    columns = "patch, scan, encoder, i, x_mm, cx_mm, cy_mm, cz_mm"
    rows = snapshot.sql(f"SELECT {columns} FROM patches WHERE i = 2 ORDER BY patch").to_pylist()
    first = {"patch": 2, "scan": "sub-01_T1w", "encoder": ENCODER, "i": 2, "x_mm": 4.0}
    second = {"patch": 5, "scan": "sub-02_ct", "encoder": ENCODER, "i": 2, "x_mm": 4.0}
    assert rows == [
        {**first, "cx_mm": 4 + 10.0, "cy_mm": 2 * 6 + 20.0, "cz_mm": 3 * 10 + 30.0},
        {**second, "cx_mm": None, "cy_mm": None, "cz_mm": None},
    ]


def test_the_other_views(snapshot: Snapshot) -> None:
    encoder = snapshot.sql("SELECT encoder, name, method, dim, patch_vox, spacing_mm FROM encoders").to_pylist()
    assert encoder == [
        {"encoder": ENCODER, "name": "toy", "method": "isimed", "dim": 4, "patch_vox": 4, "spacing_mm": 2.0}
    ]
    segments = snapshot.sql("SELECT scan, first_patch, rows FROM segments ORDER BY first_patch").to_pylist()
    assert segments == [
        {"scan": "sub-01_T1w", "first_patch": 0, "rows": 3},
        {"scan": "sub-02_ct", "first_patch": 3, "rows": 5},
    ]
    index = snapshot.sql("SELECT kind, rows, recall_at_10 FROM indexes").to_pylist()
    assert index == [{"kind": "Flat", "rows": 8, "recall_at_10": 1.0}]
    assert snapshot.sql("SELECT verb FROM generations WHERE generation = 3").to_pylist() == [{"verb": "pretrain"}]


def test_a_damaged_index_is_still_listed(snapshot: Snapshot) -> None:
    (snapshot.path / snapshot.artefacts("index")[0].path / "index.json").write_text("{")
    with pytest.warns(StoreWarning, match="kind and recall are not known"):
        assert snapshot.sql("SELECT kind, rows FROM indexes").to_pylist() == [{"kind": None, "rows": 8}]


def test_joins_and_parameters(snapshot: Snapshot) -> None:
    query = """SELECT s.modality, count(*) AS n FROM "Patches" AS p JOIN Scans AS s USING (scan)
               WHERE s.modality = $modality GROUP BY ALL"""
    assert snapshot.sql(query, {"modality": "CT"}).to_pylist() == [{"modality": "CT", "n": 5}]
    with pytest.raises(SqlRefused):
        snapshot.sql(query)
    with pytest.raises(SqlRefused):
        snapshot.sql("SELECT 1", {"unused": 1})


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM query_table('pat' || 'ches')",
        "SELECT * FROM query('SELECT count(*) FROM pat' || 'ches')",
        "SELECT estimated_size FROM duckdb_tables() WHERE table_name LIKE 'pat%ches'",
        "FROM patches SELECT count(*)",
    ],
)
def test_a_table_named_by_a_detour_is_not_silently_empty(snapshot: Snapshot, query: str) -> None:
    assert [list(row.values()) for row in snapshot.sql(query).to_pylist()] == [[8]]


@pytest.mark.parametrize(
    "query",
    ["DESCRIBE scans", "SHOW scans", "SUMMARIZE patches", "EXPLAIN SELECT * FROM scans", "VALUES (1)", "FROM scans;"],
)
def test_statements_that_only_read_run(snapshot: Snapshot, query: str) -> None:
    assert snapshot.sql(query).num_rows > 0


def test_metadata_columns_can_be_described(snapshot: Snapshot) -> None:
    assert "weight_kg" in snapshot.sql("DESCRIBE scans").column("column_name").to_pylist()


MALICIOUS = [
    "COPY scans TO '{out}/stolen.csv'",
    "COPY (SELECT 1) TO '{store}/FORMAT.json'",
    "EXPLAIN ANALYZE COPY scans TO '{out}/stolen.csv'",
    "COPY scans FROM '/etc/passwd'",
    "EXPORT DATABASE '{out}/dump'",
    "IMPORT DATABASE '{out}'",
    "ATTACH '{out}/new.db'",
    "ATTACH ':memory:' AS other",
    "DETACH memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "FORCE INSTALL spatial FROM community",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{store}/manifests/*.json'",
    "SELECT * FROM read_text('{store}/FORMAT.json')",
    "SELECT * FROM read_blob('/etc/hostname')",
    "SELECT * FROM read_parquet('{store}/tables/*.parquet')",
    "SELECT * FROM parquet_metadata('{store}/tables/*.parquet')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "SELECT * FROM enable_logging(storage = 'file', storage_config = {{'path': '{out}/log'}})",
    "SELECT getenv('HOME')",
    "SELECT * FROM snapshot",
    "SELECT * FROM incoming",
    "PRAGMA version",
    "PRAGMA enable_profiling",
    "SET threads = 1",
    "SET enable_external_access = true",
    "RESET memory_limit",
    "CALL pragma_version()",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY scans TO '{out}/stolen.csv'",
    "",
    "-- nothing",
    "CREATE TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW scans AS SELECT 1",
    "CREATE PERSISTENT SECRET s (TYPE http, BEARER_TOKEN 'x')",
    "DROP TABLE scans",
    "DELETE FROM scans",
    "UPDATE scans SET scan = 'x'",
    "INSERT INTO scans SELECT * FROM scans",
    "ALTER TABLE scans ADD COLUMN x INT",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN",
    "USE memory",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SELEKT 1",
]


@pytest.mark.parametrize("query", MALICIOUS)
def test_malicious_or_senseless_sql_is_stopped(snapshot: Snapshot, tmp_path: Path, query: str) -> None:
    before = tree_digest(tmp_path)
    with pytest.raises(SqlRefused) as caught:
        snapshot.sql(query.format(store=snapshot.path, out=tmp_path))
    assert "\n" not in str(caught.value)
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM duckdb_settings()",
        "SELECT * FROM duckdb_databases()",
        "SELECT * FROM duckdb_extensions()",
        "SELECT * FROM duckdb_secrets()",
        "SELECT * FROM duckdb_tables()",
        "SELECT * FROM duckdb_temporary_files()",
        "SELECT current_setting('secret_directory'), current_setting('extension_directory')",
        "SELECT * FROM scans, segments, indexes, generations, encoders",
        "SELECT nothing FROM scans",
    ],
)
def test_no_path_of_this_machine_leaks(snapshot: Snapshot, query: str) -> None:
    try:
        said = str(snapshot.sql(query).to_pylist())
    except SqlRefused as refusal:
        said = refusal.line()
    for path in (str(Path.home()), str(snapshot.path), "private", str(Path.cwd())):
        assert path not in said


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT 1 - n FROM r) SELECT n FROM r WHERE n > 5",
        "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b",
        "SELECT a.range FROM range(10000000) a, range(10000000) b WHERE a.range + b.range < 0",
    ],
)
def test_an_endless_query_is_stopped_in_time(snapshot: Snapshot, query: str) -> None:
    start = time.monotonic()
    with pytest.raises(SqlRefused, match=r"ran past 0\.3 s"):
        snapshot.sql(query, timeout_s=0.3)
    assert time.monotonic() - start < 10


def test_a_query_that_needs_too_much_memory_is_stopped(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "QUERY_BYTES", 64 << 20)
    with pytest.raises(SqlRefused, match="needs more than 64 MiB"):
        snapshot.sql("SELECT list(range) FROM range(100000000)")


def test_a_result_that_is_too_large_is_stopped(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "QUERY_BYTES", 32 << 20)
    with pytest.raises(SqlRefused, match="larger than 32 MiB"):
        snapshot.sql("SELECT a.range, b.range FROM range(1000000) a, range(1000000) b")


def test_a_change_that_a_select_can_make_ends_with_the_query(snapshot: Snapshot) -> None:
    snapshot.sql("WITH gone AS (DELETE FROM scans RETURNING scan) SELECT * FROM gone")
    assert snapshot.sql("SELECT count(*) AS n FROM scans").to_pylist() == [{"n": 2}]


def test_only_the_views_that_a_query_names_are_read(snapshot: Snapshot) -> None:
    for artefact in snapshot.artefacts("segment"):
        (snapshot.path / artefact.path / "patches.parquet").unlink()
    assert snapshot.sql("SELECT count(*) AS n FROM scans").to_pylist() == [{"n": 2}]


def test_values_cannot_become_statements(tmp_path: Path) -> None:
    evil = "x'); DROP TABLE scans; --"
    snapshot = add_scan(Repository.create(tmp_path / "c"), evil)
    assert snapshot.sql("SELECT scan FROM scans WHERE scan = $scan", {"scan": evil}).num_rows == 1


@pytest.mark.parametrize(
    ("query", "said", "next_step"),
    [
        ("SELECT nothing FROM labels", 'column "nothing" not found', 'isimed sql "DESCRIBE labels"'),
        ("SELECT a.nothing FROM scans a", "nothing", 'isimed sql "DESCRIBE scans"'),
        ("SELECT * FROM scan", 'Did you mean "scans"', 'isimed sql "SHOW TABLES"'),
        ("SELECT $age", "the query asks for $age, which has no value", "add -p age VALUE"),
        ("SELEKT 1", "syntax error", "isimed sql --help"),
        ("DROP TABLE scans", "found DROP", "send one statement that only reads"),
        ("SELECT * FROM read_text('/a/b')", "no files or settings", 'isimed sql "SHOW TABLES"'),
    ],
)
def test_a_refusal_says_how_to_go_on(snapshot: Snapshot, query: str, said: str, next_step: str) -> None:
    with pytest.raises(SqlRefused) as caught:
        snapshot.sql(query)
    assert said in str(caught.value)
    assert caught.value.next_step == next_step


def test_parameters_keep_their_types(snapshot: Snapshot) -> None:
    given = {"i": 3, "f": 0.5, "b": True, "none": None, "text": "3", "day": date(2026, 1, 2), "list": [1, 2]}
    query = "SELECT " + ", ".join(f"${name} AS {name}" for name in given)
    assert snapshot.sql(query, given).to_pylist() == [given]
    assert snapshot.sql("SELECT $n AS n", {"n": np.int64(7)}).to_pylist() == [{"n": 7}]


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_time_out_is_above_zero(snapshot: Snapshot, timeout_s: float) -> None:
    with pytest.raises(UsageError, match="time-out above 0 s"):
        snapshot.sql("SELECT 1", timeout_s=timeout_s)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT " + ",".join(["1"] * 490_000),  # parsing and binding
        "SELECT count(*) FROM " + ", ".join(f"range(99999999) r{i}" for i in range(4)),  # executing
        "SELECT range FROM range(99999999) ORDER BY hash(range)",  # sorting, then fetching
    ],
    ids=["binding", "executing", "fetching"],
)
def test_the_time_out_holds_in_every_stage(snapshot: Snapshot, query: str) -> None:
    with pytest.raises(SqlRefused, match=r"ran past 0\.2 s"):
        snapshot.sql(query, timeout_s=0.2)


def test_threads_can_ask_at_once(snapshot: Snapshot) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: snapshot.sql("SELECT $n AS n", {"n": n}).to_pylist(), range(12)))
    assert answers == [[{"n": n}] for n in range(12)]


def test_results_go_to_pandas_and_polars(snapshot: Snapshot) -> None:
    table = snapshot.sql("SELECT scan, age, nx FROM scans ORDER BY scan")
    assert table.to_pandas()["age"].tolist()[0] == 40.0
    frame = polars.from_arrow(table)
    assert isinstance(frame, polars.DataFrame)
    assert frame.filter(polars.col("age") > 30)["scan"].to_list() == ["sub-01_T1w"]


def test_a_later_generation_has_its_own_patches(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    before = repository.snapshot()
    assert before.sql("SELECT count(*) AS n FROM patches").to_pylist() == [{"n": 8}]
    add_scan(repository, "sub-03_ct")
    add_segment(repository, "sub-03_ct", 4)
    for store, n in ((before, 8), (repository.snapshot(), 12), (before, 8)):
        assert store.sql("SELECT count(*) AS n FROM patches").to_pylist() == [{"n": n}]


@pytest.mark.parametrize("where", ["1", "nx", "'sub-01_T1w'", "scan", "nx / 0"])
def test_a_condition_is_true_or_false_and_nothing_else(tmp_path: Path, where: str) -> None:
    snapshot = whole_store(tmp_path / "c").snapshot()
    with pytest.raises(SqlRefused, match="a condition that is true or false"):
        snapshot.matching("scans", where)
    assert snapshot.matching("scans", "NULL").num_rows == 0
    assert snapshot.matching("scans", "nx > 1 -- all").num_rows == 2


def test_an_error_shows_no_values_of_the_data(tmp_path: Path) -> None:
    snapshot = whole_store(tmp_path / "c").snapshot()
    with pytest.raises(SqlRefused) as refused:
        snapshot.sql("SELECT CAST(scan AS INT) FROM scans")
    assert "sub-0" not in str(refused.value)


def test_an_endless_time_out_is_a_long_one(tmp_path: Path) -> None:
    snapshot = whole_store(tmp_path / "c").snapshot()
    assert snapshot.sql("SELECT 1 AS n", timeout_s=1e300).to_pylist() == [{"n": 1}]
