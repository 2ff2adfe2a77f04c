"""What a store does where the operating system refuses; `store/test_faults.py` runs each in a process of its own.

Functions that mount want a mount namespace of their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cohorts import segment_vectors, shifted_heads
from store_builders import add_scan, content, encode_again, orphans, whole_store

import isimed_index as isi
from isimed_index.errors import StoreFull, StoreReadOnly
from isimed_index.store.integrity import check_hash, check_size
from isimed_index.store.repository import Repository
from isimed_index.store.tags import remove_tag, set_tag, tag_names
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import without_scans
from isimed_index.store.upkeep.restore import restore

Verbs = dict[str, Callable[[Repository], Any]]
NOBODY = 65534


def delete(repository: Repository) -> None:
    """Delete a scan without asking in SQL."""
    with repository.transaction("delete") as transaction:
        transaction.commit(lambda head: without_scans(head, {head.scan_ids()[-1]}))


def verbs(number: int = 0) -> Verbs:
    """Everything that writes."""
    return {
        "add": lambda repository: add_scan(repository, f"new-{number}"),
        "index": lambda repository: encode_again(repository, "sub-01_T1w", 500, seed=number),
        "compact": compact,
        "delete": delete,
        "restore": lambda repository: restore(repository, tag="whole"),
        "tag": lambda repository: set_tag(repository.storage, f"t{number}", repository.head()),
        "collect": lambda repository: collect(repository, keep=3),
        "create": lambda repository: Repository.create(repository.path.parent / f"other-{number}"),
    }


def state(repository: Repository) -> tuple[Any, ...]:
    """What the store holds, every artefact read."""
    with repository.pin() as head:
        for artefact in head.manifest.artefacts:
            check_hash(check_size(repository.storage, artefact), artefact)
        return head.generation, tag_names(repository.storage), content(head)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


@contextmanager
def filled(folder: Path, free: int) -> Iterator[None]:
    """A file system with about so many bytes left."""
    filler = folder / "filler"
    state = os.statvfs(folder)
    with filler.open("wb") as stream:
        stream.write(bytes(max(state.f_bavail * state.f_frsize - free, 0)))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def crowded(folder: Path, free: int) -> Iterator[None]:
    """A file system on which so many more files can be made."""
    crowd = folder / "crowd"
    crowd.mkdir()
    for number in range(os.statvfs(folder).f_favail - free):
        (crowd / str(number)).touch()
    try:
        yield
    finally:
        for path in crowd.iterdir():
            path.unlink()
        crowd.rmdir()


def full(folder: Path) -> None:
    """Every verb at many degrees of no room: it is refused by name or works, and nothing is lost."""
    mount(folder, "size=4m,nr_inodes=600")
    repository = whole_store(folder / "c")
    set_tag(repository.storage, "whole", 7)
    refused = done = 0
    shortages = [(filled, size) for size in range(0, 80_000, 4096)] + [(crowded, files) for files in range(12)]
    for number, (shortage, free) in enumerate(shortages):
        for verb, act in verbs(number).items():
            before = state(repository)
            with shortage(folder, free):
                try:
                    act(repository)
                    done += 1
                except StoreFull:
                    assert Repository.open(repository.path).snapshot().generation == before[0]
                    refused += 1
                    assert state(repository) == before, verb
                    assert orphans(repository) == set(), verb  # what was staged does not fill the disk
            if f"t{number}" in tag_names(repository.storage):
                remove_tag(repository.storage, f"t{number}")
        for path in folder.glob("other-*"):
            subprocess.run(["rm", "-r", str(path)], check=True)
    add_scan(repository, "last")
    collect(repository, keep=1)
    assert orphans(repository) == set()
    print(f"refused {refused}, done {done}")


def full_index(folder: Path) -> None:
    """`index` at several degrees of no room: refused by name, what was committed stays, and it is gone on with."""
    mount(folder, "size=64m")
    path = shifted_heads(folder, 3)
    refused = 0
    for free in (0, 150_000, 300_000, 500_000, 700_000, 900_000):
        before = segment_vectors(path)
        with filled(folder, free):
            try:
                isi.open(path, mode="a").index(runtime="torch")
            except StoreFull:
                refused += 1
        assert before.items() <= segment_vectors(path).items()
        assert orphans(Repository.open(path)) == set()
    isi.open(path, mode="a").index(runtime="torch")
    undisturbed = shifted_heads(folder / "again", 3)
    isi.open(undisturbed, mode="a").index(runtime="torch")
    assert segment_vectors(path) == segment_vectors(undisturbed)
    assert {finding.kind for finding in isi.check(path)} <= {"copy_missing"}  # a second copy, for which was no room
    isi.repair(path)
    assert not isi.check(path, read=1.0)
    print(f"refused {refused}")


def read_only(folder: Path) -> None:
    """A store that is mounted read-only: reading works, writing is refused by name."""
    mount(folder, "size=4m")
    repository = whole_store(folder / "c")
    set_tag(repository.storage, "whole", 5)
    before = state(repository)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    refused_by_name(repository, before)
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    assert add_scan(repository, "a").generation == 8


def no_permission(folder: Path) -> None:
    """A store that belongs to somebody else."""
    repository = whole_store(folder / "c")
    set_tag(repository.storage, "whole", 5)
    before = state(repository)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:  # who may do anything
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    refused_by_name(repository, before)


def refused_by_name(repository: Repository, before: tuple[Any, ...]) -> None:
    assert state(repository) == before
    for verb, act in verbs().items():
        with pytest.raises(StoreReadOnly) as caught:
            act(repository)
        assert caught.value.next_step, verb
    assert state(repository) == before
