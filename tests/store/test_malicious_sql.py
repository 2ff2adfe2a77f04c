"""SQL that means harm, or only takes too much: refused or harmless, in bounded time and memory, nothing is written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pandas as pd
import pyarrow as pa
import pytest
from store_builders import finish, start, whole_store

from isimed_cli.main import main
from isimed_index.errors import SqlRefused
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql import catalog, sandbox

WRITES = [
    "COPY scans TO '{out}/stolen.csv'",
    "COPY scans TO '{out}/stolen.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '{store}/new.csv'",
    "COPY (SELECT 1) TO '{segment}/patches.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '{beside}/file.txt'",
    "EXPLAIN ANALYZE COPY scans TO '{out}/stolen.csv'",
    "EXPORT DATABASE '{out}/dump'",
    "IMPORT DATABASE '{out}'",
    "ATTACH '{out}/new.db'",
    "ATTACH '{out}/new.db' AS other (READ_WRITE)",
    "DETACH memory",
    "USE memory",
    "CHECKPOINT",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE MACRO f(a) AS a + 1",
    "CREATE SEQUENCE s",
    "CREATE SECRET s (TYPE http, BEARER_TOKEN 'x')",
    "INSERT INTO scans SELECT * FROM scans",
    "UPDATE scans SET scan = 'x'",
    "DELETE FROM scans",
    "TRUNCATE scans",
    "DROP TABLE scans",
    "MERGE INTO scans USING subjects ON true WHEN MATCHED THEN DELETE",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DEALLOCATE p",
    "SELECT * FROM query('COPY scans TO ''{out}/stolen.csv''')",
    "SELECT * FROM query('SELECT 1; DROP TABLE scans')",
    "SELECT * FROM (COPY scans TO '{out}/stolen.csv')",
    "SELECT * FROM enable_logging(storage = 'file', storage_config = {{'path': '{out}/log'}})",
]
SETTINGS = [
    "SET threads = 1",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET memory_limit",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "INSTALL httpfs",
    "FORCE INSTALL spatial FROM community",
    "LOAD httpfs",
    "LOAD '{out}/evil.duckdb_extension'",
    "SELECT set_config('threads', '1')",
    "SELECT getenv('HOME')",
]
READS = [
    "SELECT * FROM read_csv('{beside}/file.txt')",
    "SELECT * FROM read_csv_auto('/etc/passwd')",
    "SELECT * FROM read_parquet('{store}/tables/*.parquet')",
    "SELECT * FROM read_text('{store}/FORMAT.json')",
    "SELECT * FROM read_json('{store}/FORMAT.json')",
    "SELECT * FROM read_blob('/etc/hostname')",
    "SELECT * FROM glob('{beside}/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM parquet_metadata('{store}/tables/*.parquet')",
    'SELECT * FROM "/etc/passwd"',
    "SELECT * FROM '{store}/tables/*.parquet'",
    "SELECT * FROM 'file://{beside}/file.txt'",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT * FROM query_table('/etc/passwd')",
    "WITH stolen AS (SELECT * FROM read_text('/etc/passwd')) SELECT * FROM stolen",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "EXPLAIN SELECT * FROM read_text('/etc/passwd')",
    "DESCRIBE SELECT * FROM read_csv('/etc/passwd')",
    "SUMMARIZE '{beside}/file.txt'",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''/etc/passwd'')'))",
    "SELECT * FROM frame",
    "SELECT * FROM snapshot",
    "SELECT * FROM incoming",
    "SELECT * FROM python_map_function((SELECT 1))",
    "SELECT * FROM arrow_scan()",
]
SEVERAL = [
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY scans TO '{out}/stolen.csv'",
    "SELECT 1 /* ; */; DROP TABLE scans",
    "SELECT 1 --\n; DROP TABLE scans",
    "SELECT ';' ; COPY scans TO '{out}/stolen.csv' -- ",
    "/* SELECT */ COPY scans TO '{out}/stolen.csv'",
    "",
    ";",
    "-- nothing",
]
BOMBS = [
    "SELECT repeat('x', 1000000000)",
    "SELECT length(repeat('x', 4000000000))",
    "SELECT length(rpad('x', 2000000000, 'y'))",
    "SELECT repeat('x', 1000000) FROM range(1000000)",
    "SELECT range(1000000000)",
    "SELECT list_aggregate(range(400000000), 'sum')",
    "SELECT flatten(list_transform(range(10000), lambda x: range(100000)))",
    "SELECT length(string_agg(repeat('x', 1000000), '')) FROM range(100000)",
    "SELECT list(repeat('x', 1000)) FROM range(10000000)",
    "WITH RECURSIVE r(s) AS (SELECT 'xx' UNION ALL SELECT s || s FROM r) SELECT max(length(s)) FROM r",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r",
    "SELECT sum(a.range * b.range) FROM range(1000000000) a, range(1000000000) b",
    "SELECT * FROM range(1000000000) ORDER BY hash(range)",
    "SELECT * FROM generate_series(1, 10000000000)",
    "SELECT * FROM repeat_row(1, 2, num_rows = 100000000000)",
    "SELECT " + "(" * 10_000 + "1" + ")" * 10_000,
    "SELECT 1" + "+1" * 100_000,
    "SELECT " + ",".join(["1"] * 400_000),
    "SELECT 1 -- " + "x" * 10_000_000,
]
HARMLESS = {
    "SELECT regexp_matches(repeat('a', 100000), '(a*)*b')": False,  # a regular expression takes linear time here
    "SELECT 1 -- ; COPY scans TO '{out}/stolen.csv'": 1,
    "SELECT '; DROP TABLE scans'": "; DROP TABLE scans",
}
PATHS = [
    "SELECT * FROM checkpoint('memory')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM pragma_database_size()",
    "SELECT current_setting('home_directory'), current_setting('extension_directory')",
    "SELECT current_setting('secret_directory'), current_setting('temp_directory')",
    "SELECT current_database(), current_schema(), current_query()",
    "SELECT error('{store}/FORMAT.json')",
    "SELECT * FROM '{store}/FORMAT.json'",
]
CONDITIONS = [
    "1=1); COPY scans TO '{out}/stolen.csv'; --",
    "1=1; DROP TABLE scans",
    "1=1 UNION SELECT * FROM scans",
    "scan IN (SELECT content FROM read_text('{beside}/file.txt'))",
    "EXISTS (SELECT * FROM '/etc/passwd')",
    "getenv('HOME') = 'x'",
    "length(repeat('x', 4000000000)) > 1",
    "EXISTS (SELECT 1 FROM range(1000000000) a, range(1000000000) b WHERE a.range + b.range < 0)",
    "(" * 10_000 + "1=1" + ")" * 10_000,
    "scan IN (" + ",".join(["'x'"] * 1_000_000) + ")",
    "",
]


def short(query: str) -> str:
    return query[:60] or "empty"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and, beside it, a folder with a file; no test may change a byte of it."""
    place = tmp_path_factory.mktemp("private")
    whole_store(place / "c")
    (place / "beside").mkdir()
    (place / "beside" / "file.txt").write_text("a,secret\n1,2\n")
    return place


def state(place: Path) -> dict[str, bytes | None]:
    """Every folder and file below with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


@pytest.fixture
def untouched(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`place`, with a proof after the test that nothing changed there or in the working directory."""
    monkeypatch.chdir(tmp_path)
    before = state(place)
    yield place
    assert state(place) == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def snapshot(untouched: Path) -> Snapshot:
    from isimed_index.store.repository import Repository

    return Repository.open(untouched / "c").snapshot()


def filled(query: str, snapshot: Snapshot) -> str:
    if "{" not in query:
        return query
    place = snapshot.path.parent
    segment = snapshot.path / snapshot.artefacts("segment")[0].path
    return query.format(out=place, store=snapshot.path, beside=place / "beside", segment=segment)


@pytest.mark.parametrize("query", [*WRITES, *SETTINGS, *READS, *SEVERAL], ids=short)
def test_what_is_no_reading_of_the_views_is_refused(snapshot: Snapshot, query: str) -> None:
    frame = pd.DataFrame({"a": [1]})  # a name in a query must not mean a variable
    with pytest.raises(SqlRefused) as caught:
        snapshot.sql(filled(query, snapshot), timeout_s=5)
    line = caught.value.line()
    assert "\n" not in line
    assert str(snapshot.path.parent) not in line
    assert len(line) < 500
    assert "LINE 1" not in line
    assert len(frame) == 1


@pytest.mark.parametrize("query", BOMBS, ids=short)
def test_what_takes_too_much_is_stopped(snapshot: Snapshot, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "QUERY_BYTES", 64 << 20)
    with pytest.raises(SqlRefused) as caught:
        snapshot.sql(query, timeout_s=1)
    assert len(caught.value.line()) < 500
    assert snapshot.sql("SELECT count(*) AS n FROM scans").to_pylist() == [{"n": 2}]  # the next question is answered


@pytest.mark.parametrize("query", HARMLESS, ids=short)
def test_what_only_looks_bad_is_answered(snapshot: Snapshot, query: str) -> None:
    assert [list(row.values()) for row in snapshot.sql(filled(query, snapshot)).to_pylist()] == [[HARMLESS[query]]]


@pytest.mark.parametrize("query", PATHS, ids=short)
def test_no_place_of_this_machine_is_told(snapshot: Snapshot, query: str) -> None:
    try:
        said = str(snapshot.sql(filled(query, snapshot)).to_pylist())
    except SqlRefused as refusal:
        said = refusal.line()
    for told in (str(Path.home()), str(snapshot.path.parent), str(Path.cwd()), os.environ["PATH"]):
        assert told == "/" or told not in said


@pytest.mark.parametrize("where", CONDITIONS, ids=short)
def test_a_condition_cannot_do_more_than_choose_rows(snapshot: Snapshot, where: str) -> None:
    with pytest.raises(SqlRefused) as caught:
        snapshot.matching("scans", filled(where, snapshot), timeout_s=1)
    assert str(snapshot.path.parent) not in caught.value.line()


@pytest.mark.parametrize(
    "query",
    [WRITES[0], READS[0], SETTINGS[1], SEVERAL[1], "SELECT length(repeat('x', 4000000000))", BOMBS[11]],
    ids=short,
)
def test_the_command_line_says_it_in_one_line(
    snapshot: Snapshot, query: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sql", filled(query, snapshot), "-s", str(snapshot.path), "--timeout", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error[sql_refused]: ")
    assert str(snapshot.path.parent) not in line


def test_the_command_line_answers_after_a_refusal(snapshot: Snapshot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", "DROP TABLE scans", "-s", str(snapshot.path)]) == 1
    assert main(["sql", "SELECT count(*) AS n FROM scans", "-s", str(snapshot.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 2}]


MEASURE = """
import resource, sys
from pathlib import Path
from isimed_index.errors import SqlRefused
from isimed_index.store.sql import catalog
from isimed_index.store.repository import Repository
snapshot = Repository.open(Path(sys.argv[1])).snapshot()
catalog.QUERY_BYTES = 64 << 20
for query in sys.argv[2:]:
    try:
        snapshot.sql(query, timeout_s=10)
    except SqlRefused:
        print("refused")
own = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def test_memory_is_bounded_by_the_kernel(snapshot: Snapshot) -> None:
    greedy = ["SELECT length(repeat('x', 4000000000))", "SELECT repeat('x', 1000000) FROM range(1000000)"]
    *refused, peak_kib = finish(start(MEASURE, str(snapshot.path), *greedy)).split()
    assert refused == ["refused", "refused"]
    # A process that answers nothing holds about 150 MiB. (What getrusage says of oneself has the parent's peak in it.)
    assert int(peak_kib) < 1 << 20


def test_an_engine_that_crashes_is_a_refusal(snapshot: Snapshot) -> None:
    snapshot.sql("SELECT 1")
    Timer(0.2, sandbox._idle()[-1].send_signal, [signal.SIGSEGV]).start()
    with pytest.raises(SqlRefused, match="engine stopped"):
        snapshot.sql("SELECT sum(a.range * b.range) FROM range(1000000000) a, range(1000000000) b")
    assert snapshot.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]


def test_an_idle_engine_that_was_ended_is_replaced(snapshot: Snapshot) -> None:
    snapshot.sql("SELECT 1")
    for engine in sandbox._idle():
        engine.kill()
        os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)
    assert snapshot.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]


def test_the_engine_has_no_environment_and_no_file(snapshot: Snapshot) -> None:
    snapshot.sql("SELECT 1")
    engine = sandbox._idle()[-1]
    home = Path("/proc", str(engine.pid))
    assert b"HOME=" not in (home / "environ").read_bytes()
    assert (home / "cwd").readlink() == Path("/")
    assert not [link for link in (home / "fd").iterdir() if str(link.readlink()).startswith(str(snapshot.path.parent))]


@pytest.mark.parametrize("value", [object(), pd.DataFrame({"a": [1]}), pa.table({"a": [1]}), {"a": 1}], ids=type)
def test_a_parameter_is_a_plain_value(snapshot: Snapshot, value: object) -> None:
    with pytest.raises(SqlRefused, match="parameter a: expected"):
        snapshot.sql("SELECT $a", {"a": value})
