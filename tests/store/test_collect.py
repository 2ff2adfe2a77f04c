"""Garbage collection takes what nobody needs, and nothing that somebody still reads, writes, or has named."""

from __future__ import annotations

import fcntl
import gc as python_gc
import json
from pathlib import Path

import pytest
from store_builders import content, finish, stage_scan, start, whole_store

from isimed_index.errors import NotFound, StoreDamaged, StoreLocked, UsageError
from isimed_index.store.files import FOLDERS, INTENTS, LEASES, TMP
from isimed_index.store.manifest import listed, manifest_name
from isimed_index.store.repository import Repository
from isimed_index.store.tags import find_tag, remove_tag, set_tag, tag_names
from isimed_index.store.upkeep import collect as module
from isimed_index.store.upkeep.collect import collect, leased
from isimed_index.store.upkeep.delete import delete_scans


def artefacts(repository: Repository) -> set[str]:
    """Every artefact on disk."""
    return {f"{f}/{path.name}" for f in FOLDERS.values() for path in (repository.path / f).iterdir()}


def named(repository: Repository) -> set[str]:
    """Every artefact that a generation names."""
    return {
        artefact.path
        for generation in listed(repository.storage)
        for artefact in repository.snapshot(generation).manifest.artefacts
    }


def test_old_generations_go_and_what_only_they_held(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    delete_scans(repository, "scan = 'sub-02_ct'")
    before = content(repository.snapshot())
    preview = collect(repository, keep=1, dry_run=True)
    assert artefacts(repository) > named(repository.open(repository.path)) - set(preview.artefacts)
    done = collect(repository, keep=1)
    assert done == preview
    assert done.generations == tuple(range(8))
    assert listed(repository.storage) == [8]
    assert content(repository.snapshot()) == before
    assert artefacts(repository) == named(repository)
    assert collect(repository, keep=1).artefacts == ()


def test_the_newest_k_stay(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    collect(repository, keep=3)
    assert listed(repository.storage) == [5, 6, 7]
    with pytest.raises(UsageError):
        collect(repository, keep=0)


def test_a_tag_keeps_its_generation(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    set_tag(repository.storage, "paper-v1", 5)
    delete_scans(repository, "true")
    collect(repository, keep=1)
    assert listed(repository.storage) == [5, 8]
    with repository.pin(tag="paper-v1") as snapshot:
        assert snapshot.scan_ids() == ["sub-01_T1w", "sub-02_ct"]
        snapshot.chunks_path("sub-02_ct")
    remove_tag(repository.storage, "paper-v1")
    collect(repository, keep=1)
    assert listed(repository.storage) == [8]


def test_tags_are_exclusive_and_well_named(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    tag = set_tag(repository.storage, "v1", 3)
    assert find_tag(repository.storage, "v1") == tag
    for bad in ("v1", "", "../x", "a b", "x" * 65, "42", ".hidden"):
        with pytest.raises(UsageError):
            set_tag(repository.storage, bad, 3)
    with pytest.raises(NotFound):
        set_tag(repository.storage, "v2", 99)
    assert tag_names(repository.storage) == ["v1"]
    for unknown in ("v2", "../manifests/x"):
        with pytest.raises(NotFound, match="there are: v1"):
            find_tag(repository.storage, unknown)
        with pytest.raises(NotFound):
            remove_tag(repository.storage, unknown)
    path = repository.path / "tags" / "v1.json"
    path.write_bytes(path.read_bytes().replace(b'"generation":3', b'"generation":4'))
    with pytest.raises(StoreDamaged):
        repository.pin(tag="v1")
    with pytest.raises(StoreDamaged):  # what it keeps is not known
        collect(repository, keep=1)
    assert len(listed(repository.storage)) == 8


def test_a_pinned_generation_stays_until_its_reader_is_gone(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    reader = repository.pin(4)
    delete_scans(repository, "true")
    assert collect(repository, keep=1).generations == (0, 1, 2, 3, 5, 6, 7)
    assert reader.scan_ids() == ["sub-01_T1w", "sub-02_ct"]
    reader.chunks_path("sub-01_T1w")
    reader.close()
    assert collect(repository, keep=1).generations == (4,)
    assert list((repository.path / LEASES).iterdir()) == []


def test_a_forgotten_snapshot_gives_up_its_lease(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    pinned = repository.pin(2)
    assert leased(repository.storage) == {2}
    del pinned
    python_gc.collect()
    assert leased(repository.storage) == set()


READER = """
import sys, time
from pathlib import Path
from isimed_index.store.repository import Repository
snapshot = Repository.open(Path(sys.argv[1])).pin(int(sys.argv[2]))
print(snapshot.generation, flush=True)
sys.stdin.readline()
print(snapshot.scan_ids(), [str(segment.vectors("descriptor").shape) for segment in snapshot.segments()])
"""


def test_another_process_reads_on_while_all_else_is_collected(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    reader = start(READER, str(repository.path), "5")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "5\n"
    delete_scans(repository, "true")
    collect(repository, keep=1)
    assert listed(repository.storage) == [5, 8]
    assert finish(reader).startswith("['sub-01_T1w', 'sub-02_ct'] ['(3, 4)', '(5, 4)']")
    collect(repository, keep=1)
    assert listed(repository.storage) == [8]


def test_a_killed_reader_holds_nothing(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    reader = start(READER, str(repository.path), "2")
    assert reader.stdout is not None
    reader.stdout.readline()
    reader.kill()
    reader.communicate()
    collect(repository, keep=1)
    assert listed(repository.storage) == [7]
    assert list((repository.path / LEASES).iterdir()) == []


def test_what_a_living_writer_has_staged_stays_and_what_a_dead_one_left_goes(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    with repository.transaction("add") as t:
        staged = stage_scan(t)
        assert collect(repository, keep=1).artefacts == ()
        assert (repository.path / staged.path).is_dir()
    dead = start(
        """
import os, sys
from pathlib import Path
from isimed_index.store.repository import Repository
from store_builders import stage_scan
with Repository.open(Path(sys.argv[1])).transaction("add") as t:
    print(stage_scan(t).path, flush=True)
    os.kill(os.getpid(), 9)
""",
        str(repository.path),
    )
    left = dead.communicate()[0].strip()
    assert (repository.path / left).is_dir()
    assert left in collect(repository, keep=1).artefacts
    assert artefacts(repository) == named(repository)
    assert list((repository.path / INTENTS).iterdir()) == []


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    other = repository.path / "scans" / "README.txt"
    other.write_text("mine")
    collect(repository, keep=1)
    assert other.read_text() == "mine"


def test_a_reader_that_pins_while_manifests_go_gets_its_generation_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = whole_store(tmp_path / "c")
    seen = module.leased
    readers = []

    def late(storage: object) -> set[int]:
        found = seen(storage)  # type: ignore[arg-type]
        if not readers:
            readers.append(repository.pin(5))  # after the collector looked, before it takes manifests away
        return found

    monkeypatch.setattr(module, "leased", late)
    done = collect(repository, keep=1)
    assert 5 not in done.generations
    assert listed(repository.storage) == [5, 7]
    readers[0].close()


def test_a_collector_that_died_half_way_is_finished_by_the_next(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    reader = repository.pin(3)
    away = repository.path / TMP / f"expired-{Path(manifest_name(3)).name}"
    (repository.path / manifest_name(3)).rename(away)  # died after it took a leased manifest away
    collect(repository, keep=1)
    assert listed(repository.storage) == [3, 7]
    reader.close()


def test_one_collector_at_a_time(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    with repository.storage.exclusive("collect"), pytest.raises(StoreLocked):
        collect(repository)
    collect(repository)


def test_nothing_is_collected_from_a_damaged_store(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    before = artefacts(repository)
    head = repository.path / manifest_name(7)
    head.write_bytes(head.read_bytes()[:-9])
    with pytest.raises(StoreDamaged), pytest.warns(UserWarning, match="generation 7"):
        collect(repository, keep=1)
    assert artefacts(repository) == before


def test_drafts_go_with_their_writers(tmp_path: Path) -> None:
    repository = whole_store(tmp_path / "c")
    dead, living = repository.path / TMP / "a.draft", repository.path / TMP / "b.draft"
    dead.write_text("{")
    with living.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        collect(repository)
        assert (dead.exists(), living.exists()) == (False, True)
    collect(repository)
    assert not living.exists()


def test_the_store_facade_pins_tags_and_collects(tmp_path: Path) -> None:
    import isimed_index

    whole_store(tmp_path / "c")
    with isimed_index.open(tmp_path / "c") as store:
        store.tag("first", 3)
        assert store.info()["patches"] == 8
        assert store.delete("scan = 'sub-01_T1w'").scans == ("sub-01_T1w",)
        assert store.scans().num_rows == 1
        assert store.restore(tag="first") == 9
        assert store.info()["patches"] == 0
        assert store.gc(keep=1).generations == (0, 1, 2, 4, 5, 6, 7, 8)
        assert [tag.name for tag in store.tags()] == ["first"]
        with isimed_index.open(tmp_path / "c", tag="first") as old:
            assert old.generation == 3
            with pytest.raises(UsageError):
                old.delete("true")
        store.untag("first")
        assert json.loads((tmp_path / "c" / "HEAD.json").read_bytes())["generation"] == 9
