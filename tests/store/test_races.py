"""Two processes at the worst moment: each test puts what another one does exactly where it would hurt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from store_builders import (
    ENCODER,
    add_scan,
    add_segment,
    content,
    orphans,
    scan_rows,
    stage_scan,
    whole_store,
)

from isimed_index.errors import NotFound
from isimed_index.store import files
from isimed_index.store import repository as repositories
from isimed_index.store.manifest import listed, load, manifest_name
from isimed_index.store.place import locks
from isimed_index.store.place.claims import LocalClaim
from isimed_index.store.place.storage import LocalStorage
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.tags import set_tag, tag_names, tagged
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep import compact as compaction
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches
from isimed_index.store.upkeep.restore import restore


def once(act: Callable[[], Any]) -> Callable[[], None]:
    """`act` on the first call only."""
    waiting = [act]

    def call() -> None:
        if waiting:
            waiting.pop()()

    return call


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return whole_store(tmp_path / "c")


def test_the_head_is_found_when_all_that_was_listed_is_collected(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtake() -> None:
        add_scan(repository, "a")
        collect(repository, keep=1)

    def slow(storage: LocalStorage) -> list[int]:
        found = listed(storage)
        meanwhile()
        return found

    meanwhile = once(overtake)
    monkeypatch.setattr(repositories, "listed", slow)
    assert repository.snapshot().generation == 8


def test_a_slow_writer_does_not_publish_into_a_gap(repository: Repository) -> None:
    def overtake() -> None:
        add_scan(repository, "a")
        add_scan(repository, "b")
        compact(repository)
        collect(repository, keep=1)

    meanwhile = once(overtake)
    heads = []

    def propose(head: Snapshot) -> Proposal:
        heads.append(head.generation)
        meanwhile()
        assert head.table("scans").num_rows >= 2  # what it builds on is not taken away
        return Proposal([voxels], tables={"scans": scan_rows("slow", voxels.path)})

    with repository.transaction("add") as transaction:
        voxels = stage_scan(transaction)
        assert transaction.commit(propose).generation == 11
    assert heads == [7, 10]
    assert repository.snapshot().scan_ids() == ["sub-01_T1w", "sub-02_ct", "a", "b", "slow"]
    collect(repository, keep=1)
    assert listed(repository.storage) == [11]


@pytest.fixture
def while_packing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Set what happens after a compaction packed and before it proposes."""
    propose = compaction._proposal

    def arrange(act: Callable[[], Any]) -> None:
        meanwhile = once(act)

        def interrupted(*arguments: Any) -> Proposal:
            meanwhile()
            return propose(*arguments)

        monkeypatch.setattr(compaction, "_proposal", interrupted)

    return arrange


def test_rows_that_another_compaction_buried_stay_deleted(
    repository: Repository, while_packing: Callable[[Callable[[], Any]], None]
) -> None:
    def overtake() -> None:
        delete_patches(repository, "patch = 4")
        assert compact(repository).segments == (2, 1)
        assert repository.snapshot().artefacts("tombstone") == []

    while_packing(overtake)
    compact(repository)
    assert sorted(content(repository.snapshot())["patches"]) == [0, 1, 2, 3, 5, 6, 7]


def test_rows_that_a_restore_brought_back_stay(
    repository: Repository, while_packing: Callable[[Callable[[], Any]], None]
) -> None:
    before = content(repository.snapshot())
    delete_patches(repository, "patch = 4")
    while_packing(lambda: restore(repository, 7))
    compact(repository)
    assert content(repository.snapshot()) == before


def test_rows_deleted_while_their_segment_is_packed_stay_deleted(
    repository: Repository, while_packing: Callable[[Callable[[], Any]], None]
) -> None:
    while_packing(lambda: delete_patches(repository, "patch = 4"))
    assert compact(repository).segments == (2, 1)
    assert sorted(content(repository.snapshot())["patches"]) == [0, 1, 2, 3, 5, 6, 7]


def test_a_generation_that_is_tagged_while_it_expires_is_kept_or_the_tag_refused(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = LocalStorage.move
    before, after = once(lambda: set_tag(repository.storage, "early", 6)), []

    def slow(storage: LocalStorage, relative: str, target: str) -> None:
        before()
        move(storage, relative, target)
        if target.endswith("expired-00000000000000000005.json"):
            with pytest.raises(NotFound):
                set_tag(repository.storage, "late", 5)
            after.append(target)

    monkeypatch.setattr(LocalStorage, "move", slow)
    collect(repository, keep=1)
    assert after
    assert tag_names(repository.storage) == ["early"]
    assert tagged(repository.storage, "early").generation == 6
    assert orphans(repository) == set()


def test_a_tag_whose_generation_went_meanwhile_is_taken_back(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = LocalStorage.publish

    def slow(storage: LocalStorage, relative: str, document: bytes) -> None:
        publish(storage, relative, document)
        storage.remove(manifest_name(3))  # by a collector that had read the tags before

    monkeypatch.setattr(LocalStorage, "publish", slow)
    with pytest.raises(NotFound):
        set_tag(repository.storage, "v1", 3)
    assert tag_names(repository.storage) == []


def test_a_claim_that_is_taken_while_dead_ones_are_cleared_lives(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.touch()
    taken: list[LocalClaim] = []
    taking = threading.Thread(target=lambda: taken.append(LocalClaim.take(tmp_path, "x")))
    with locks.unowned(lock) as dead:
        assert dead
        taking.start()
        lock.unlink()  # as `clear` does
    taking.join()
    taken[0].note({"staged": "scans/1"})
    LocalClaim.clear(tmp_path)
    assert [(name, alive) for name, _, alive in LocalClaim.listed(tmp_path)] == [("x", True)]
    taken[0].release()
    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_claim_that_ends_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{}\n")
    assert [(name, alive) for name, _, alive in LocalClaim.listed(tmp_path)] == [("x", False)]
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_drafts_of_dead_writers_go_at_once_and_those_of_living_ones_stay(repository: Repository) -> None:
    dead = repository.path / files.TMP / f"{files.new_id()}.draft"
    dead.write_bytes(b"half a mani")
    with repository.storage._draft() as draft:
        collect(repository)
        assert draft.exists()
        assert not dead.exists()


def test_a_store_of_an_earlier_version_gets_its_folders(repository: Repository) -> None:
    for folder in (files.TAGS, files.LEASES, files.FOLDERS["tombstone"]):
        (repository.path / folder).rmdir()
    set_tag(repository.storage, "v1", 3)
    delete_patches(repository, "patch = 4")
    with repository.pin() as pinned:
        assert len(content(pinned)["patches"]) == 7
    collect(repository, keep=1)
    assert [load(repository.storage, number).generation for number in listed(repository.storage)] == [3, 8]


def test_a_commit_needs_an_open_transaction(repository: Repository) -> None:
    with repository.transaction("index") as transaction:
        pass
    with suppress(ValueError):
        transaction.commit(lambda head: Proposal(drop=[head.artefacts("index")[0].path]))
    assert repository.head() == 7
    assert len(add_segment(repository, "sub-02_ct", 1).segments(ENCODER)) == 3
