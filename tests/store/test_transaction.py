"""Commits: sequencing, rebase, references, and two processes at once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from store_builders import (
    ENCODER,
    OTHER_ENCODER,
    add_encoder,
    add_index,
    add_scan,
    add_segment,
    card,
    finish,
    scan_rows,
    stage_scan,
    stage_segment,
    start,
    whole_store,
)

from isimed_index import contracts
from isimed_index.errors import EncoderMismatch, Incompatible, StoreLocked, UsageError
from isimed_index.store import files, transaction
from isimed_index.store.manifest import listed, load, manifest_name
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal

ADD_MANY = """
import sys
from pathlib import Path
from isimed_index.store.repository import Repository
from isimed_index.store.transaction import Proposal
from store_builders import scan_rows, stage_scan, stage_segment
repository = Repository.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    scan = f"{sys.argv[2]}-{number}"
    with repository.transaction("add") as t:
        voxels = stage_scan(t)
        rows = scan_rows(scan, voxels.path)
        segment = stage_segment(t, t.commit(lambda head: Proposal([voxels], tables={"scans": rows})), scan, 4)
        t.commit(lambda head: Proposal([segment]))
"""
ADD_ONE = """
import sys
from pathlib import Path
from isimed_index.store.repository import Repository
from store_builders import add_scan
add_scan(Repository.open(Path(sys.argv[1])), sys.argv[2])
"""


def leftovers(repository: Repository) -> set[str]:
    """Artefacts and files of writers on disk that the head does not name."""
    named = {artefact.path for artefact in repository.snapshot().manifest.artefacts}
    folders = [*files.FOLDERS.values(), files.INTENTS, files.TMP]
    found = {f"{folder}/{entry.name}" for folder in folders for entry in (repository.path / folder).iterdir()}
    return found - named


def test_two_processes_committing_at_once_both_land(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    add_encoder(repository)
    writers = [start(ADD_MANY, str(repository.path), name, "10") for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        finish(writer)
    snapshot = repository.snapshot()
    assert sorted(snapshot.scan_ids()) == sorted(f"{name}-{number}" for name in "ab" for number in range(10))
    assert snapshot.generation == 1 + 2 * 20
    ids = [row for segment in snapshot.segments(ENCODER) for row in segment.row_ids.tolist()]
    assert ids == list(range(80))
    assert leftovers(repository) == set()
    chain = [load(repository.storage, generation) for generation in listed(repository.storage)]
    assert [child.parent for child in chain[1:]] == [(parent.generation, parent.sha256) for parent in chain[:-1]]


def test_a_reader_pinned_before_a_commit_sees_the_same_rows_after_it(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    pinned = repository.snapshot()
    before = pinned.sql("SELECT count(*) AS n, sum(patch) AS s FROM patches").to_pylist()
    finish(start(ADD_ONE, str(repository.path), "sub-03"))
    add_segment(repository, "sub-03", 4)
    assert pinned.sql("SELECT count(*) AS n, sum(patch) AS s FROM patches").to_pylist() == before
    assert pinned.sql("SELECT max(generation) AS g FROM generations").to_pylist() == [{"g": pinned.generation}]
    unread = repository.snapshot(pinned.generation)
    assert unread.scan_ids() == ["sub-01_T1w", "sub-02_ct"]
    assert repository.snapshot().scan_ids() == ["sub-01_T1w", "sub-02_ct", "sub-03"]


def test_a_conflict_calls_propose_again_with_the_new_head(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    heads: list[int] = []
    with repository.transaction("index") as t:
        segment = stage_segment(t, repository.snapshot(), "sub-01_T1w", 2)

        def propose(head: Snapshot) -> Proposal:
            heads.append(head.generation)
            if len(heads) == 1:
                add_segment(repository, "sub-02_ct", 6)  # somebody else is faster
            return Proposal([segment])

        after = t.commit(propose)
    assert heads == [7, 8]
    assert after.generation == 9
    assert [(s.first_row_id, s.rows) for s in after.segments(ENCODER)] == [(0, 3), (3, 5), (8, 6), (14, 2)]
    assert leftovers(repository) == set()


def test_row_ids_are_never_used_again(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    last = repository.snapshot().segments(ENCODER)[-1]
    index = repository.snapshot().artefacts("index")[0]
    with repository.transaction("delete") as t:
        dropped = t.commit(lambda head: Proposal(drop=[last.path, index.path]))
    assert [s.first_row_id for s in dropped.segments()] == [0]
    assert add_segment(repository, "sub-02_ct", 1).segments()[-1].first_row_id == 8


def test_one_transaction_may_commit_several_times(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    with repository.transaction("add") as t:
        for scan in ("a", "b"):
            voxels = stage_scan(t)
            rows = scan_rows(scan, voxels.path)
            t.commit(lambda head, voxels=voxels, rows=rows: Proposal([voxels], tables={"scans": rows}))
        stage_scan(t)  # and one that is never committed
    assert repository.snapshot().scan_ids() == ["a", "b"]
    assert leftovers(repository) == set()


def test_leaving_with_an_error_removes_what_was_staged(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")

    def interrupted() -> None:
        with repository.transaction("add") as t:
            stage_scan(t)
            t.stage("table").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert repository.head() == 0
    assert leftovers(repository) == set()


def test_an_intent_names_what_is_staged_and_is_locked_meanwhile(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    with repository.transaction("add") as t:
        path = t.stage("scan")
        (intent,) = (repository.path / files.INTENTS).glob("*.jsonl")
        lines = [json.loads(line) for line in intent.read_text().splitlines()]
        assert lines[0]["verb"] == "add"
        assert lines[1] == {"staged": path.relative_to(repository.path).as_posix()}
        code = (
            "import sys; from filelock import FileLock, Timeout\n"
            "try:\n    FileLock(sys.argv[1]).acquire(timeout=0)\nexcept Timeout:\n    print('held')"
        )
        assert finish(start(code, str(intent.with_suffix(".lock")))) == "held\n"


def test_endless_conflicts_end_in_store_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(tmp_path / "c")
    monkeypatch.setattr(transaction, "_ATTEMPTS", 3)
    calls = []

    def propose(head: Snapshot) -> Proposal:
        calls.append(add_scan(repository, f"fast-{len(calls)}"))
        return Proposal([voxels])

    with repository.transaction("add") as t:
        voxels = stage_scan(t)
        with monkeypatch.context() as patch:
            # Only the outer transaction is to give up; the inner ones meet nobody.
            patch.setattr(transaction, "_LONGEST_WAIT_S", 0.01)
            with pytest.raises(StoreLocked):
                t.commit(propose)
    assert len(calls) == 3
    assert leftovers(repository) == set()


def test_a_link_whose_answer_was_lost_counts_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(tmp_path / "c")
    link = os.link

    def forgetful(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", forgetful)
    assert add_scan(repository, "a").generation == 1
    assert repository.snapshot().scan_ids() == ["a"]
    repository.snapshot().chunks_path("a")


def test_a_failure_after_the_link_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(tmp_path / "c")
    sync = files.sync_file

    def failing(path: Path) -> None:
        if path.name == files.MANIFESTS:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(files, "sync_file", failing)
    with pytest.raises(OSError, match="Input/output"):
        add_scan(repository, "a")
    repository.snapshot().chunks_path("a")


def test_without_hard_links_a_lock_decides_and_without_locks_nothing_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository.create(tmp_path / "c")

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    add_scan(repository, "a")
    with pytest.raises(FileExistsError):
        repository.storage.publish(manifest_name(1), b"another writer's")
    assert repository.snapshot().scan_ids() == ["a"]

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    with repository.transaction("add") as t:
        artefact = stage_scan(t)
        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(Incompatible, match="has no locks"):
            t.commit(lambda head: Proposal([artefact], tables={"scans": scan_rows("b", artefact.path)}))
        monkeypatch.undo()
    assert repository.snapshot().scan_ids() == ["a"]


def test_every_written_manifest_follows_its_schema_and_holds_no_scan_id(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    for generation in listed(repository.storage):
        content = (repository.path / manifest_name(generation)).read_text()
        contracts.validate("manifest", json.loads(content))
        assert "sub-0" not in content
    contracts.validate("format", json.loads((repository.path / files.FORMAT).read_text()))


def test_everything_is_flushed_before_the_link_and_the_link_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository.create(tmp_path / "c")
    flushed: list[Path] = []
    flushed_at_link: list[Path] = []
    fsync, link = os.fsync, os.link

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    def noting_link(source: Path, target: Path) -> None:
        flushed_at_link.extend(flushed)
        assert Path(source) in flushed
        link(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "link", noting_link)
    snapshot = add_scan(repository, "a")
    for artefact in snapshot.manifest.artefacts:
        top = repository.path / artefact.path
        for path in (top.parent, top, *top.rglob("*")):
            assert path in flushed_at_link, path
    assert flushed[-1] == repository.path / files.MANIFESTS


def refused(repository: Repository, kind: str, write: Callable[[Path], dict[str, Any]]) -> None:
    with repository.transaction("add") as t:
        path = t.stage(kind)
        t.add(kind, path, **write(path))


@pytest.mark.parametrize("field", ["scan", "subject", "patient"])
def test_a_manifest_takes_no_patient_data(tmp_path: Path, field: str) -> None:
    repository = Repository.create(tmp_path / "c")

    def write(path: Path) -> dict[str, Any]:
        (path / "zarr.json").write_text("{}")
        return {field: "sub-01"}

    with pytest.raises(UsageError, match="does not follow its schema"):
        refused(repository, "scan", write)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"id": "another"}, EncoderMismatch),
        ({"weights_sha256": "0" * 64}, EncoderMismatch),
        ({"match_output": "nothing"}, UsageError),
        ({"metric": "dot"}, UsageError),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, change: dict[str, Any], error: type[Exception]) -> None:
    def write(path: Path) -> dict[str, Any]:
        (path / "weights.safetensors").write_bytes(b"weights")
        (path / "card.json").write_text(json.dumps({**card(), **change}))
        return {"encoder": ENCODER}

    with pytest.raises(error):
        refused(Repository.create(tmp_path / "c"), "encoder", write)


def test_only_what_was_staged_here_can_be_added(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    theirs = repository.path / repository.snapshot().artefacts("scan")[0].path
    with repository.transaction("add") as t, pytest.raises(UsageError, match="not staged"):
        t.add("scan", theirs)
    with pytest.raises(UsageError, match="with"):
        t.stage("scan")


def test_embeddings_of_an_unknown_encoder_are_a_mismatch(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    with pytest.raises(EncoderMismatch, match="not in the store"):
        add_segment(repository, "sub-01_T1w", 2, OTHER_ENCODER)


def test_an_index_covers_one_encoder(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    add_encoder(repository, OTHER_ENCODER)
    add_segment(repository, "sub-01_T1w", 2, OTHER_ENCODER)
    others = repository.snapshot().segments(OTHER_ENCODER)[0]
    with repository.transaction("index") as t:
        path = t.stage("index")
        (path / "index.json").write_text("{}")
        mixed = t.add("index", path, encoder=ENCODER, covers=[[0, others.end_row_id]])
        beyond = t.add("index", path, encoder=ENCODER, covers=[[0, 3], [others.end_row_id, others.end_row_id + 1]])
        with pytest.raises(EncoderMismatch, match="another encoder"):
            t.commit(lambda head: Proposal([mixed]))
        with pytest.raises(UsageError, match="not in the store"):
            t.commit(lambda head: Proposal([beyond]))
    covers = add_index(repository, OTHER_ENCODER).artefacts("index")[-1].fields["covers"]
    assert covers == [[others.first_row_id, others.end_row_id]]


def test_a_scan_id_is_taken_once(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    with pytest.raises(UsageError, match="sub-01_T1w is there already"):
        add_scan(repository, "sub-01_T1w")
    assert leftovers(repository) == set()


def test_a_scan_row_names_voxels_that_are_there(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    rows = scan_rows("a", f"scans/{files.new_id()}.zarr")
    with repository.transaction("add") as t, pytest.raises(UsageError, match="voxels"):
        t.commit(lambda head: Proposal(tables={"scans": rows}))


def test_metadata_columns_keep_their_type_and_spelling(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    with pytest.raises(UsageError, match="another type"):
        add_scan(repository, "x", age="forty")
    with pytest.raises(UsageError, match="upper and lower case"):
        add_scan(repository, "x", Age=40)
    assert add_scan(repository, "x", age=40.5).scan_row("x")["age"] == 40.5


def test_dropping_what_is_not_there_is_refused(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    with repository.transaction("delete") as t, pytest.raises(UsageError, match="cannot be dropped"):
        t.commit(lambda head: Proposal(drop=[f"scans/{files.new_id()}.zarr"]))


def test_rows_of_subjects_and_labels_can_be_appended(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    label = {"scan": "sub-01_T1w", "label": 4, "name": "ventricle", "voxels": 9, "volume_mm3": 72.0}
    labels = pa.Table.from_pylist([{**label, "x_mm": 1.0, "y_mm": 2.0, "z_mm": 3.0}])
    subjects = pa.table({"subject": ["sub-01"], "sex": ["f"], "age": [40]})
    with repository.transaction("add") as t:
        after = t.commit(lambda head: Proposal(tables={"labels": labels, "subjects": subjects}))
        with pytest.raises(UsageError, match="sub-01_T1w, 4 is there already"):
            t.commit(lambda head: Proposal(tables={"labels": labels}))
    assert after.table("labels").to_pylist()[0]["name"] == "ventricle"
    assert after.table("subjects").to_pylist() == [{"subject": "sub-01", "sex": "f", "age": 40.0}]
