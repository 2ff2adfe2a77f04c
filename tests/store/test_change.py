"""Deleting, compacting, restoring: what is asked afterwards is what was meant, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_builders import (
    ENCODER,
    OTHER_ENCODER,
    add_encoder,
    add_scan,
    add_segment,
    content,
    stage_segment,
    whole_store,
)

from isimed_index import contracts
from isimed_index.errors import EncoderMismatch, NotFound, SqlRefused, StoreDamaged
from isimed_index.store.manifest import load
from isimed_index.store.repository import Repository
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_encoder, delete_patches, delete_scans
from isimed_index.store.upkeep.restore import restore


def many(path: Path, scans: int = 6, rows: int = 4) -> Repository:
    """A store with one segment of every scan, each of other vectors."""
    repository = Repository.create(path)
    add_encoder(repository)
    for number in range(scans):
        add_scan(repository, f"sub-{number:02}")
        add_segment(repository, f"sub-{number:02}", rows, seed=number)
    return repository


def test_a_deleted_scan_is_gone_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    done = delete_scans(repository, "modality = 'CT'")
    assert (done.scans, done.patches, done.generation) == (("sub-02_ct",), 5, 8)
    snapshot = repository.snapshot()
    assert snapshot.scan_ids() == ["sub-01_T1w"]
    assert snapshot.sql("SELECT scan, count(*) AS n FROM patches GROUP BY scan").to_pylist() == [
        {"scan": "sub-01_T1w", "n": 3}
    ]
    assert len(snapshot.artefacts("scan")) == 1
    assert "sub-02_ct" in repository.snapshot(7).scan_ids()  # the history still has it


def test_subjects_go_with_their_last_scan(tmp_path: Path) -> None:
    import pyarrow as pa

    repository = Repository.create(tmp_path / "c")
    for scan in ("a_1", "a_2", "b_1"):
        add_scan(repository, scan)
    with repository.transaction("add") as t:
        t.commit(lambda head: Proposal(tables={"subjects": pa.table({"subject": ["a", "b", "unscanned"]})}))
    assert delete_scans(repository, "scan = 'a_1'").subjects == 0
    assert delete_scans(repository, "scan = 'a_2'").subjects == 1
    assert repository.snapshot().table("subjects").column("subject").to_pylist() == ["b", "unscanned"]


def test_deleted_patches_stay_deleted_through_everything(tmp_path: Path) -> None:
    repository = many(tmp_path / "c")
    assert delete_patches(repository, "i = 1").patches == 6
    assert delete_patches(repository, "patch IN (0, 1, 23)").patches == 2  # 1 is dead already
    left = content(repository.snapshot())
    assert sorted(left["patches"]) == [row for row in range(24) if row % 4 != 1 and row not in (0, 23)]
    compact(repository)
    assert content(repository.snapshot()) == left
    assert repository.snapshot().artefacts("tombstone") == []
    assert delete_patches(repository, "scan = 'sub-03'").patches == 3
    assert content(repository.snapshot())["patches"].keys() == {r for r in left["patches"] if r // 4 != 3}
    assert repository.snapshot().manifest.rows == 13


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=2)
    head = repository.head()
    assert delete_scans(repository, "true", dry_run=True).scans == ("sub-00", "sub-01")
    assert delete_patches(repository, "i > 1", dry_run=True).patches == 4
    assert delete_encoder(repository, "toy", dry_run=True).encoders == (ENCODER,)
    assert repository.head() == head


def test_a_condition_that_keeps_nothing_or_is_none(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=1)
    head = repository.head()
    assert delete_scans(repository, "false").scans == ()
    assert delete_patches(repository, "false").patches == 0
    with pytest.raises(SqlRefused):
        delete_scans(repository, "scan = ")
    with pytest.raises(SqlRefused):
        delete_patches(repository, "true; DROP TABLE patches")
    with pytest.raises(NotFound):
        delete_encoder(repository, "nobody")
    assert repository.head() == head


def test_a_deleted_encoder_takes_what_it_made_and_nothing_of_others(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    add_encoder(repository, OTHER_ENCODER, "other")
    add_segment(repository, "sub-01_T1w", 2, OTHER_ENCODER)
    assert delete_encoder(repository, "toy").patches == 8
    kinds = [artefact.kind for artefact in repository.snapshot().manifest.artefacts]
    assert sorted(kinds) == ["encoder", "scan", "scan", "segment", "table", "table"]
    assert [segment.encoder for segment in repository.snapshot().segments()] == [OTHER_ENCODER]


def test_compaction_changes_no_answer_and_leaves_few_files(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=9)
    before = content(repository.snapshot())
    keys = {segment.key: (segment.task, segment.grid) for segment in repository.snapshot().segments()}
    done = compact(repository)
    assert (done.segments, done.pieces) == ((9, 1), (9, 1))
    snapshot = repository.snapshot()
    assert content(snapshot) == before
    assert {segment.key: (segment.task, segment.grid) for segment in snapshot.segments()} == keys
    assert [segment.lattice()["patch_vox"] for segment in snapshot.segments()] == [4] * 9
    assert snapshot.manifest.features == ("packed-segments",)
    contracts.validate("manifest", __import__("json").loads(snapshot.manifest.to_bytes()))
    assert compact(repository).generation == snapshot.generation  # there is nothing left to do


def test_the_target_bounds_segments_and_their_number(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=9)
    one = repository.snapshot().artefacts("segment")[0].bytes
    assert compact(repository, target_bytes=3 * one).segments == (9, 3)
    assert compact(repository, target_bytes=1, max_segments=2).segments[1] == 2


def test_compaction_never_mixes_encoders(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=2)
    add_encoder(repository, OTHER_ENCODER)
    for number in range(2):
        add_segment(repository, f"sub-{number:02}", 2, OTHER_ENCODER)
    before = content(repository.snapshot())
    assert compact(repository).segments == (4, 2)
    assert content(repository.snapshot()) == before
    found = [(a.fields["encoder"], a.fields["rows"]) for a in repository.snapshot().artefacts("segment")]
    assert sorted(found) == [(ENCODER, 8), (OTHER_ENCODER, 4)]
    with repository.transaction("compact") as t:  # a writer that claims another encoder's rows is refused
        staged = stage_segment(t, repository.snapshot(), "sub-00", 2, "of-nobody")
        with pytest.raises(EncoderMismatch):
            t.commit(lambda head: Proposal([staged]))


def test_what_others_commit_during_a_compaction_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = many(tmp_path / "c")
    from isimed_index.store.upkeep import compact as module

    original = module._proposal

    def meanwhile(*arguments: object) -> Proposal:
        monkeypatch.setattr(module, "_proposal", original)
        proposal = original(*arguments)  # type: ignore[arg-type]
        delete_scans(repository, "scan = 'sub-02'")
        delete_patches(repository, "scan = 'sub-04' AND i = 0")
        add_segment(repository, "sub-00", 2, seed=9)
        return proposal  # it conflicts, and is made again

    monkeypatch.setattr(module, "_proposal", meanwhile)
    assert compact(repository).segments[1] == 2
    snapshot = repository.snapshot()
    assert sorted(content(snapshot)["patches"]) == [r for r in range(26) if r // 4 != 2 and r != 16]
    assert compact(repository).segments == (2, 1)
    assert sorted(content(repository.snapshot())["patches"]) == [r for r in range(26) if r // 4 != 2 and r != 16]


def test_a_packed_segment_loses_single_parts_without_being_written_again(tmp_path: Path) -> None:
    repository = many(tmp_path / "c")
    compact(repository)
    path = repository.snapshot().segments()[0].path
    delete_scans(repository, "scan IN ('sub-01', 'sub-04')")
    snapshot = repository.snapshot()
    assert {segment.path for segment in snapshot.segments()} == {path}
    assert sorted(content(snapshot)["patches"]) == [r for r in range(24) if r // 4 not in (1, 4)]
    assert compact(repository).segments == (1, 1)  # a third of its rows is dead: now it is
    assert repository.snapshot().segments()[0].path != path
    assert content(repository.snapshot()) == content(snapshot)


def test_a_packed_segment_of_which_every_patch_died_is_still_the_scans_segment(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=2)
    delete_patches(repository, "scan = 'sub-00'")
    compact(repository)
    first, second = repository.snapshot().segments()
    assert (first.rows, second.rows) == (0, 4)
    assert first.patches().num_rows == 0
    assert first.vectors("descriptor").shape == (0, 4)
    assert np.array_equal(second.row_ids, np.arange(4, 8))


def test_restore_makes_a_new_generation_that_equals_an_old_one(tmp_path: Path) -> None:
    repository = many(tmp_path / "c")
    old = repository.head()
    before = content(repository.snapshot())
    compact(repository)
    delete_scans(repository, "true")
    now = restore(repository, old)
    assert now.generation == old + 3
    assert content(repository.snapshot()) == before
    assert load(repository.storage, now.generation).verb == "restore"
    assert restore(repository, old).generation == now.generation  # it equals it already
    add_segment(repository, "sub-00", 2, seed=1)
    assert max(content(repository.snapshot())["patches"]) == 25  # row ids go on
    with pytest.raises(NotFound):
        restore(repository, 999)


def test_what_is_gone_cannot_be_restored(tmp_path: Path) -> None:
    repository = many(tmp_path / "c", scans=1)
    old = repository.snapshot()
    delete_scans(repository, "true")
    (repository.path / old.segments()[0].path / "descriptor.npy").unlink()
    with pytest.raises(StoreDamaged):
        restore(repository, old.generation)
    assert repository.snapshot().scan_ids() == []
