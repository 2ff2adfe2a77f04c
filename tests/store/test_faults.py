"""A full disk, no right to write, no hard links, no locks, a clock set back: a clear refusal or the right thing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_builders import add_scan, add_segment, content, finish, orphans, start, whole_store

from isimed_index.errors import Incompatible, StoreFull, StoreReadOnly
from isimed_index.store import manifest, transaction
from isimed_index.store.manifest import listed, load
from isimed_index.store.place import faults
from isimed_index.store.repository import Repository
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.restore import restore

MANY = """
import errno, os, sys
from pathlib import Path
from isimed_index.store.repository import Repository
from store_builders import add_scan
def refuse(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")
os.link = refuse
repository = Repository.open(Path(sys.argv[1]))
for number in range(15):
    add_scan(repository, f"{sys.argv[2]}-{number}")
"""


def in_namespace(function: str, folder: Path) -> str:
    """Run a function of `store_faults` where it may mount; skip where nobody may."""
    unshare = shutil.which("unshare")
    trial = f"import subprocess; subprocess.run(['mount', '-t', 'tmpfs', 'none', {str(folder)!r}], check=True)"
    if unshare is None or subprocess.run([unshare, "-rm", sys.executable, "-c", trial], check=False).returncode:
        pytest.skip("no right to mount")
    code = f"from pathlib import Path; import store_faults; store_faults.{function}(Path({str(folder)!r}))"
    done = subprocess.run(
        [unshare, "-rm", sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk(tmp_path: Path) -> None:
    counts = in_namespace("full", tmp_path)
    print(counts)
    refused, done = (int(word.split()[1]) for word in counts.split(", "))
    assert refused > 20
    assert done > 20


def test_a_disk_that_fills_during_an_index(tmp_path: Path) -> None:
    assert int(in_namespace("full_index", tmp_path).split()[-1]) >= 3


def test_a_store_that_is_mounted_read_only(tmp_path: Path) -> None:
    in_namespace("read_only", tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        for path in (Path(folder), *Path(folder).rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


def test_a_store_that_belongs_to_somebody_else(open_folder: Path) -> None:
    finish(
        start(
            "import sys; from pathlib import Path; import store_faults as s; s.no_permission(Path(sys.argv[1]))",
            str(open_folder),
        )
    )


def test_without_hard_links_concurrent_writers_all_land(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "c")
    writers = [start(MANY, str(repository.path), name) for name in "abc"]
    for writer in writers:
        finish(writer)
    assert sorted(repository.snapshot().scan_ids()) == sorted(
        f"{name}-{number}" for name in "abc" for number in range(15)
    )
    chain = [load(repository.storage, number) for number in listed(repository.storage)]
    assert len(chain) == 46
    assert [child.parent for child in chain[1:]] == [(parent.generation, parent.sha256) for parent in chain[:-1]]
    collect(repository)
    assert orphans(repository) == set()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_store_can_be_read_but_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    repository = whole_store(tmp_path / "c")
    before = content(repository.snapshot())

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with repository.pin() as pinned:
            assert content(pinned) == before
        for act in (lambda: add_scan(repository, "a"), lambda: collect(repository)):
            with pytest.raises(Incompatible, match="locks") as caught:
                act()
            assert "doctor" in caught.value.next_step
        with pytest.raises(Incompatible, match="locks"):
            Repository.create(tmp_path / "d")
    assert content(repository.snapshot()) == before
    add_scan(repository, "a")
    collect(repository)
    assert orphans(repository) == set()


def test_a_clock_that_is_set_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = whole_store(tmp_path / "c")
    before = repository.generations()[-1].time
    monkeypatch.setattr(transaction, "utc_now", lambda: "2001-01-01T00:00:00.000000Z")
    monkeypatch.setattr(manifest, "utc_now", lambda: "2001-01-01T00:00:00.000000Z")
    monkeypatch.setattr("time.time", lambda: 1.0e9)
    monkeypatch.setattr("time.time_ns", lambda: 10**18)  # and with it, new names sort before old ones
    add_scan(repository, "a")
    add_segment(repository, "a", 2)
    head = restore(repository, 8)
    history = repository.generations()
    assert [line.generation for line in history] == list(range(11))
    assert [line.time for line in history] == sorted(line.time for line in history)
    assert history[-1].time == before
    assert head.scan_ids() == ["sub-01_T1w", "sub-02_ct", "a"]
    expected = content(repository.snapshot())
    with repository.transaction("add") as writer:
        staged = writer.stage("scan")
        collect(repository, keep=1)
        assert staged.exists()
    collect(repository, keep=1)
    assert listed(repository.storage) == [10]
    assert content(repository.snapshot()) == expected
    assert orphans(repository) == set()


def test_only_faults_of_the_store_itself_are_told(tmp_path: Path) -> None:
    def fault(number: int, name: Path) -> Exception | None:
        return faults.fault_of(OSError(number, os.strerror(number), str(name)), tmp_path / "c")

    assert isinstance(fault(errno.ENOSPC, tmp_path / "c" / "x"), StoreFull)
    assert isinstance(fault(errno.EROFS, tmp_path / "c" / "tmp" / "x"), StoreReadOnly)
    assert fault(errno.EACCES, tmp_path / "elsewhere") is None
    assert fault(errno.EIO, tmp_path / "c" / "x") is None
