"""A repair keeps all that is whole, invents nothing, and says how to get the rest back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from store_builders import (
    ENCODER,
    add_scan,
    add_segment,
    content,
    finish,
    flip,
    forge,
    scan_rows,
    stage_scan,
    start,
    whole_store,
)

from isimed_index.errors import StoreDamaged, StoreLocked, StoreWarning
from isimed_index.store import integrity
from isimed_index.store.files import FORMAT, HEAD
from isimed_index.store.manifest import manifest_name
from isimed_index.store.repository import Repository
from isimed_index.store.tags import set_tag, tag_names
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.audit import audit
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
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
    flip(repository.path / manifest_name(7))
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
    (repository.path / manifest_name(7)).unlink()
    assert repair(repository).generation == 8
    assert damage(repository) == []


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_documents_are_written_again(repository: Repository, content: bytes | None):
    for name in (FORMAT, HEAD):
        path = repository.path / name
        path.unlink() if content is None else path.write_bytes(content)
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
    flip(repository.path / "tags" / "a.json")
    (repository.path / manifest_name(4)).unlink()
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
    flip(repository.path / manifest_name(repository.head()))
    repair(repository)
    given = add_segment(repository, "sub-02_ct", 4, seed=1).segments()[-1]
    assert lost.first_row_id == before
    assert given.first_row_id >= lost.end_row_id
