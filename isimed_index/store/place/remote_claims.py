"""Claims in a bucket: an object that its holder writes again and again, because there are no kernel locks there.

    <folder>/<name>.jsonl    the notes; alive while it was written less than `ttl_s` ago, by the clock of the service

The promise is weaker than that of a kernel lock. A dead process is believed alive until its claim runs out; one that
slept longer than that (a suspended machine, a network that was down) is believed dead. Such a holder finds out when it
wakes: its claim is `lapsed` for good, and what rests on it must not be published.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from isimed_index.errors import StoreLocked
from isimed_index.store import files
from isimed_index.store.manifest import canonical
from isimed_index.store.place.bucket import Bucket

TTL_S = 600.0  # how long a claim lives after it was written
_BEATS = 10  # how often it is written in that time
_MARGIN = 0.9  # a holder believes in its claim for this share of the time
_NOTES = ".jsonl"


class Heartbeat:
    """Calls `beat` every so often in a thread of its own, until it is stopped or the process ends."""

    def __init__(self, beat: Callable[[], None], every_s: float) -> None:
        self._stopped = threading.Event()
        self._beat = beat
        self._every_s = every_s
        threading.Thread(target=self._run, name="isimed-claim", daemon=True).start()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            with suppress(OSError):  # the next beat tries again, and a claim that was not renewed in time has lapsed
                self._beat()

    def stop(self) -> None:
        """Let the thread end; a second call does nothing."""
        self._stopped.set()


class RemoteClaim:
    """A claim by an object that is renewed; `Claim`."""

    def __init__(self, bucket: Bucket, key: str, ttl_s: float = TTL_S) -> None:
        self._bucket = bucket
        self._key = key
        self._ttl_s = ttl_s
        self._notes = b""
        self._guard = threading.Lock()
        self._released = False
        self._broken = False
        self._written_s = _now_s()
        self._heartbeat: Heartbeat | None = None

    @classmethod
    def take(cls, bucket: Bucket, folder: str, name: str, ttl_s: float = TTL_S) -> RemoteClaim:
        """Take the claim `name`, which nobody else uses."""
        claim = cls(bucket, f"{folder}/{name}{_NOTES}", ttl_s)
        claim.renew()
        claim._heartbeat = Heartbeat(claim.renew, ttl_s / _BEATS)
        return claim

    @property
    def lapsed(self) -> bool:
        """Whether others may have believed its holder dead at any time since it was taken."""
        if self._released:
            return False
        return self._broken or _now_s() - self._written_s > _MARGIN * self._ttl_s

    def renew(self) -> None:
        """Write the notes again."""
        with self._guard:
            self._write(self._notes)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a line of JSON."""
        with self._guard:
            notes = self._notes + canonical(entry) + b"\n"
            self._write(notes)
            self._notes = notes

    def _write(self, notes: bytes) -> None:
        if self._released:
            return
        begun_s = _now_s()  # before the service looks at its clock
        self._bucket.put(self._key, notes)
        self._broken = self._broken or begun_s - self._written_s > _MARGIN * self._ttl_s
        self._written_s = begun_s

    def release(self) -> None:
        """Remove the object; where the service cannot be reached, the claim runs out by itself."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        with self._guard:
            if not self._released:
                self._released = True
                with suppress(OSError):
                    self._bucket.delete([self._key])


def listed(bucket: Bucket, folder: str, ttl_s: float = TTL_S) -> list[tuple[str, bytes, bool]]:
    """Every claim in a folder: its name, its notes, and whether it is alive."""
    found = sorted((one for one in bucket.list(folder) if one.key.endswith(_NOTES)), key=lambda one: one.key)
    if not found:
        return []
    now = server_time(bucket)
    with ThreadPoolExecutor(8) as pool:
        notes = list(pool.map(lambda one: _notes(bucket, one.key), found))
    return [
        (one.key.rpartition("/")[2].removesuffix(_NOTES), content, now - one.modified.timestamp() < ttl_s)
        for one, content in zip(found, notes, strict=True)
        if content is not None
    ]


def clear(bucket: Bucket, folder: str, ttl_s: float = TTL_S) -> None:
    """Remove the claims in a folder that ran out."""
    bucket.delete([f"{folder}/{name}{_NOTES}" for name, _, alive in listed(bucket, folder, ttl_s) if not alive])


def _notes(bucket: Bucket, key: str) -> bytes | None:
    try:
        return bucket.get(key)
    except FileNotFoundError:
        return None  # released since it was listed


def server_time(bucket: Bucket) -> float:
    """Seconds since the epoch by the clock of the service, of an object that is written for it."""
    key = f"{files.TMP}/{files.new_id()}.clock"
    bucket.put(key, b"")
    try:
        return bucket.head(key).modified.timestamp()
    finally:
        bucket.delete([key])


@contextmanager
def exclusive(bucket: Bucket, name: str, ttl_s: float = TTL_S) -> Iterator[None]:
    """Hold a lock object that only one process can make; one that was not renewed for `ttl_s` is taken over.

    `StoreLocked` when another holds it. A holder that was suspended for longer than `ttl_s` does not notice that
    another took over.
    """
    key = f"{files.TMP}/{name}.lock"
    etag = _taken(bucket, key, name, ttl_s)
    guard = threading.Lock()

    def beat() -> None:
        nonlocal etag
        with guard:
            if etag is not None:
                etag = bucket.swap(key, files.new_id().encode(), etag)

    heartbeat = Heartbeat(beat, ttl_s / _BEATS)
    try:
        yield
    finally:
        heartbeat.stop()
        with guard, suppress(OSError):
            if bucket.head(key).etag == etag:
                bucket.delete([key])
            etag = None


def _taken(bucket: Bucket, key: str, name: str, ttl_s: float) -> str | None:
    mine = files.new_id().encode()
    try:
        return bucket.create(key, mine)
    except FileExistsError:
        with suppress(FileNotFoundError):
            if bucket.get(key) == mine:  # made at the first attempt, whose answer was lost
                return bucket.head(key).etag
    held = StoreLocked(f"another process is at {name} in this store", next_step="try again later")
    try:
        other = bucket.head(key)
        if server_time(bucket) - other.modified.timestamp() < ttl_s:
            raise held
        return bucket.swap(key, mine, other.etag)
    except (FileNotFoundError, FileExistsError):
        raise held from None


def _now_s() -> float:
    """A clock of this machine that also runs while it is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
