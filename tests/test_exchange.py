"""Exports that other tools read, a store from its own export, and embeddings that other programs made."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cohorts import COPIES, Cohort, tiny_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from store_builders import (
    ENCODER,
    OTHER_ENCODER,
    add_encoder,
    add_regions,
    add_segment,
    card,
    finish,
    start,
    whole_store,
)

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.contracts import ViewName, conform
from isimed_index.errors import (
    EncoderMismatch,
    Incompatible,
    IsimedWarning,
    NotFound,
    OutsideScan,
    StoreDamaged,
    UsageError,
)
from isimed_index.exchange import restore
from isimed_index.exchange.columns import vector_column, vectors_of
from isimed_index.exchange.export import Selection, export_parquet
from isimed_index.scans.chunks import open_chunks
from isimed_index.store.files import file_digest
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import STORED_TABLES, Snapshot
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches

SCANS = ("sub-01_T1w", "sub-02_ct")
PATCHES = "SELECT * EXCLUDE (patch, cx_mm, cy_mm, cz_mm) FROM patches ORDER BY encoder, scan, i, j, k"
QUESTIONS = (
    "SELECT * EXCLUDE (artefact) FROM scans ORDER BY scan",
    "SELECT * FROM subjects ORDER BY subject",
    "SELECT * FROM labels ORDER BY scan, label",
    PATCHES,
    "SELECT * EXCLUDE (time, folder) FROM encoders ORDER BY encoder",
    "SELECT scan, encoder, rows, grid FROM segments ORDER BY encoder, scan",
)


def every_vector(snapshot: Snapshot, encoder: str) -> dict[tuple[str, str], np.ndarray]:
    """By scan and output."""
    segments = snapshot.segments_by_scan(encoder)
    return {(scan, name): segment.vectors(name) for scan, segment in segments.items() for name in segment.outputs}


def assert_same_vectors(one: Snapshot, other: Snapshot, encoder: str) -> None:
    a, b = every_vector(one, encoder), every_vector(other, encoder)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert a[key].tobytes() == b[key].tobytes()


def assert_same_answers(one: Snapshot, other: Snapshot) -> None:
    for question in QUESTIONS:
        assert one.sql(question).to_pylist() == other.sql(question).to_pylist(), question


def generation(store: Path) -> int:
    return Repository.open(store).head()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Two encoders; one patch of each segment deleted; packed but for one segment."""
    repository = whole_store(tmp_path / "store")
    add_encoder(repository, OTHER_ENCODER, "second")
    add_segment(repository, "sub-01_T1w", 4, OTHER_ENCODER)
    delete_patches(repository, "i = 1")
    compact(repository)
    add_segment(repository, "sub-02_ct", 2, OTHER_ENCODER)
    return repository


def said(repository: Repository) -> None:
    """Commit an answer from each scan to each, and a transform of each."""
    places = {f"{side}{axis}_mm": 1.0 for side in ("", "from_") for axis in "xyz"}
    about = {"encoder": ENCODER, "generation": 1, "time": "2026-01-01T00:00:00Z"}
    pairs = [(one, other) for one in SCANS for other in SCANS]
    answers = [
        {"question": one, "rank": rank, "from_scan": one, "scan": other, **places, **about}
        for rank, (one, other) in enumerate(pairs, 1)
    ]
    cells = {f"a{row}{column}": float(row == column) for row in range(3) for column in range(4)}
    facts = {"reference": "a1b2c3d4e5f6", "kind": "rigid", "rounds": 1, "settings": "s", "time": about["time"]}
    measured = dict.fromkeys(("x_mm", "y_mm", "z_mm", "metric_before", "metric_after", "overlap"), 1.0)
    moved = [{"scan": scan, **facts, **cells, **measured} for scan in SCANS]
    tables = {
        "matches": conform("matches", pa.Table.from_pylist(answers)),
        "transforms": conform("transforms", pa.Table.from_pylist(moved)),
    }
    with repository.transaction("keep") as transaction:
        transaction.commit(lambda head: Proposal(tables=tables))


# -- export ---------------------------------------------------------------------------------------------------------


def test_parquet_holds_the_view_and_the_vectors_row_by_row(repository: Repository, tmp_path: Path):
    snapshot = repository.snapshot()
    done = export_parquet(Selection(snapshot), tmp_path / "out")
    assert (done.scans, done.encoders, done.patches) == (2, 2, 2 + 4 + 3 + 2)
    for encoder in (ENCODER, OTHER_ENCODER):
        table = pq.read_table(tmp_path / "out" / f"patches-{encoder}.parquet")
        view = snapshot.sql("SELECT * FROM patches WHERE encoder = $e ORDER BY patch", {"e": encoder})
        assert table.select(view.column_names).to_pylist() == view.to_pylist()
        segments = snapshot.segments(encoder)
        for name, dtype in (("descriptor", "float16"), ("position", "float32")):
            found = vectors_of(table[name], name)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, np.concatenate([segment.vectors(name) for segment in segments]))
    assert 1 not in pq.read_table(tmp_path / "out" / f"patches-{ENCODER}.parquet")["i"].to_pylist()
    assert "artefact" not in pq.read_table(tmp_path / "out" / "scans.parquet").column_names


def test_pandas_polars_and_duckdb_read_the_parquet_files(repository: Repository, tmp_path: Path):
    import duckdb
    import pandas as pd
    import polars as pl

    snapshot = repository.snapshot()
    export_parquet(Selection(snapshot, encoder=ENCODER), tmp_path / "out")
    file = tmp_path / "out" / f"patches-{ENCODER}.parquet"
    expected = np.concatenate([segment.vectors("descriptor") for segment in snapshot.segments(ENCODER)])
    for rows in (
        pd.read_parquet(file)["descriptor"].tolist(),
        pl.read_parquet(file)["descriptor"].to_list(),
        [row[0] for row in duckdb.sql(f"SELECT descriptor FROM '{file}'").fetchall()],
    ):
        np.testing.assert_array_equal(np.array(rows, np.float16), expected)
    assert not (tmp_path / "out" / f"patches-{OTHER_ENCODER}.parquet").exists()


def test_arrays_lie_beside_their_patches(repository: Repository, tmp_path: Path):
    snapshot = repository.snapshot()
    isi.open(repository.path).export(tmp_path / "out", "npy", where="modality = 'CT'")
    for encoder in (ENCODER, OTHER_ENCODER):
        rows = pq.read_table(tmp_path / "out" / encoder / "patches.parquet")
        assert set(rows["scan"].to_pylist()) == {"sub-02_ct"}
        segment = snapshot.segments_by_scan(encoder)["sub-02_ct"]
        assert rows["patch"].to_pylist() == segment.row_ids.tolist()
        for name in ("descriptor", "position"):
            array = np.load(tmp_path / "out" / encoder / f"{name}.npy", allow_pickle=False)
            assert array.dtype == segment.vectors(name).dtype
            np.testing.assert_array_equal(array, segment.vectors(name))
    assert pq.read_table(tmp_path / "out" / "scans.parquet")["scan"].to_pylist() == ["sub-02_ct"]


def test_a_plain_duckdb_opens_the_database(repository: Repository, tmp_path: Path):
    import duckdb

    said(repository)
    add_regions(repository)
    snapshot = repository.snapshot()
    isi.open(repository.path).export(tmp_path / "cohort.duckdb", "duckdb", vectors=True)
    with duckdb.connect(str(tmp_path / "cohort.duckdb"), read_only=True) as database:
        for view in (*STORED_TABLES, *get_args(ViewName)):
            columns = "* EXCLUDE (artefact)" if view == "scans" else "*"
            expected = snapshot.sql(f"SELECT {columns} FROM {view} ORDER BY ALL")
            assert expected.num_rows or view in ("subjects", "labels")
            assert database.sql(f"SELECT * FROM {view} ORDER BY ALL").fetchall() == [
                tuple(row.values()) for row in expected.to_pylist()
            ]
        kinds = dict(database.sql(f"SELECT column_name, column_type FROM (DESCRIBE vectors_{ENCODER})").fetchall())
        assert kinds == {"patch": "BIGINT", "descriptor": "FLOAT[4]", "position": "FLOAT[3]"}
        rows = database.sql(f"SELECT patch, descriptor FROM vectors_{ENCODER} ORDER BY patch").fetchall()
    segments = snapshot.segments(ENCODER)
    assert [patch for patch, _ in rows] == np.concatenate([s.row_ids for s in segments]).tolist()
    np.testing.assert_array_equal(
        np.array([vector for _, vector in rows], np.float32),
        np.concatenate([s.vectors("descriptor") for s in segments]).astype(np.float32),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort.duckdb", "store"]


def test_kept_answers_go_out_where_both_of_their_scans_do(repository: Repository, tmp_path: Path):
    said(repository)
    store = isi.open(repository.path)
    assert len(store.sql("SELECT * FROM matches")) == 4
    for where, pairs in ((None, {(a, b) for a in SCANS for b in SCANS}), ("modality = 'CT'", {(SCANS[1], SCANS[1])})):
        out = tmp_path / f"out-{len(pairs)}"
        store.export(out, where=where)
        rows = pq.read_table(out / "matches.parquet").to_pylist()
        assert {(row["from_scan"], row["scan"]) for row in rows} == pairs
        assert len(rows) == len(pairs) == json.loads((out / "export.json").read_text())["counts"]["matches"]
        copy = isi.create(tmp_path / f"copy-{len(pairs)}")
        copy.import_(out)
        for view in ("matches", "transforms"):
            assert copy.sql(f"SELECT * FROM {view}").num_rows == 0  # as the page says


def test_labels_of_patches_in_a_database_are_those_of_its_scans(repository: Repository, tmp_path: Path):
    import duckdb

    isi.open(repository.path).export(tmp_path / "ct.duckdb", "duckdb", where="modality = 'CT'", encoder=ENCODER)
    with duckdb.connect(str(tmp_path / "ct.duckdb"), read_only=True) as database:
        told = database.sql("SELECT DISTINCT scan FROM patch_labels JOIN patches USING (patch)").fetchall()
        assert told == [("sub-02_ct",)]
        count = "SELECT (SELECT count(*) FROM patch_labels), (SELECT count(*) FROM patches)"
        assert database.sql(count).fetchall() == [(2 * 4, 4)]  # two labels each


@pytest.mark.parametrize("layout", ["parquet", "npy", "duckdb"])
def test_an_export_takes_the_place_of_nothing(repository: Repository, tmp_path: Path, layout: Any):
    store = isi.open(repository.path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="out is there already"):
        store.export(tmp_path / "out", layout)
    with pytest.raises(UsageError, match="the folder for 'x' does not exist"):
        store.export(tmp_path / "none" / "x", layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_database_does_not_take_the_place_of_an_empty_folder(repository: Repository, tmp_path: Path):
    (tmp_path / "out").mkdir()
    store = isi.open(repository.path)
    with pytest.raises(UsageError, match="out is there already"):
        store.export(tmp_path / "out", "duckdb")
    store.export(tmp_path / "out", "npy")


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_an_export_without_room_says_so_and_leaves_nothing(repository: Repository, tmp_path: Path, layout: str):
    code = (
        "import resource, signal, sys, isimed_index as isi\n"
        "store = isi.open(sys.argv[1], mode='r'); store.sql('SELECT 1')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "try: store.export(sys.argv[2], sys.argv[3])\n"
        "except isi.IsimedError as error: print(error.line())"
    )
    said = finish(start(code, str(repository.path), str(tmp_path / "out"), layout))
    assert said.startswith("error[usage]: out cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("layout", ["parquet", "npy", "duckdb"])
def test_an_export_that_fails_leaves_nothing(repository: Repository, tmp_path: Path, layout: Any):
    segment = repository.snapshot().segments(OTHER_ENCODER)[-1]
    (repository.path / segment.path / "position.npy").unlink()
    with pytest.raises(StoreDamaged):
        isi.open(repository.path).export(tmp_path / "out", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_options_that_do_not_go_together_are_refused(repository: Repository, tmp_path: Path):
    store = isi.open(repository.path)
    for layout, options in (("npy", {"voxels": True}), ("parquet", {"vectors": True}), ("csv", {})):
        with pytest.raises(UsageError):
            store.export(tmp_path / "out", layout, **options)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        store.export(tmp_path / "out", encoder="nobody")
    assert not (tmp_path / "out").exists()


def test_no_file_of_an_export_is_named_after_a_scan(cohort: Cohort, tmp_path: Path):
    store = isi.open(cohort.store)
    store.export(tmp_path / "a", voxels=True)
    store.export(tmp_path / "b", "npy")
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert not [name for name in names for copy in COPIES if copy.stem in name or "sub-" in name]


# -- a store from its own export --------------------------------------------------------------------------------------


@given(
    vectors=st.sampled_from([np.float16, np.float32]).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            st.tuples(st.integers(1, 7), st.integers(1, 5)),
            elements={"allow_nan": False, "allow_infinity": False},
        )
    )
)
def test_vectors_come_back_bit_for_bit(vectors: np.ndarray):
    with tempfile.TemporaryFile() as file:
        pq.write_table(pa.table({"v": vector_column(vectors)}), file)
        file.seek(0)
        found = vectors_of(pq.read_table(file)["v"], "v")
    assert (found.dtype, found.shape) == (vectors.dtype, vectors.shape)
    assert found.tobytes() == vectors.tobytes()


@settings(max_examples=8)
@given(deleted=st.sets(st.integers(0, 7), max_size=8), packed=st.booleans(), more=st.integers(1, 3))
def test_a_store_comes_back_whatever_was_deleted_and_packed(deleted: set[int], packed: bool, more: int):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        repository = whole_store(root / "a")
        if deleted:
            delete_patches(repository, f"patch IN ({', '.join(map(str, deleted))})")
        if packed:
            compact(repository)
        add_encoder(repository, OTHER_ENCODER, "second")
        add_segment(repository, "sub-02_ct", more, OTHER_ENCODER)
        export_parquet(Selection(repository.snapshot()), root / "out")
        copy = Repository.create(root / "b")
        done = restore.import_parquet(copy, root / "out")
        assert done.patches == 8 - len(deleted) + more
        before, after = repository.snapshot(), copy.snapshot()
        assert before.sql(PATCHES).to_pylist() == after.sql(PATCHES).to_pylist()
        assert after.manifest.rows == done.patches
        stored = {key: vectors for key, vectors in every_vector(before, ENCODER).items() if len(vectors)}
        found = every_vector(after, ENCODER)
        assert stored.keys() == found.keys()
        assert all(stored[key].tobytes() == found[key].tobytes() for key in stored)


@pytest.fixture(scope="module")
def exported(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort with its voxels."""
    out = tmp_path_factory.mktemp("exported") / "out"
    isi.open(cohort.store).export(out, voxels=True)
    return out


@pytest.fixture(scope="module")
def rebuilt(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store made from that export alone."""
    store = isi.create(tmp_path_factory.mktemp("rebuilt") / "copy.isimed")
    done = store.import_(exported)
    assert len(done.added) == 6
    assert not done.unchanged
    return store


def test_a_store_is_rebuilt_from_its_own_export(cohort: Cohort, rebuilt: Store):
    before = isi.open(cohort.store)
    assert_same_answers(before.snapshot, rebuilt.snapshot)
    [encoder] = before.encoders()["encoder"].to_pylist()
    assert_same_vectors(before.snapshot, rebuilt.snapshot, encoder)
    files = [snapshot.encoder_path(encoder) for snapshot in (before.snapshot, rebuilt.snapshot)]
    for name in ("card.json", "weights.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    for scan in before.snapshot.scan_ids():
        one, other = (open_chunks(store.snapshot.chunks_path(scan)) for store in (before, rebuilt))
        np.testing.assert_array_equal(one.voxels(), other.voxels())
        np.testing.assert_array_equal(one.labels(), other.labels())
        assert one.attributes == other.attributes


def test_the_rebuilt_store_finds_the_same_matches(cohort: Cohort, rebuilt: Store):
    report = rebuilt.index()
    assert not report.encoded
    assert len(report.skipped) == 6
    for point in ([10, 20, 30], [-24, 4, 12]):
        asked = [isi.open(path).lookup(point, COPIES[0].stem, k=5) for path in (cohort.store, rebuilt.path)]
        one, other = (found.to_arrow().to_pylist() for found in asked)
        assert [row["scan"] for row in one] == [row["scan"] for row in other]
        assert one == other


def test_importing_again_changes_nothing(exported: Path, rebuilt: Store):
    before = generation(rebuilt.path)
    done = rebuilt.import_(exported)
    assert (done.added, len(done.unchanged), done.encoders, done.patches) == ([], 6, [], 0)
    assert generation(rebuilt.path) == before
    assert not any((rebuilt.path / "intents").iterdir())


def test_a_file_that_is_not_as_it_was_written_stops_the_import(repository: Repository, tmp_path: Path):
    export_parquet(Selection(repository.snapshot()), tmp_path / "out")
    for file in sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        shutil.copytree(tmp_path / "out", tmp_path / "hurt")
        hurt = tmp_path / "hurt" / file.relative_to(tmp_path / "out")
        copy = Repository.create(tmp_path / "copy")
        if file.name != "export.json":  # which nothing seals: what it says is compared with the files
            hurt.write_bytes(content)
            with pytest.raises(StoreDamaged, match="not as it was written"):
                restore.import_parquet(copy, tmp_path / "hurt")
        hurt.unlink()
        with pytest.raises((StoreDamaged, UsageError)):
            restore.import_parquet(copy, tmp_path / "hurt")
        assert copy.head() == 0
        shutil.rmtree(tmp_path / "hurt")
        shutil.rmtree(tmp_path / "copy")


def test_what_is_no_export_or_a_newer_one_is_refused(repository: Repository, tmp_path: Path):
    copy = Repository.create(tmp_path / "copy")
    with pytest.raises(UsageError, match="no export"):
        restore.import_parquet(copy, repository.path)
    isi.open(repository.path).export(tmp_path / "npy", "npy")
    with pytest.raises(UsageError, match="cannot be read back"):
        restore.import_parquet(copy, tmp_path / "npy")
    export_parquet(Selection(repository.snapshot()), tmp_path / "out")
    seal = json.loads((tmp_path / "out" / "export.json").read_text())
    (tmp_path / "out" / "export.json").write_text(json.dumps({**seal, "format_version": 2}))
    with pytest.raises(Incompatible, match="version 1 or older, found 2"):
        restore.import_parquet(copy, tmp_path / "out")
    (tmp_path / "secret").write_text("x")
    seal["files"]["../secret"] = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / "out" / "export.json").write_text(json.dumps(seal))
    with pytest.raises(UsageError, match="outside of its folder"):
        restore.import_parquet(copy, tmp_path / "out")
    assert copy.head() == 0


def test_another_content_under_the_same_id_is_refused_by_name(tmp_path: Path):
    first, second = isi.create(tmp_path / "a"), isi.create(tmp_path / "b")
    first.add([tiny_scan(tmp_path / "x" / "one.nii", 0), tiny_scan(tmp_path / "x" / "two.nii", 1)])
    first.export(tmp_path / "out", voxels=True)
    second.add(tiny_scan(tmp_path / "y" / "two.nii", 2))
    with pytest.raises(UsageError, match="scan two is in the store with other content"):
        second.import_(tmp_path / "out")
    third = isi.create(tmp_path / "c")
    third.add(tiny_scan(tmp_path / "z" / "uno.nii", 0))
    with pytest.raises(UsageError, match=r"one \(there uno\) is in the store under another id"):
        third.import_(tmp_path / "out")
    assert second.snapshot.scan_ids() == ["two"]
    assert (generation(second.path), generation(third.path)) == (1, 1)


def test_an_import_joins_what_is_there(tmp_path: Path):
    """A scan that both have stays; the other one and its subject come in; metadata columns are united."""
    files = [tiny_scan(tmp_path / "x" / f"sub-{n}_T1w.nii", n) for n in range(2)]
    table = tmp_path / "meta.csv"
    table.write_text("subject,site\nsub-0,north\nsub-1,south\n")
    full, part = isi.create(tmp_path / "a"), isi.create(tmp_path / "b")
    full.add(files, metadata=table)
    part.add(files[0])
    full.export(tmp_path / "out", voxels=True)
    done = part.import_(tmp_path / "out")
    assert (done.added, done.unchanged) == (["sub-1_T1w"], ["sub-0_T1w"])
    rows = part.sql("SELECT scan, site FROM scans ORDER BY scan").to_pylist()
    assert rows == [{"scan": "sub-0_T1w", "site": None}, {"scan": "sub-1_T1w", "site": "south"}]
    assert part.snapshot.table("subjects")["subject"].to_pylist() == ["sub-0", "sub-1"]


def test_a_failure_leaves_complete_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = isi.create(tmp_path / "a")
    source.add([tiny_scan(tmp_path / "x" / f"s{n}.nii", n, (5, 5, 5)) for n in range(5)])
    source.export(tmp_path / "out", voxels=True)
    monkeypatch.setattr(restore, "BATCH", 2)
    target = isi.create(tmp_path / "b")
    monkeypatch.setattr(restore.Folder, "copy", _fails_at(3, restore.Folder.copy))
    with pytest.raises(OSError, match="full"):
        target.import_(tmp_path / "out")
    assert target.snapshot.scan_ids() == ["s0", "s1"]
    assert len([*(target.path / "scans").iterdir()]) == 2
    assert not any((target.path / "intents").iterdir())
    monkeypatch.undo()
    assert target.import_(tmp_path / "out").added == ["s2", "s3", "s4"]
    assert_same_answers(source.snapshot, target.snapshot)


def _fails_at(call: int, function: Any) -> Any:
    calls = []

    def wrapped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > call:
            raise OSError("the disk is full")
        return function(*arguments)

    return wrapped


def test_two_processes_that_import_at_once_land_everything_once(exported: Path, cohort: Cohort, tmp_path: Path):
    isi.create(tmp_path / "copy")
    code = (
        "import sys, isimed_index as isi\n"
        "store = isi.open(sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(store.import_(sys.argv[2]).patches)"
    )
    processes = [start(code, str(tmp_path / "copy"), str(exported)) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(finish(process)) for process in processes]
    store = isi.open(tmp_path / "copy")
    assert sum(counts) == store.info()["patches"]
    assert_same_answers(isi.open(cohort.store).snapshot, store.snapshot)
    assert len([*(store.path / "scans").iterdir()]) == 6
    assert len([*(store.path / "encoders").iterdir()]) == 1


def seal_again(folder: Path, name: str = "lattices.json") -> None:
    """Make `export.json` say what a file is now."""
    seal = json.loads((folder / "export.json").read_text())
    size, sha256 = file_digest(folder / name)
    seal["files"][name] = {"bytes": size, "sha256": sha256}
    (folder / "export.json").write_text(json.dumps(seal))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lattices: lattices["scans"].popitem(), "do not belong together"),
        (lambda lattices: lattices["segments"].update(nobody={}), "do not belong together"),
        (lambda lattices: lattices["segments"][ENCODER]["sub-01_T1w"].pop("task"), "do not belong together"),
        (lambda lattices: lattices["segments"][ENCODER]["sub-01_T1w"].update(row_group=1), "not those that it names"),
        (lambda lattices: lattices["segments"][ENCODER]["sub-01_T1w"].update(row_group=9), "cannot be read"),
        (lambda lattices: lattices["scans"]["sub-01_T1w"].update(affine=[1]), "cannot be read"),
        (lambda lattices: lattices["scans"]["sub-01_T1w"].update(voxels="voxels/7.zarr"), "lacks voxels/7.zarr"),
        (lambda lattices: lattices.update(segments=3), "cannot be read"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, change: Any, said: str):
    export_parquet(Selection(whole_store(tmp_path / "store").snapshot()), tmp_path / "out")
    lattices = json.loads((tmp_path / "out" / "lattices.json").read_text())
    change(lattices)
    (tmp_path / "out" / "lattices.json").write_text(json.dumps(lattices))
    seal_again(tmp_path / "out")
    copy = Repository.create(tmp_path / "copy")
    with pytest.raises(StoreDamaged, match=said):
        restore.import_parquet(copy, tmp_path / "out")
    assert copy.head() == 0
    assert not any((copy.path / "segments").iterdir())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_foreground_that_is_no_share_is_refused_in_an_own_export(tmp_path: Path, share: float):
    """As a store of an earlier version may have taken it from another program: it weighs patches."""
    export_parquet(Selection(whole_store(tmp_path / "store").snapshot()), tmp_path / "out")
    file = f"patches-{ENCODER}.parquet"
    with pq.ParquetFile(tmp_path / "out" / file) as whole:
        groups = [whole.read_row_group(number) for number in range(whole.num_row_groups)]
    place = groups[0].schema.get_field_index("foreground")
    field = groups[0].schema.field(place)
    column = pa.array([share, *groups[0]["foreground"].to_pylist()[1:]], field.type)
    groups[0] = groups[0].set_column(place, field, column)
    with pq.ParquetWriter(tmp_path / "out" / file, groups[0].schema) as written:
        for rows in groups:
            written.write_table(rows)
    seal_again(tmp_path / "out", file)
    copy = Repository.create(tmp_path / "copy")
    with pytest.raises(UsageError, match=r"sub-01_T1w in the export: expected shares from 0 to 1, found 1 others"):
        restore.import_parquet(copy, tmp_path / "out")
    assert copy.head() == 0


def test_voxels_that_are_not_those_of_the_scan_are_refused(tmp_path: Path):
    """Someone exchanged the voxels of two scans and mended the hashes: the digest in the table tells."""
    store = isi.create(tmp_path / "a")
    store.add([tiny_scan(tmp_path / "x" / f"s{n}.nii", n, (5, 5, 5)) for n in range(2)])
    store.export(tmp_path / "out", voxels=True)
    lattices = json.loads((tmp_path / "out" / "lattices.json").read_text())
    first, second = lattices["scans"].values()
    first["voxels"], second["voxels"] = second["voxels"], first["voxels"]
    (tmp_path / "out" / "lattices.json").write_text(json.dumps(lattices))
    seal_again(tmp_path / "out")
    with pytest.raises(StoreDamaged, match="voxels of scan s0 are not those"):
        isi.create(tmp_path / "b").import_(tmp_path / "out")
    assert generation(tmp_path / "b") == 0


def test_another_encoder_under_the_same_id_is_refused(repository: Repository, tmp_path: Path):
    export_parquet(Selection(repository.snapshot()), tmp_path / "out")
    copy = Repository.create(tmp_path / "copy")
    with copy.transaction("pretrain") as transaction:
        from isimed_index.store.transaction import Proposal

        path = transaction.stage("encoder")
        (path / "card.json").write_text(json.dumps({**card(), "patch_vox": 5}))
        artefact = transaction.add("encoder", path, encoder=ENCODER)
        transaction.commit(lambda head: Proposal([artefact]))
    with pytest.raises(EncoderMismatch, match="another encoder with the id"):
        restore.import_parquet(copy, tmp_path / "out")
    assert copy.head() == 1


# -- scans without voxels ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_voxels(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("without")
    isi.open(cohort.store).export(root / "out")
    store = isi.create(root / "copy.isimed")
    store.import_(root / "out")
    store.index()
    return store


def test_stored_embeddings_answer_without_voxels(cohort: Cohort, without_voxels: Store):
    before = isi.open(cohort.store)
    assert_same_answers(before.snapshot, without_voxels.snapshot)
    one, other = (s.lookup([10, 20, 30], COPIES[0].stem, k=5).to_arrow().to_pylist() for s in (before, without_voxels))
    assert [row["scan"] for row in one] == [row["scan"] for row in other]
    assert any(row["label"] for row in one)
    assert [{**row, "label": None} for row in one] == other  # labels at a place are told by label maps only


def test_their_voxels_are_not_found_and_never_zeros(without_voxels: Store):
    scan = COPIES[3].stem
    stored = open_chunks(without_voxels.snapshot.chunks_path(scan), scan)
    row = without_voxels.snapshot.scan_row(scan)
    assert stored.absent
    assert stored.shape == (row["nx"], row["ny"], row["nz"])
    assert stored.attributes["source_orientation"] == row["orientation"] == COPIES[3].codes
    for ask in (stored.voxels, stored.values):
        with pytest.raises(NotFound, match=f"the voxels of scan '{scan}' are not in this store"):
            ask()
    assert stored.labels() is None
    assert stored.label_at((1, 1, 1)) is None
    with pytest.raises(NotFound, match="voxels of scan"):
        without_voxels.pretrain(preset="tiny")
    with pytest.warns(IsimedWarning, match="6 scans are stored at another stride"):
        report = without_voxels.index(stride_mm=8.0)
    assert {refusal.kind for refusal in report.refused} == {"not_found"}
    assert not report.encoded


def test_a_file_is_known_as_its_stored_copy_without_voxels(cohort: Cohort, without_voxels: Store):
    assert without_voxels.lookup([10, 20, 30], cohort.file(COPIES[0]), k=1).source == COPIES[0].stem


# -- embeddings of other programs -------------------------------------------------------------------------------------

CARD = {
    "name": "theirs",
    "patch_vox": 8,
    "stride_vox": 2,
    "spacing_mm": 2.0,
    "outputs": {"embedding": {"dim": 3}},
    "match_output": "embedding",
    "metric": "cosine",
}
AFFINE = np.array([[0.0, -2.0, 0.0, 140.0], [2.0, 0.0, 0.0, 20.0], [0.0, 0.0, 3.0, -10.0], [0, 0, 0, 1.0]])
SHAPE = (12, 10, 8)


def write_card(folder: Path, **fields: Any) -> Path:
    file = folder / "theirs.json"
    file.write_text(json.dumps({**CARD, **fields}))
    return file


def write_scans(folder: Path, scans: tuple[str, ...] = ("p-1_T1w", "p-2_T1w"), **columns: Any) -> Path:
    """Scans that nobody has the voxels of."""
    cells = {f"a{row}{column}": AFFINE[row, column] for row in range(3) for column in range(4)}
    rows = [{"scan": scan, **dict(zip(("nx", "ny", "nz"), SHAPE, strict=True)), **cells, **columns} for scan in scans]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scans.parquet")
    return folder / "scans.parquet"


def embeddings(scans: tuple[str, ...] = ("p-1_T1w", "p-2_T1w"), dtype: Any = np.float32) -> pa.Table:
    """Every second voxel of each scan, shuffled; the vector of a row says where it lies."""
    ijk = np.argwhere(np.ones(SHAPE, bool))
    ijk = ijk[(ijk % 2 == 0).all(axis=1)]
    ijk = np.random.default_rng(0).permutation(ijk)
    xyz = ijk @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    vectors = np.concatenate([xyz + number for number in range(len(scans))]).astype(dtype)
    xyz = np.concatenate([xyz] * len(scans))
    columns = {"scan": np.repeat(scans, len(ijk)), **dict(zip(("x_mm", "y_mm", "z_mm"), xyz.T, strict=True))}
    return pa.table({**columns, "embedding": vector_column(vectors)})


def write_rows(folder: Path, rows: pa.Table) -> Path:
    pq.write_table(rows, folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return isi.create(tmp_path / "store")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_foreign_embeddings_become_segments(store: Store, tmp_path: Path, dtype: Any):
    source, scans = write_rows(tmp_path, embeddings(dtype=dtype)), write_scans(tmp_path, age=40, subject="007")
    done = store.import_(source, card=write_card(tmp_path), scans=scans)
    assert (done.added, done.patches) == (["p-1_T1w", "p-2_T1w"], 2 * 6 * 5 * 4)
    [encoder] = done.encoders
    segment = store.snapshot.segments_by_scan(encoder)["p-2_T1w"]
    patches = segment.patches()
    xyz = np.stack([patches[name].to_numpy() for name in ("x_mm", "y_mm", "z_mm")], axis=1)
    ijk = np.stack([patches[name].to_numpy() for name in "ijk"], axis=1)
    stored = segment.vectors("embedding")
    assert stored.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(stored, (xyz.astype(np.float64) + 1).astype(stored.dtype))
    lattice = segment.lattice()
    affine = np.array(lattice["affine"])
    np.testing.assert_allclose(ijk @ affine[:3, :3].T + affine[:3, 3], xyz, atol=1e-4)
    assert (ijk.min(axis=0).tolist(), (ijk.max(axis=0) + 1).tolist()) == ([0, 0, 0], lattice["shape"])
    assert sorted(lattice["shape"]) == [4, 5, 6]
    row = store.sql("SELECT * FROM scans WHERE scan = 'p-2_T1w'").to_pylist()[0]
    assert (row["subject"], row["age"], row["orientation"]) == ("007", 40, "ALS")
    assert [row[name] for name in ("nx", "ny", "nz", "dx_mm", "dy_mm", "dz_mm")] == [10, 12, 8, 2.0, 2.0, 3.0]
    again = store.import_(source, card=write_card(tmp_path), scans=scans)
    assert (again.added, again.encoders, again.patches, again.generation) == ([], [], 0, done.generation)


def test_foreign_embeddings_are_looked_up(cohort: Cohort, tmp_path: Path):
    """The descriptors of our own encoder, handed over as NumPy arrays, answer like ours; nothing is encoded."""
    ours = isi.open(cohort.store)
    ours.export(tmp_path / "out", "npy")
    [encoder] = ours.encoders()["encoder"].to_pylist()
    folder = tmp_path / "out" / encoder
    (folder / "embedding.npy").unlink()
    ours_card = json.loads((folder / "card.json").read_text())
    fields = {key: ours_card[key] for key in ("patch_vox", "stride_vox", "spacing_mm", "metric")}
    file = tmp_path / "theirs.json"
    outputs = {"descriptor": {"dim": 16}}
    file.write_text(json.dumps({**fields, "name": "theirs", "outputs": outputs, "match_output": "descriptor"}))
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES])
    rows = pq.read_table(folder / "patches.parquet")
    kept = np.isin(rows["scan"].to_numpy(zero_copy_only=False), [copy.stem for copy in COPIES])
    pq.write_table(rows.filter(pa.array(kept)), folder / "patches.parquet")
    np.save(folder / "descriptor.npy", np.load(folder / "descriptor.npy")[kept])
    store.import_(folder, card=file)
    assert not store.index().encoded
    found = store.lookup([10, 20, 30], COPIES[0].stem, k=4)
    for match in found:
        copy = next(copy for copy in COPIES if copy.stem == match.scan)
        assert np.linalg.norm(match.xyz_mm - copy.moved([10, 20, 30])) < 2.0
    store.add(tiny_scan(tmp_path / "new.nii"))
    with pytest.raises(EncoderMismatch, match="'theirs' is known by its embeddings only"):
        store.index()


def test_lps_millimetres_are_turned(store: Store, tmp_path: Path):
    rows = embeddings()
    for axis, name in enumerate(("x_mm", "y_mm"), start=1):
        rows = rows.set_column(axis, name, pa.array(-rows[name].to_numpy()))
    source, described, scans = write_rows(tmp_path, rows), write_card(tmp_path), write_scans(tmp_path)
    with pytest.raises(OutsideScan, match=r"p-1_T1w \(120 of 120\), p-2_T1w \(120 of 120\); 2 of 2 scans") as caught:
        store.import_(source, card=described, scans=scans)
    assert "LPS" in caught.value.next_step
    assert store.generation == 0
    store.import_(source, card=described, scans=scans, space="lps")
    segment = next(iter(store.snapshot.segments()))
    np.testing.assert_array_equal(segment.vectors("embedding")[:, 0], segment.patches()["x_mm"].to_numpy())


def test_voxel_indices_are_those_of_the_file(store: Store, tmp_path: Path):
    rows = embeddings()
    xyz = np.stack([rows[name].to_numpy() for name in ("x_mm", "y_mm", "z_mm")], axis=1)
    ijk = np.rint((xyz - AFFINE[:3, 3]) @ np.linalg.inv(AFFINE[:3, :3]).T).astype(int)
    rows = rows.drop_columns(["x_mm", "y_mm", "z_mm"])
    for axis, name in enumerate("ijk"):
        rows = rows.append_column(name, pa.array(ijk[:, axis]))
    store.import_(write_rows(tmp_path, rows), card=write_card(tmp_path), scans=write_scans(tmp_path))
    segment = next(iter(store.snapshot.segments()))
    np.testing.assert_array_equal(segment.vectors("embedding")[:, 1], segment.patches()["y_mm"].to_numpy())


def test_scans_that_nobody_described_are_named(store: Store, tmp_path: Path):
    with pytest.raises(NotFound, match="scans p-1_T1w, p-2_T1w are not in the store"):
        store.import_(write_rows(tmp_path, embeddings()), card=write_card(tmp_path))
    assert store.generation == 0


def _with(rows: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, pa.array(values))


def _scattered(rows: pa.Table) -> pa.Table:
    noise = np.random.default_rng(1).uniform(-0.9, 0.9, rows.num_rows)
    return _with(rows, "x_mm", rows["x_mm"].to_numpy() + noise)


def _poisoned(value: float) -> Any:
    def poison(rows: pa.Table) -> pa.Table:
        vectors = vectors_of(rows["embedding"], "embedding").copy()
        vectors[5, 1] = value
        return rows.set_column(rows.column_names.index("embedding"), "embedding", vector_column(vectors))

    return poison


def _foreground(value: float) -> Any:
    return lambda rows: rows.append_column("foreground", pa.array([0.5] * (rows.num_rows - 1) + [value]))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (_scattered, UsageError, "form no regular lattice"),
        (lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]), UsageError, "have the same position"),
        (_poisoned(np.nan), EncoderMismatch, "1 of 240 vectors hold NaN"),
        (_poisoned(-np.inf), EncoderMismatch, "1 of 240 vectors hold NaN"),
        (lambda rows: rows.drop_columns(["embedding"]), EncoderMismatch, "lacks the column 'embedding'"),
        (lambda rows: rows.drop_columns(["scan"]), UsageError, "column 'scan'"),
        (lambda rows: rows.drop_columns(["y_mm"]), UsageError, "x_mm, y_mm, z_mm, or i, j, k"),
        (lambda rows: _with(rows, "x_mm", np.full(rows.num_rows, np.nan)), UsageError, "missing, NaN or infinite"),
        (lambda rows: _with(rows, "embedding", np.zeros(rows.num_rows)), EncoderMismatch, "expected lists"),
        (_foreground(np.nan), UsageError, "foreground: expected shares from 0 to 1"),
        (_foreground(-0.1), UsageError, "foreground: expected shares from 0 to 1"),
        (_foreground(80), UsageError, "foreground: expected shares from 0 to 1"),
        (lambda rows: rows.slice(0, 0), UsageError, "in every row"),
    ],
)
def test_rows_that_cannot_be_embeddings_are_refused(store: Store, tmp_path: Path, change: Any, error: Any, said: str):
    source, described, scans = write_rows(tmp_path, change(embeddings())), write_card(tmp_path), write_scans(tmp_path)
    with pytest.raises(error, match=said) as caught:
        store.import_(source, card=described, scans=scans)
    assert caught.value.next_step
    assert store.generation == 0
    assert not any((store.path / "scans").iterdir())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"outputs": {"embedding": {"dim": 4}}}, "expected 240 vectors of 4 numbers"),
        ({"outputs": {"embedding": {"dim": 3}, "more": {"dim": 1}}}, "lacks the column 'more'"),
        ({"id": "abc"}, "says id abc"),
        ({"factory": "isimed_index.encoders.networks:ValidNet"}, "expected factory 'foreign'"),
        ({"weights_sha256": "0" * 64}, "no weights"),
        ({"metric": "dot"}, "does not follow its schema"),
        ({"match_output": "other"}, "expected match_output among"),
        ({"spacing_mm": None}, "lacks what this version needs"),
        ({"stride_vox": None}, "does not follow its schema"),
    ],
)
def test_cards_that_do_not_fit_are_refused(store: Store, tmp_path: Path, fields: dict[str, Any], said: str):
    source, described, scans = write_rows(tmp_path, embeddings()), write_card(tmp_path, **fields), write_scans(tmp_path)
    with pytest.raises(EncoderMismatch, match=said) as caught:
        store.import_(source, card=described, scans=scans)
    assert caught.value.next_step
    assert store.generation == 0


def test_a_card_must_say_its_stride(store: Store, tmp_path: Path):
    described = write_card(tmp_path)
    described.write_text(json.dumps({key: value for key, value in CARD.items() if key != "stride_vox"}))
    with pytest.raises(EncoderMismatch, match="lacks what this version needs: 'stride_vox'"):
        store.import_(write_rows(tmp_path, embeddings()), card=described, scans=write_scans(tmp_path))


def test_other_vectors_of_the_same_encoder_are_refused(store: Store, tmp_path: Path):
    described, scans = write_card(tmp_path), write_scans(tmp_path)
    store.import_(write_rows(tmp_path, embeddings()), card=described, scans=scans)
    before = store.generation
    with pytest.raises(EncoderMismatch, match="scan p-1_T1w is embedded by 'theirs' already"):
        store.import_(write_rows(tmp_path, _poisoned(7.0)(embeddings())), card=described, scans=scans)
    assert generation(store.path) == before


def test_a_table_as_csv_beside_an_array(store: Store, tmp_path: Path):
    import pyarrow.csv

    folder = tmp_path / "theirs"
    folder.mkdir()
    rows = embeddings(("007", "008"))
    np.save(folder / "embedding.npy", vectors_of(rows["embedding"], "embedding"))
    pyarrow.csv.write_csv(rows.drop_columns(["embedding"]), folder / "patches.csv")
    done = store.import_(folder, card=write_card(tmp_path), scans=write_scans(tmp_path, ("007", "008")))
    assert done.added == ["007", "008"]
    (folder / "embedding.npy").unlink()
    with pytest.raises(EncoderMismatch, match=r"there is no embedding\.npy"):
        store.import_(folder, card=write_card(tmp_path))


def test_a_store_with_foreign_embeddings_comes_back_too(store: Store, tmp_path: Path):
    done = store.import_(write_rows(tmp_path, embeddings()), card=write_card(tmp_path), scans=write_scans(tmp_path))
    for voxels in (False, True):
        store.export(tmp_path / f"out{voxels}", voxels=voxels)
        copy = isi.create(tmp_path / f"copy{voxels}")
        copy.import_(tmp_path / f"out{voxels}")
        assert_same_answers(store.snapshot, copy.snapshot)
        assert_same_vectors(store.snapshot, copy.snapshot, done.encoders[0])


def test_an_export_does_not_go_into_the_store(cohort: Cohort) -> None:
    with isi.open(cohort.store, mode="r") as store, pytest.raises(UsageError, match="inside the store"):
        store.export(cohort.store / "scans" / "new")
