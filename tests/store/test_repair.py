"""A repair keeps all that is whole, invents nothing, and says how to get the rest back."""

from __future__ import annotations

import json
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_builders import (
    ENCODER,
    add_scan,
    add_segment,
    content,
    copy_of,
    finish,
    flip,
    forge,
    lose,
    scan_rows,
    stage_scan,
    start,
    whole_store,
    without_copies,
)

from isimed_index.errors import StoreDamaged, StoreLocked, StoreUnreadable, StoreWarning
from isimed_index.store import integrity
from isimed_index.store.files import FORMAT, HEAD
from isimed_index.store.manifest import manifest_name
from isimed_index.store.repository import Repository
from isimed_index.store.tags import set_tag, tag_names
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.audit import audit
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.purge import purge
from isimed_index.store.upkeep.repair import repair
from isimed_index.store.upkeep.restore import restore

FIRST, SECOND = "sub-01_T1w", "sub-02_ct"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return whole_store(tmp_path / "c")


def path_of(repository: Repository, kind: str, which: int = 0) -> Path:
    return repository.path / repository.snapshot().artefacts(kind)[which].path


def damage(repository: Repository) -> list[str]:
    integrity._verify_hash.cache_clear()
    return [found.kind for found in audit(repository, 1.0) if found.severity == "damage"]


def test_a_sound_store_stays_as_it_is(repository: Repository):
    before = repository.snapshot().manifest
    done = repair(repository)
    assert (done.committed, done.generation, done.quarantined, done.lost) == (False, 7, (), ())
    assert repository.snapshot().manifest == before
    json.dumps(done.to_json())


def test_an_index_and_a_frame_are_dropped_to_be_made_again(repository: Repository):
    before = content(repository.snapshot())
    flip(path_of(repository, "index"))
    flip(path_of(repository, "frame"))
    done = repair(repository)
    assert done.index_again == (ENCODER,)
    assert (done.add_again, done.encode_again) == ((), ())
    assert damage(repository) == []
    assert content(repository.snapshot()) == before
    assert done.not_whole == (6, 7)
    assert len(list((repository.path / "quarantine").iterdir())) == 2


def test_a_damaged_segment_is_encoded_again(repository: Repository):
    before = content(repository.snapshot())
    flip(path_of(repository, "segment"))
    done = repair(repository)
    assert done.encode_again == (FIRST,)
    assert done.add_again == ()
    after = content(add_segment(repository, FIRST, 3))
    assert after["scans"] == before["scans"]
    assert sorted(after["patches"].values()) == sorted(before["patches"].values())
    assert damage(repository) == []


def test_damaged_voxels_leave_with_all_that_was_made_of_them(repository: Repository):
    before = content(repository.snapshot())
    flip(path_of(repository, "scan"))
    done = repair(repository)
    assert done.add_again == (FIRST,)
    head = repository.snapshot()
    assert head.scan_ids() == [SECOND]
    assert content(head)["patches"] == {row: patch for row, patch in before["patches"].items() if patch[0] == SECOND}
    assert damage(repository) == []
    assert add_scan(repository, FIRST).scan_ids() == [SECOND, FIRST]  # nothing of it stands in the way


def test_of_a_packed_segment_only_the_part_of_lost_voxels_goes(repository: Repository):
    compact(repository)
    before = content(repository.snapshot())
    flip(path_of(repository, "scan"))
    assert repair(repository).encode_again == ()
    after = content(repository.snapshot())
    assert after["patches"] == {row: patch for row, patch in before["patches"].items() if patch[0] == SECOND}
    assert damage(repository) == []


def test_a_damaged_packed_segment_costs_all_its_scans(repository: Repository):
    compact(repository)
    flip(path_of(repository, "segment"))
    assert repair(repository).encode_again == (FIRST, SECOND)
    assert damage(repository) == []


def test_rows_come_back_from_an_older_generation(repository: Repository):
    before = repository.snapshot().table("scans").to_pylist()
    compact(repository)
    flip(path_of(repository, "table"))
    done = repair(repository)
    assert dict(done.rows_recovered) == {"scans": 2}
    assert (dict(done.rows_lost), done.add_again) == ({}, ())
    rows = repository.snapshot().table("scans").to_pylist()
    assert sorted(rows, key=str) == sorted(before, key=str)
    assert damage(repository) == []


def test_a_row_that_was_deleted_does_not_come_back(repository: Repository):
    delete_scans(repository, f"scan = '{FIRST}'")
    flip(path_of(repository, "table"))
    done = repair(repository)
    assert dict(done.rows_recovered) == {"scans": 1}
    assert repository.snapshot().scan_ids() == [SECOND]


def test_a_scan_whose_row_is_nowhere_is_added_again(repository: Repository):
    flip(path_of(repository, "table", 1))
    done = repair(repository)
    assert dict(done.rows_lost) == {"scans": 1}
    assert done.add_again == (SECOND,)  # its segment knows its name
    assert repository.snapshot().scan_ids() == [FIRST]
    assert damage(repository) == []


def test_a_scan_that_nothing_names_is_told_by_its_voxels(repository: Repository):
    add_scan(repository, "sub-03")
    voxels = path_of(repository, "scan", 2)
    flip(path_of(repository, "table", 2))
    assert repair(repository).add_again == (voxels.stem,)


def test_what_was_deleted_stays_deleted_when_the_tombstone_is_lost(repository: Repository):
    delete_patches(repository, f"scan = '{FIRST}' AND i = 1")
    path_of(repository, "tombstone").unlink()
    done = repair(repository)
    assert done.encode_again == (FIRST,)
    assert {patch[0] for patch in content(repository.snapshot())["patches"].values()} == {SECOND}
    assert damage(repository) == []


def test_a_damaged_encoder_takes_nothing_with_it(repository: Repository):
    before = content(repository.snapshot())
    flip(path_of(repository, "encoder"))
    done = repair(repository)
    assert not done.committed
    assert len(done.lost) == 1
    assert "isimed delete --encoder" in done.lost[0]
    assert content(repository.snapshot()) == before
    assert damage(repository) == ["artefact_hash"]


def test_a_damaged_head_gives_way_to_a_generation_after_the_last_good_one(repository: Repository):
    lose(repository.path / manifest_name(7))
    with pytest.warns(StoreWarning):
        before = content(repository.snapshot())
    done = repair(repository)
    assert (done.generation, done.committed) == (8, True)
    manifest = repository.snapshot().manifest
    assert manifest.parent == (6, repository.snapshot(6).manifest.sha256)
    assert content(repository.snapshot()) == before
    assert damage(repository) == []
    assert [line.generation for line in repository.generations()] == [0, 1, 2, 3, 4, 5, 6, 8]
    add_scan(repository, "sub-03")  # it can be written to again


def test_a_head_that_is_gone(repository: Repository):
    for file in (repository.path / manifest_name(7), copy_of(repository.path / manifest_name(7))):
        file.unlink()
    assert repair(repository).generation == 8
    assert damage(repository) == []


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_documents_are_written_again(repository: Repository, content: bytes | None):
    for name in (FORMAT, HEAD):
        path = repository.path / name
        path.unlink() if content is None else path.write_bytes(content)
    copy_of(repository.path / FORMAT).write_bytes(b"")
    with pytest.raises(StoreDamaged):
        Repository.open(repository.path)
    done = repair(repository.path)
    assert set(done.rewritten) == {FORMAT, HEAD}
    assert not done.committed
    assert Repository.open(repository.path).head() == 7
    assert damage(repository) == []
    assert repair(repository.path).rewritten == ()


def test_folders_that_a_copy_left_out_are_made_again(repository: Repository):
    for folder in ("tmp", "intents"):
        shutil.rmtree(repository.path / folder)
    assert set(repair(repository).rewritten) == {"tmp", "intents"}
    add_scan(repository, "sub-03")


def test_old_damage_is_told_and_put_away(repository: Repository):
    voxels = path_of(repository, "scan")
    delete_scans(repository, f"scan = '{FIRST}'")
    set_tag(repository.storage, "before", 7)
    flip(voxels)
    done = repair(repository)
    assert not done.committed
    assert done.not_whole == tuple(range(1, 8))
    assert not voxels.exists()
    assert tag_names(repository.storage) == ["before"]  # the rest of that generation is there
    with pytest.raises(StoreDamaged):
        restore(repository, tag="before")


def test_damaged_tags_are_put_away(repository: Repository):
    for name, generation in (("a", 3), ("b", 4), ("c", 5)):
        set_tag(repository.storage, name, generation)
    lose(repository.path / "tags" / "a.json")
    for file in (repository.path / manifest_name(4), copy_of(repository.path / manifest_name(4))):
        file.unlink()
    assert repair(repository).tags == ("a", "b")
    assert tag_names(repository.storage) == ["c"]
    assert damage(repository) == []


@pytest.mark.parametrize("forged", ["row twice", "no voxels", "row ids", "coverage"])
def test_what_does_not_fit_together_is_dropped(repository: Repository, forged: str):
    scan = repository.snapshot().artefacts("scan")[0].path
    changes = {
        "row twice": (lambda made: made, {}),
        "no voxels": (lambda made: None if made.path == scan else made, {}),
        "row ids": (lambda made: made, {"next_row_id": 4}),
        "coverage": (
            lambda made: made if made.kind != "index" else type(made)(**_slots(made, covers=[[0, 99]])),
            {},
        ),
    }
    change, fields = changes[forged]
    forge(repository, change, **fields)
    if forged == "row twice":
        _repeat_first_row(repository)
    assert damage(repository)
    repair(repository)
    assert damage(repository) == []
    expected = [SECOND] if forged == "no voxels" else [FIRST, SECOND]
    assert repository.snapshot().scan_ids() == expected


def _slots(made, **fields):
    own = {name: getattr(made, name) for name in ("kind", "path", "bytes", "files", "sha256")}
    return {**own, "fields": {**made.fields, **fields}}


def _repeat_first_row(repository: Repository) -> None:
    """Commit the first scan's row again, which no proposal of ours could."""
    with repository.transaction("add") as transaction:
        path = transaction.stage("table")
        pq.write_table(scan_rows(FIRST, repository.snapshot().artefacts("scan")[0].path), path)
        piece = transaction.add("table", path, table="scans", rows=1)
        transaction.commit(lambda head: Proposal(add=[piece]))


def test_no_good_generation_is_no_repair(repository: Repository):
    for file in (repository.path / "manifests").iterdir():
        file.write_bytes(b"")
    with pytest.raises(StoreDamaged) as caught:
        repair(repository)
    assert "backup" in caught.value.next_step


def test_a_finding_that_is_out_of_date_does_no_harm(repository: Repository):
    segment = path_of(repository, "segment") / "descriptor.npy"
    kept = segment.read_bytes()
    flip(segment)
    findings = audit(repository, 1.0)
    segment.write_bytes(kept)  # restored from a backup
    assert not repair(repository, findings).committed
    assert damage(repository) == []


def test_one_repair_at_a_time(repository: Repository):
    with repository.storage.exclusive("repair"), pytest.raises(StoreLocked):
        repair(repository)


def test_a_writer_at_work_meanwhile_loses_nothing(repository: Repository):
    writer = start(
        "import sys; from pathlib import Path; from isimed_index.store.repository import Repository\n"
        "from store_builders import add_scan\n"
        "repository = Repository.open(Path(sys.argv[1])); print('ready', flush=True)\n"
        "for number in range(12): add_scan(repository, f'new-{number}')\n",
        str(repository.path),
    )
    assert writer.stdout.readline() == "ready\n"
    for kind in ("index", "frame", "segment"):
        flip(path_of(repository, kind))
        repair(repository)
    finish(writer)
    assert sorted(repository.snapshot().scan_ids()) == sorted([FIRST, SECOND, *(f"new-{n}" for n in range(12))])
    assert {patch[0] for patch in content(repository.snapshot())["patches"].values()} == {SECOND}
    assert damage(repository) == []


def test_what_a_writer_has_staged_is_left_alone(repository: Repository):
    flip(path_of(repository, "index"))
    with repository.transaction("add") as transaction:
        artefact = stage_scan(transaction)
        repair(repository)
        rows = scan_rows("sub-03", artefact.path)
        transaction.commit(lambda head: Proposal([artefact], tables={"scans": rows}))
    assert "sub-03" in repository.snapshot().scan_ids()
    assert damage(repository) == []


def test_row_ids_that_a_damaged_generation_gave_away_are_not_given_again(repository: Repository):
    before = repository.snapshot().manifest.next_row_id
    lost = add_segment(repository, "sub-01_T1w", 4).segments()[-1]  # an exported table may name its rows
    lose(repository.path / manifest_name(repository.head()))
    repair(repository)
    given = add_segment(repository, "sub-02_ct", 4, seed=1).segments()[-1]
    assert lost.first_row_id == before
    assert given.first_row_id >= lost.end_row_id


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", [FORMAT, manifest_name(8), manifest_name(2), "tags/v1.json"])
@pytest.mark.parametrize("which", ["document", "copy"])
def test_a_document_is_written_again_from_its_other_file(repository: Repository, name: str, which: str, missing: bool):
    if (name, which, missing) == ("tags/v1.json", "document", True):
        pytest.skip("a tag without a file is none")
    delete_patches(repository, f"scan = '{FIRST}' AND i = 1")
    set_tag(repository.storage, "v1", 3)
    before, path = content(repository.snapshot()), repository.path / name
    kept = path.read_bytes()
    bad = path if which == "document" else copy_of(path)
    bad.unlink() if missing else flip(bad)
    done = repair(repository.path)
    assert done.rewritten == (bad.relative_to(repository.path).as_posix(),)
    assert (done.committed, done.quarantined, done.lost, done.tags, done.unnamed) == (False, (), (), (), ())
    assert path.read_bytes() == copy_of(path).read_bytes() == kept
    assert path.stat().st_ino != copy_of(path).stat().st_ino
    assert content(repository.snapshot()) == before
    assert audit(repository, 1.0) == []


def test_a_store_of_a_version_without_copies_gets_them(repository: Repository):
    without_copies(repository)
    done = repair(repository)
    assert len(done.rewritten) == 9  # FORMAT.json and generations 0 to 7
    assert not done.committed
    assert audit(repository, 1.0) == []


def test_a_lost_generation_is_told_and_its_deletions_of_patches_hold(repository: Repository):
    delete_patches(repository, f"scan = '{FIRST}' AND i = 1")
    delete_patches(repository, f"scan = '{SECOND}' AND i = 2")
    before = content(repository.snapshot())
    assert len(before["patches"]) == 6
    lose(repository.path / manifest_name(8))
    lose(repository.path / manifest_name(9))
    done = repair(repository)
    assert content(repository.snapshot()) == before
    assert repository.snapshot().manifest.rows == 6
    assert [line.split(" is lost")[0] for line in done.lost] == ["generation 8", "generation 9"]
    assert all("deletions too" in line and "copy" in line for line in done.lost)
    assert len(done.unnamed) == 2
    assert damage(repository) == []
    again = repair(repository)
    assert (again.committed, again.lost, again.unnamed) == (False, (), ())


def test_a_tombstone_that_is_lost_too_is_told(repository: Repository):
    delete_patches(repository, f"scan = '{FIRST}' AND i = 1")
    path_of(repository, "tombstone").write_bytes(b"PAR1")
    lose(repository.path / manifest_name(8))
    done = repair(repository)
    assert len(done.lost) == 2
    assert "cannot be read" in done.lost[1]
    assert len(content(repository.snapshot())["patches"]) == 8


def test_rows_of_a_part_that_is_dropped_are_not_buried(repository: Repository):
    delete_patches(repository, "i = 1")
    flip(path_of(repository, "segment"))
    lose(repository.path / manifest_name(8))
    assert repair(repository).encode_again == (FIRST,)
    patches = content(repository.snapshot())["patches"].values()
    assert sorted((scan, i) for scan, i, _ in patches) == [(SECOND, i) for i in (0, 2, 3, 4)]
    assert damage(repository) == []


def test_what_only_a_lost_generation_named_is_kept_from_the_collector(repository: Repository):
    purge(repository, "sub-02")
    held = {artefact.path for artefact in repository.snapshot().manifest.artefacts}
    assert [line.generation for line in repository.generations()] == [0, 1, 8]
    collect(repository, keep=1)
    lose(repository.path / manifest_name(8))
    Repository.create(repository.path.parent / "empty")
    shutil.copy(repository.path.parent / "empty" / manifest_name(0), repository.path / "manifests")
    done = repair(repository)  # of a store that has nothing to go back to
    assert set(done.unnamed) == held
    assert len(done.lost) == 8
    assert repository.snapshot().scan_ids() == []
    collect(repository, keep=1)
    kept = {path.name for path in (repository.path / "quarantine").iterdir()}
    assert {path.replace("/", "-") for path in held} <= kept


def test_what_a_dead_writer_left_does_not_delete(repository: Repository):
    transaction = repository.transaction("delete")
    transaction.__enter__()
    path = transaction.stage("tombstone")
    pq.write_table(pa.table({"patch": [0, 1]}), path)
    transaction._claim.release()  # it died before it committed
    repair(repository)
    assert len(content(repository.snapshot())["patches"]) == 8


def test_what_the_system_refuses_costs_nothing(repository: Repository):
    before = {path: path.read_bytes() for path in repository.path.rglob("*") if path.is_file()}
    lowered, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(lowered, 256), hard))
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(12):  # each time a little further
            for descriptor in taken[-1:]:
                os.close(taken.pop() if descriptor else descriptor)
            with suppress(StoreUnreadable, OSError):
                repair(repository)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, hard))
    assert not (repository.path / "quarantine").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert repository.head() == 7


def test_rows_of_a_deleted_scan_are_not_given_to_the_next_of_its_name(tmp_path: Path) -> None:
    """An id may be used again: what older generations say of it is of other voxels then."""
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, FIRST)
    add_rows(repository, labels={"scan": [FIRST, SECOND], "label": [1, 1]})
    delete_scans(repository, f"scan = '{FIRST}'")
    add_scan(repository, FIRST)
    add_scan(repository, SECOND)
    add_rows(repository, labels={"scan": [SECOND], "label": [2]})
    add_rows(repository, labels={"scan": [FIRST], "label": [3]})
    flip(repository.path / repository.snapshot().artefacts("table")[-1].path)
    done = repair(repository)
    assert done.rows_lost["labels"] == 1
    assert [row["label"] for row in repository.snapshot().table("labels").to_pylist() if row["scan"] == FIRST] == []


def add_rows(repository: Repository, **tables: dict[str, list[object]]) -> None:
    """Commit rows of labels of some scans, with a volume of one voxel each."""
    with repository.transaction("add") as transaction:
        rows = {
            name: pa.table(
                {
                    **columns,
                    "voxels": [1] * len(columns["scan"]),
                    "volume_mm3": [1.0] * len(columns["scan"]),
                    **{f"{axis}_mm": [0.0] * len(columns["scan"]) for axis in "xyz"},
                }
            )
            for name, columns in tables.items()
        }
        transaction.commit(lambda head: Proposal(tables=rows))
