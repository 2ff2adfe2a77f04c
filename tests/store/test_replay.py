"""Power cuts: whatever a crash at any moment of any verb may leave opens, whole, at the old or the new generation.

`ISIMED_REPLAY=all pytest tests/store/test_replay.py` looks at every image, also where there are many.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import pytest
from store_builders import add_scan, add_segment, content, orphans, whole_store

from isimed_index.errors import IsimedError, IsimedWarning, NotFound
from isimed_index.store import files
from isimed_index.store.integrity import check_hash, check_size
from isimed_index.store.manifest import listed, load
from isimed_index.store.place.storage import LocalStorage
from isimed_index.store.repository import Repository
from isimed_index.store.tags import remove_tag, set_tag, tag_names
from isimed_index.store.transaction import Transaction
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.purge import purge
from isimed_index.store.upkeep.repair import repair
from isimed_index.store.upkeep.restore import restore
from isimed_index.testing.crash import Image, Recorder

EVERY = "ISIMED_REPLAY" in os.environ
MOST = 50  # images of one verb that are looked at unless it is set, evenly spaced

VERBS: dict[str, Callable[[Repository], Any]] = {
    "add": lambda repository: add_scan(repository, "sub-03"),
    "index": lambda repository: add_segment(repository, "sub-01_T1w", 2),
    "delete scans": lambda repository: delete_scans(repository, "modality = 'CT'"),
    "delete patches": lambda repository: delete_patches(repository, "i = 2"),
    "compact": compact,
    "collect": lambda repository: collect(repository, keep=1),
    "tag": lambda repository: set_tag(repository.storage, "release", 6),
    "remove tag": lambda repository: remove_tag(repository.storage, "kept"),
    "restore": lambda repository: restore(repository, 6),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans with segments, a frame, an index, a tombstone, and a tag on an old generation."""
    repository = whole_store(tmp_path_factory.mktemp("replay") / "c")
    set_tag(repository.storage, "kept", 4)
    add_scan(repository, "sub-09")
    delete_scans(repository, "scan = 'sub-09'")
    delete_patches(repository, "i = 1")
    return repository.path


def state(repository: Repository) -> dict[str, Any]:
    """All that a user can tell two stores apart by, but for their histories."""
    snapshot = repository.snapshot()
    return {"generation": snapshot.generation, "tags": tag_names(repository.storage), **content(snapshot)}


def verify_all(repository: Repository, hashed: bool, damaged: Set[str] = frozenset()) -> None:
    """Every artefact of every generation is there, and as committed, past the memory of what was verified before."""
    whole = {
        artefact.path: artefact
        for number in listed(repository.storage)
        for artefact in load(repository.storage, number).artefacts
    }
    for artefact in whole.values():
        if artefact.path in damaged:
            continue
        path = check_size(repository.storage, artefact)
        if hashed:
            check_hash(path, artefact)


def examine(folder: Path, image: Image, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Demand of a crash image what the store promises."""
    folder.mkdir()
    image.write(folder)
    repository = Repository.open(folder)
    found = state(repository)
    assert found == new or (found == old and not image.acknowledged)
    verify_all(repository, hashed=True)
    after = add_scan(repository, "after")
    assert after.generation == found["generation"] + 1
    collect(repository)
    assert orphans(repository) == set()
    verify_all(repository, hashed=False)
    now = repository.snapshot()
    assert now.scan_ids() == [*found["scans"], "after"]
    assert [row for segment in now.segments() for row in segment.row_ids.tolist()] == sorted(found["patches"])


def examine_purge(folder: Path, image: Image, old: dict[str, Any], new: dict[str, Any]) -> None:
    """A purge that was cut short can be finished; one that was acknowledged has left nothing that comes back."""
    folder.mkdir()
    image.write(folder)
    repository = Repository.open(folder)
    found = state(repository)
    assert {**found, "tags": []} in ({**old, "tags": []}, {**new, "tags": []})
    verify_all(repository, hashed=True)
    if image.acknowledged:
        assert found == new
        with pytest.raises(NotFound):
            purge(repository, "sub-02")
    elif found == new and not any(name.startswith("purge-") for name in repository.storage.names(files.TMP)):
        with pytest.raises(NotFound):  # it had been proved
            purge(repository, "sub-02")
    else:
        assert purge(repository, "sub-02").scans == 1
    collect(repository)
    assert orphans(repository) == set()
    verify_all(repository, hashed=True)
    assert {**state(repository), "generation": new["generation"]} == new


def examine_repair(folder: Path, image: Image, old: dict[str, Any], new: dict[str, Any]) -> None:
    """The damage is still there, or mended; a repair that was cut short can be finished."""
    folder.mkdir()
    image.write(folder)
    repository = Repository.open(folder)
    found = state(repository)
    assert found == new or (found == old and not image.acknowledged)
    damaged = {artefact.path for artefact in load(repository.storage, old["generation"]).find("index")}
    verify_all(repository, hashed=True, damaged=damaged)
    repair(repository)
    assert state(repository) == new
    assert not damaged & {artefact.path for artefact in repository.snapshot().manifest.artefacts}
    collect(repository, keep=1, expire=set(range(new["generation"])))
    assert orphans(repository) == set()
    verify_all(repository, hashed=False, damaged=damaged)


def replay(
    base: Path,
    folder: Path,
    verb: Callable[[Repository], Any],
    patch: pytest.MonkeyPatch,
    look: Callable[[Path, Image, dict[str, Any], dict[str, Any]], None] = examine,
    promised_at_commit: bool = True,
) -> tuple[int, int]:
    """Run a verb on a copy of a store and examine every crash image; how many prefixes and images there were."""
    shutil.copytree(base, folder / "store")
    repository = Repository.open(folder / "store")
    old = state(repository)
    commit = Transaction.commit
    with Recorder(repository.path) as recorder:

        def acknowledging(transaction: Transaction, propose: Any) -> Any:
            snapshot = commit(transaction, propose)
            if promised_at_commit:
                recorder.acknowledge()
            return snapshot

        with patch.context() as during:
            during.setattr(Transaction, "commit", acknowledging)
            verb(repository)
        recorder.acknowledge()
    new = state(repository)
    images = recorder.images()
    with patch.context() as after:
        after.setattr(os, "fsync", lambda descriptor: None)  # what the examination writes need not last
        for number, image in enumerate(images[:: -1 if EVERY else len(images) // -MOST]):
            look(folder / f"image-{number}", image, old, new)
            shutil.rmtree(folder / f"image-{number}")
    return recorder.prefixes, len(images)


@pytest.mark.parametrize("name", VERBS)
def test_every_crash_leaves_the_old_or_the_new(
    name: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    prefixes, images = replay(base, tmp_path, VERBS[name], monkeypatch)
    request.node.user_properties += [("prefixes", prefixes), ("images", images)]
    print(f"{name}: {prefixes} prefixes, {images} images")
    assert images > 1


def test_every_crash_of_a_purge_can_be_finished(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    counts = replay(base, tmp_path, lambda store: purge(store, "sub-02"), monkeypatch, examine_purge, False)
    request.node.user_properties += zip(("prefixes", "images"), counts, strict=True)
    print(f"purge: {counts[0]} prefixes, {counts[1]} images")


def test_every_crash_of_a_repair_can_be_finished(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (index,) = Repository.open(broken).snapshot().artefacts("index")
    (broken / index.path / "index.faiss").write_bytes(b"\1" * 256)
    counts = replay(broken, tmp_path, repair, monkeypatch, examine_repair)
    request.node.user_properties += zip(("prefixes", "images"), counts, strict=True)
    print(f"repair: {counts[0]} prefixes, {counts[1]} images")


def nothing(*arguments: object) -> None:
    """Stand in for a step of a commit that is left out."""


def settle_artefacts_only(self: LocalStorage, places: Sequence[str]) -> None:
    SETTLE(self, [place for place in places if not place.startswith(files.TMP)])


def hasty_publish(self: LocalStorage, relative: str, content: bytes) -> None:
    (self.root / relative).write_bytes(content)
    files.sync_file(self.root / relative)
    files.sync_file((self.root / relative).parent)


def make_folder_hastily(path: Path) -> None:
    path.mkdir(exist_ok=True)


def test_a_folder_that_an_earlier_version_lacks_is_made_to_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    shutil.copytree(base, old)
    shutil.rmtree(old / files.TAGS)
    (tmp_path / "whole").mkdir()
    replay(old, tmp_path / "whole", VERBS["tag"], monkeypatch)
    (tmp_path / "hasty").mkdir()
    monkeypatch.setattr(files, "make_folder", make_folder_hastily)
    with pytest.raises(AssertionError):
        replay(old, tmp_path / "hasty", VERBS["tag"], monkeypatch)


SETTLE = LocalStorage.settle


@pytest.mark.parametrize(
    ("name", "owner", "step", "instead"),
    [
        ("add", files, "sync_file", nothing),
        ("add", files, "sync_tree", nothing),
        ("index", LocalStorage, "settle", nothing),
        ("tag", LocalStorage, "publish", hasty_publish),
        ("remove tag", LocalStorage, "settle", nothing),
        ("collect", LocalStorage, "settle", settle_artefacts_only),
    ],
)
def test_a_verb_that_skips_a_step_is_found_out(
    name: str, owner: Any, step: str, instead: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(repository: Repository) -> None:
        with monkeypatch.context() as during:
            during.setattr(owner, step, instead)
            VERBS[name](repository)

    with pytest.raises((AssertionError, IsimedError, IsimedWarning)):
        replay(base, tmp_path, sabotaged, monkeypatch)
