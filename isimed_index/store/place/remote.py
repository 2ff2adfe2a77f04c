"""A store in a bucket: artefacts go through a cache on this machine, all else is asked of the service.

    stage ─▶ cache ── settle: upload, compare sizes ─▶ bucket ◀── publish: PUT If-None-Match: * (the commit point)
              ▲                                          │
              └──── fetch: download once, rename ────────┘   verify (`integrity`) checks size and hash in the cache

An artefact never changes, so a cached one stays good, and a cache may be deleted whenever no process uses it. Claims
rest on clocks here (see `remote_claims`). The service must have conditional writes and list what was written before.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from isimed_index.errors import Incompatible, StoreUnreachable
from isimed_index.store import files
from isimed_index.store.place import remote_claims
from isimed_index.store.place.bucket import Bucket
from isimed_index.store.place.remote_claims import PROBE, TTL_S, RemoteClaim, RemoteLock

_AT_ONCE = 8  # requests
_PART_BYTES = 16 << 20  # of a download
_DRAFT = ".fetch"  # ends the name of a download on its way
_OLD_S = 86400.0  # one that was not written to for so long belongs to nobody
_ATTEMPTS = 10  # to read what is in the way of a conditional write
_ARTEFACTS = frozenset(files.FOLDERS.values())
_FOLDERS = _ARTEFACTS | {files.MANIFESTS, files.INTENTS, files.LEASES, files.TAGS, files.TMP}
_FILE = ".parquet"  # artefacts with this suffix are files, all others folders


@dataclass(slots=True)
class _Turn:
    """Whose turn it is, among threads of this process, to download an artefact, and how it last failed."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: Exception | None = None

    def take(self, before: Exception | None, download: Callable[[], None]) -> None:
        """Download, unless another's attempt failed since `failure` was `before`: then raise what it met."""
        if self.failure is not None and self.failure is not before:
            raise copy(self.failure)
        try:
            download()
        except Exception as error:
            self.failure = copy(error)  # without its traceback, which would keep what the callers hold
            raise


class ObjectStorage:
    """A bucket that speaks S3 and a cache of it in the folder `root`; `Storage`."""

    copies = False  # the service keeps several of each object

    def __init__(self, url: str, root: Path, ttl_s: float = TTL_S) -> None:
        self.root = root
        self.ttl_s = ttl_s
        self._bucket = Bucket(url)
        self.name = self._bucket.name
        self._sent: set[str] = set()  # artefacts whose upload was begun by this process
        self._proven = False
        self._swept = False
        self._intents: weakref.WeakSet[RemoteClaim] = weakref.WeakSet()
        self._locks: dict[str, RemoteLock] = {}
        self._turns: dict[str, _Turn] = {}  # by artefact
        self._guard = threading.Lock()

    def __reduce__(self) -> tuple[type[ObjectStorage], tuple[str, Path, float]]:
        return ObjectStorage, (self._bucket.url, self.root, self.ttl_s)

    def prepare(self, folders: Sequence[str]) -> None:
        """Make the cache's folders; a bucket has none."""
        self._prove()
        for folder in folders:
            self._room(folder)

    def _prove(self) -> None:
        """Refuse a service that takes a conditional write for any other: commits would overwrite one another there."""
        if self._proven:
            return
        key = f"{files.TMP}/{files.new_id()}{PROBE}"
        self._bucket.create(key, b"first")
        try:
            self._bucket.create(key, b"second")
        except FileExistsError:
            self._proven = True
        finally:
            self._bucket.delete([key])
        if not self._proven:
            raise Incompatible(
                f"the service of the store {self.name} ignores If-None-Match, so no commit would be safe there",
                next_step="use a service with conditional writes",
            )

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder; none in one that does not exist, because a bucket has no folders."""
        return list(self._bucket.names(folder))

    def exists(self, relative: str) -> bool:
        """Whether a file, or something in a folder, is there; the folders of a store always are."""
        if relative in _FOLDERS:
            return True
        try:
            self._bucket.head(relative)
        except FileNotFoundError:
            return bool(self._bucket.names(relative))
        return True

    def read(self, relative: str) -> bytes:
        """A file's content."""
        return self._bucket.get(relative)

    def publish(self, relative: str, content: bytes) -> None:
        """Make a file appear with `content` by a conditional write; `FileExistsError` when another is there.

        The answer to a write that was done can be lost, and the library's own second attempt then meets the file: so
        a file with the same content is taken for ours. `StoreUnreachable` leaves it open whether the write was done.
        """
        self._prove()
        self._check_claims()
        try:
            self._bucket.create(relative, content)
        except (FileExistsError, StoreUnreachable):
            if not self._holds(relative, content):
                raise

    def _holds(self, relative: str, content: bytes) -> bool:
        """Whether a file has this content; it may take a moment to show when another's write is just being done."""
        for attempt in range(_ATTEMPTS):
            with suppress(FileNotFoundError):
                return self._bucket.get(relative) == content
            time.sleep(0.01 * 2**attempt)
        return False

    def _check_claims(self) -> None:
        with self._guard:
            lapsed = any(claim.lapsed for claim in self._intents)
        if lapsed:
            raise StoreUnreachable(
                f"the store {self.name} could not be reached for so long that a collector may have taken what was "
                "staged; nothing was committed",
                next_step="run the command again",
            )

    def replace(self, relative: str, content: bytes) -> None:
        """Put a file in place in one step."""
        self._bucket.put(relative, content)

    def mend(self, relative: str, content: bytes) -> None:
        """Put a file in place in one step, whatever is there."""
        self._bucket.put(relative, content)

    def remove(self, relative: str) -> None:
        """Remove a file or a folder with all that is in it, here and in the bucket."""
        _discard(self.root / relative)
        self._sent.discard(relative)
        self._bucket.delete([relative, *(one.key for one in self._bucket.list(relative))])

    def move(self, relative: str, target: str) -> None:
        """Rename a file or folder: copy all, then remove what was copied; between the two it is in both places."""
        found = self._bucket.list(relative)
        keys = [one.key for one in found] or [relative]
        _each([partial(self._bucket.copy, key, target + key.removeprefix(relative)) for key in keys])
        self._bucket.delete(keys)
        _discard(self.root / relative)

    def seal(self, relative: str) -> None:
        """Nothing is durable before `settle`."""

    def settle(self, artefacts: Sequence[str]) -> None:
        """Upload the artefacts that were staged here, and compare what the bucket then lists with what was sent."""
        staged = [path for path in artefacts if path.split("/")[0] in _ARTEFACTS and (self.root / path).exists()]
        for relative in staged:
            sizes = {_key(relative, inside): file for inside, file in files.tree_files(self.root / relative)}
            there = self._sizes(relative) if relative in self._sent else {}
            self._sent.add(relative)
            lacking = {key: file for key, file in sizes.items() if there.get(key) != file.stat().st_size}
            if not lacking and there:
                continue
            _each([partial(self._bucket.upload, key, file) for key, file in lacking.items()])
            if self._sizes(relative) != {key: file.stat().st_size for key, file in sizes.items()}:
                raise StoreUnreachable(
                    f"an upload to the store {self.name} did not arrive whole", next_step="run the command again"
                )

    def size(self, relative: str) -> tuple[int, int]:
        """Bytes and number of files of an artefact in the bucket; `FileNotFoundError` when it is missing."""
        sizes = self._sizes(relative)
        if not sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), relative)
        return sum(sizes.values()), len(sizes)

    def _sizes(self, relative: str) -> dict[str, int]:
        """Size by key of every object of an artefact."""
        if not relative.endswith(_FILE):
            return {one.key: one.size for one in self._bucket.list(relative)}
        with suppress(FileNotFoundError):
            return {relative: self._bucket.head(relative).size}
        return {}

    def at_hand(self, relative: str) -> bool:
        """Whether an artefact is in the cache."""
        return (self.root / relative).exists()

    def fetch(self, relative: str) -> Path:
        """Where an artefact is in the cache, downloaded the first time; `FileNotFoundError` when it is missing.

        Of several threads that want it one downloads it, and the others wait; what befalls that one befalls all, unless
        it was interrupted: however that ends, its lock is free, and the next one tries.
        """
        place = self.root / relative
        if place.exists():
            return place
        with self._guard:
            turn = self._turns.setdefault(relative, _Turn())
        before = turn.failure
        with turn.lock:
            if not place.exists():
                turn.take(before, partial(self._download, relative, place))
        return place

    def _download(self, relative: str, place: Path) -> None:
        """Let it appear in the cache by a rename, so that of several processes none sees half of it."""
        sizes = self._sizes(relative)
        if not sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), relative)
        if not self._swept:
            self._clear_drafts()
            self._swept = True
        draft = self._room(files.TMP) / f"{files.new_id()}{_DRAFT}"
        self._room(relative.split("/")[0])
        try:
            _each([job for key, size in sizes.items() for job in self._parts(key, size, _inside(relative, key, draft))])
            try:
                draft.rename(place)
            except OSError:
                if not place.exists():  # otherwise another process was first
                    raise
        finally:
            _discard(draft)

    def _parts(self, key: str, size: int, file: Path) -> Iterator[Callable[[], None]]:
        """Make a file of `size` bytes, and the jobs that fill it with the content of an object."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.truncate(size)
        for start in range(0, size, _PART_BYTES):
            yield partial(self._fill, key, start, min(_PART_BYTES, size - start), file)

    def _fill(self, key: str, start: int, length: int, file: Path) -> None:
        content = self._bucket.get_range(key, start, length)
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(content)

    def forget(self, relative: str) -> bool:
        """Drop an artefact from the cache, because the copy may be damaged; whether there was one."""
        place = self.root / relative
        there = place.exists()
        _discard(place)
        return there

    def every_file(self) -> Iterator[tuple[str, Path]]:
        """Each file in the cache, then each object of the bucket, downloaded again whatever the cache holds."""
        yield from files.tree_files(self.root)
        with TemporaryDirectory(suffix=_DRAFT, dir=self._room(files.TMP)) as spare:
            for one in self._bucket.list(""):
                copy = Path(spare) / one.key.rpartition("/")[2]
                with suppress(FileNotFoundError):  # removed since it was listed
                    copy.write_bytes(self._bucket.get(one.key))
                    yield one.key, copy
                    copy.unlink()

    def read_range(self, relative: str, start: int, length: int) -> bytes:
        """Bytes of a file, from the cache where its artefact is there, and otherwise these bytes alone."""
        file = self.root / relative
        if file.exists():
            return files.read_range(file, start, length)
        return self._bucket.get_range(relative, start, length) if length else b""

    def claim(self, folder: str, name: str) -> RemoteClaim:
        """Take a claim: an object that is renewed, and that runs out when it is not."""
        if folder == files.INTENTS:
            self._prove()  # before anything is staged
        self._room(folder)
        claim = RemoteClaim.take(self._bucket, folder, name, self.ttl_s)
        if folder == files.INTENTS:
            with self._guard:
                self._intents.add(claim)
        return claim

    def claims(self, folder: str) -> list[tuple[str, bytes, bool]]:
        """Name, notes and whether it is alive, of every claim in a folder."""
        return remote_claims.listed(self._bucket, folder, self.ttl_s)

    def sweep(self) -> None:
        """Remove claims that ran out, what dead processes left in `tmp/`, and downloads that nobody finishes."""
        for folder in (files.INTENTS, files.LEASES):
            remote_claims.clear(self._bucket, folder, self.ttl_s)
        remote_claims.clear_passing(self._bucket, self.ttl_s)
        self._clear_drafts()

    def _clear_drafts(self) -> None:
        """Remove from the cache what killed processes were downloading; one that goes on writes now and then."""
        for draft in (self.root / files.TMP).glob(f"*{_DRAFT}"):
            with suppress(FileNotFoundError):
                written = [file.stat().st_mtime for _, file in files.tree_files(draft)]
                if time.time() - max([draft.stat().st_mtime, *written]) > _OLD_S:
                    _discard(draft)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a lock that only one process can hold, for as long as it renews it."""
        lock = RemoteLock.take(self._bucket, name, self.ttl_s)
        self._locks[name] = lock
        try:
            yield
        finally:
            del self._locks[name]
            lock.release()

    def held(self, name: str) -> bool:
        """Whether this process still holds a lock, as far as it knows without asking the service."""
        lock = self._locks.get(name)
        return lock is not None and lock.held

    def _room(self, folder: str) -> Path:
        """A folder of the cache, which only this user can read."""
        if not self.root.exists():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        place = self.root / folder
        place.mkdir(exist_ok=True)
        return place


def cache_of(url: str) -> Path:
    """Where a store in a bucket is cached: below `ISIMED_CACHE`, or else the user's folder of caches."""
    named = os.environ.get("ISIMED_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    place = hashlib.sha256(f"{endpoint}\0{url.rstrip('/')}".encode()).hexdigest()[:16]
    return (Path(named) if named else Path(home) / "isimed").absolute() / place


def _each(jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs side by side; the first error, after those that had begun have ended."""
    if len(jobs) < 2:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(min(_AT_ONCE, len(jobs))) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for one in running:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _key(relative: str, inside: str) -> str:
    return f"{relative}/{inside}" if inside else relative


def _inside(relative: str, key: str, draft: Path) -> Path:
    """Where an object of an artefact goes in a draft of it; `OSError` for a name that would leave it."""
    parts = key.removeprefix(relative).strip("/").split("/")
    if parts == [""]:
        return draft
    if any(part in ("", ".", "..") for part in parts):
        raise OSError(errno.EINVAL, "an object has a name that is no path", relative)
    return draft.joinpath(*parts)


def _discard(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
