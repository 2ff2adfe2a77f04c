"""Where a store lies: reading, publishing and claiming files, so that commits mean the same on every kind of storage.

    Storage (protocol)
    ├── LocalStorage     a directory on a POSIX file system
    └── ObjectStorage    a bucket that speaks S3, with a local cache (`remote`, extra `s3`)

Paths are relative to the store, `/` between folders.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from filelock import Timeout

from isimed_index.errors import StoreLocked
from isimed_index.store import files
from isimed_index.store.place import locks
from isimed_index.store.place.claims import Claim, LocalClaim

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


class Storage(Protocol):
    """What the store asks of the place that it lies in; methods raise `OSError` when the place fails."""

    root: Path  # where artefacts are staged and read on this machine: the store itself, or a cache of it
    name: str  # for messages

    def prepare(self, folders: Sequence[str]) -> None:
        """Make the folders of a new store, where the place has folders."""

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder; for one that does not exist, none or `FileNotFoundError`."""

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""

    def read(self, relative: str) -> bytes:
        """A file's content; `FileNotFoundError` when it is not there."""

    def publish(self, relative: str, content: bytes) -> None:
        """Make a file appear with `content`, whole and durable; `FileExistsError` when it is there already."""

    def replace(self, relative: str, content: bytes) -> None:
        """Put a file in place in one step; durability is not promised."""

    def remove(self, relative: str) -> None:
        """Remove a file or a folder with all that is in it; nothing happens when it is not there."""

    def move(self, relative: str, target: str) -> None:
        """Rename a file or folder within the store, durably."""

    def seal(self, relative: str) -> None:
        """Make a staged artefact's content durable; its name becomes so with `settle`."""

    def settle(self, artefacts: Sequence[str]) -> None:
        """Make the names of sealed artefacts durable, so that a manifest may name them."""

    def fetch(self, relative: str) -> Path:
        """Where an artefact can be read on this machine; `OSError` when it is missing."""

    def forget(self, relative: str) -> bool:
        """Drop a copy of an artefact that `fetch` made, so that it makes another; whether there was one."""

    def at_hand(self, relative: str) -> bool:
        """Whether `fetch` would find an artefact on this machine."""

    def size(self, relative: str) -> tuple[int, int]:
        """Bytes and number of files of an artefact, which is not read; `OSError` when it is missing."""

    def every_file(self) -> Iterator[tuple[str, Path]]:
        """Each file of the store, artefact or not, by its path: where its bytes can be read until the next one."""

    def read_range(self, relative: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start`, fewer at its end; only these are transferred, and none is checked."""

    def claim(self, folder: str, name: str) -> Claim:
        """Take a claim that ends with this process at the latest; others see in `claims` that it is alive."""

    def claims(self, folder: str) -> list[tuple[str, bytes, bool]]:
        """Name, notes and whether it is alive, of every claim in a folder."""

    def sweep(self) -> None:
        """Remove drafts and claims of dead writers and readers."""

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        """Hold a lock that only one process can hold; `StoreLocked` at once when another does."""


class LocalStorage:
    """A directory on a POSIX file system; `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.name

    def prepare(self, folders: Sequence[str]) -> None:
        """Make the store's directory and the folders in it, durably."""
        for folder in folders:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        files.sync_file(self.root)
        files.sync_file(self.root.parent)

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder."""
        return sorted(path.name for path in (self.root / folder).iterdir())

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""
        return (self.root / relative).exists()

    def read(self, relative: str) -> bytes:
        """A file's content."""
        return (self.root / relative).read_bytes()

    def publish(self, relative: str, content: bytes) -> None:
        """Make a file appear with `content`, whole and durable; `FileExistsError` when it is there already.

        The hard link is the commit point: it fails when another process was first, which a rename would not. A file
        system without hard links gets the same by a rename under an exclusive lock; one without locks is refused
        (`Incompatible`).
        """
        target = self._in_folder(relative)
        with self._draft() as draft:
            files.write_durably(draft, content)
            try:
                os.link(draft, target)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._publish_locked(draft, target)
        files.sync_file(target.parent)

    def _publish_locked(self, draft: Path, target: Path) -> None:
        lock = locks.take(self.root / files.TMP / "publish.lock")
        try:
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target.name)
            draft.rename(target)
        finally:
            lock.release()

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        """A file in `tmp/` that is locked, so that `sweep` leaves it alone; what is left of it is removed."""
        draft = self.root / files.TMP / f"{files.new_id()}.draft"
        lock = locks.take(draft)
        try:
            yield draft
        finally:
            draft.unlink(missing_ok=True)
            lock.release()

    def _in_folder(self, relative: str) -> Path:
        place = self.root / relative
        files.make_folder(place.parent)
        return place

    def replace(self, relative: str, content: bytes) -> None:
        """Put a file in place in one step; it is not flushed."""
        with self._draft() as draft:
            draft.write_bytes(content)
            draft.replace(self.root / relative)

    def remove(self, relative: str) -> None:
        """Remove a file or a folder with all that is in it."""
        path = self.root / relative
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def move(self, relative: str, target: str) -> None:
        """Rename a file or folder within the store, durably."""
        source, place = self.root / relative, self._in_folder(target)
        source.rename(place)
        files.sync_file(place.parent)
        files.sync_file(source.parent)

    def seal(self, relative: str) -> None:
        """Flush every file and folder of an artefact."""
        files.sync_tree(self.root / relative)

    def settle(self, artefacts: Sequence[str]) -> None:
        """Flush the folders that the artefacts lie in."""
        for folder in sorted({path.split("/")[0] for path in artefacts}):
            files.sync_file(self.root / folder)

    def fetch(self, relative: str) -> Path:
        """Where an artefact is."""
        return self.root / relative

    def forget(self, relative: str) -> bool:
        """There are no copies."""
        return False

    def at_hand(self, relative: str) -> bool:
        """Everything is."""
        return True

    def size(self, relative: str) -> tuple[int, int]:
        """Bytes and number of files of an artefact."""
        path = self.root / relative
        path.stat()  # raises where there is nothing
        return files.tree_size(path)

    def every_file(self) -> Iterator[tuple[str, Path]]:
        """Each file below the directory."""
        return files.tree_files(self.root)

    def read_range(self, relative: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start`."""
        return files.read_range(self.root / relative, start, length)

    def claim(self, folder: str, name: str) -> LocalClaim:
        """Take a claim: a file under a kernel lock, which ends with the process."""
        (self.root / folder).mkdir(exist_ok=True)
        return LocalClaim.take(self.root / folder, name)

    def claims(self, folder: str) -> list[tuple[str, bytes, bool]]:
        """Name, notes and whether it is alive, of every claim in a folder."""
        return LocalClaim.listed(self.root / folder)

    def sweep(self) -> None:
        """Remove drafts and claims that no living process holds."""
        for draft in (self.root / files.TMP).glob("*.draft"):
            with locks.unowned(draft) as dead:
                if dead:
                    draft.unlink(missing_ok=True)
        for folder in (files.INTENTS, files.LEASES):
            LocalClaim.clear(self.root / folder)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a lock that only one process can hold."""
        try:
            lock = locks.take(self.root / files.TMP / f"{name}.lock", 0)
        except Timeout:
            raise StoreLocked(f"another process is at {name} in this store", next_step="try again later") from None
        try:
            yield
        finally:
            lock.release()


def storage_of(place: str | Path) -> Storage:
    """The storage at a directory, or at `s3://bucket/prefix`, which needs the extra `s3`."""
    url = _url(place)
    if url is None:
        return LocalStorage(Path(place).absolute())
    from isimed_index.store.place.remote import ObjectStorage, cache_of

    return ObjectStorage(url, cache_of(url))


def _url(place: str | Path) -> str | None:
    """The URL that a place is; `Path` makes one slash of two."""
    text = str(place)
    if not text.startswith("s3:/"):
        return None
    return "s3://" + text.removeprefix("s3:").strip("/")
