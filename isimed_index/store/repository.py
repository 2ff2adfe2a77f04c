"""A store directory: create it, open it, pin a generation of it, begin a transaction on it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from isimed_index.contracts import FORMAT_VERSION, check_version
from isimed_index.errors import (
    Incompatible,
    NotFound,
    StoreDamaged,
    StoreNotFound,
    StoreUnreachable,
    StoreWarning,
    UsageError,
)
from isimed_index.store import files
from isimed_index.store.manifest import (
    Generation,
    Manifest,
    hinted,
    history,
    listed,
    load,
    manifest_name,
    seal,
    unseal,
    utc_now,
)
from isimed_index.store.place.faults import told
from isimed_index.store.place.storage import Storage, storage_of
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.tags import tagged

if TYPE_CHECKING:
    from isimed_index.store.transaction import Transaction


_OURS = (*files.FOLDERS.values(), files.MANIFESTS, files.INTENTS, files.LEASES, files.TAGS, files.TMP)
_NO_STORE = "isimed add -s STORE PATH…"


class Repository:
    """A store; holds no file open and no lock."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def path(self) -> Path:
        """The store's directory, or the local cache of a store elsewhere."""
        return self.storage.root

    @staticmethod
    def create(path: str | Path) -> Repository:
        """Make an empty store at `path`, a folder that is empty or does not exist; `UsageError` otherwise.

        `path` may be `s3://bucket/prefix`: nothing may lie below the prefix then.

        `FORMAT.json` appears last: a folder without it is no store, and creating there again completes it. Of several
        processes that create at once, one succeeds; to the others it is a store already, which they can open.
        """
        storage = storage_of(path)
        _refuse_occupied(storage)
        with told(storage.root):
            _make(storage)
        return Repository(storage)

    @staticmethod
    def open(path: str | Path) -> Repository:
        """The store at `path` or `s3://…`; `StoreNotFound`, `StoreDamaged` or `Incompatible` when it cannot be read.

        Opening reads `FORMAT.json` only; `snapshot` verifies the manifest. A folder in which a creation was cut short,
        or is still under way, is no store yet.
        """
        storage = storage_of(path)
        committed = _committed(storage)  # before FORMAT.json is looked for, which a new store has earlier
        try:
            content = storage.read(files.FORMAT)
        except (FileNotFoundError, NotADirectoryError):
            if committed:
                raise StoreDamaged(f"{files.FORMAT} is missing", next_step=files.REPAIR) from None
            raise StoreNotFound(f"there is no store at {storage.name}", next_step=_NO_STORE) from None
        except StoreUnreachable:
            raise
        except OSError as error:
            raise StoreDamaged(f"{files.FORMAT} cannot be read ({error.strerror})", next_step=files.REPAIR) from None
        check_version(unseal(content, files.FORMAT))
        return Repository(storage)

    @staticmethod
    def unchecked(path: str | Path) -> Repository:
        """The store at `path` whatever its `FORMAT.json` is like, for `audit` and `repair`.

        `StoreNotFound` when there are no manifests either; `Incompatible` when a newer version wrote it.
        """
        try:
            return Repository.open(path)
        except StoreDamaged:
            return Repository(storage_of(path))

    def head(self) -> int:
        """The newest generation that can be read."""
        return self._newest()[0].generation

    def snapshot(self, generation: int | None = None) -> Snapshot:
        """Pin `generation`, or the newest.

        When the newest is damaged or missing, the last good one stands in, with a `StoreWarning`; `StoreDamaged` when
        none is good. `NotFound` for a generation that does not exist.
        """
        if generation is not None:
            return Snapshot(self.storage, load(self.storage, generation))
        manifest, expected = self._newest()
        if manifest.generation < expected:
            warnings.warn(
                f"generation {expected} of the store is damaged or missing; reading generation "
                f"{manifest.generation}, the last good one. Next: {files.REPAIR}",
                StoreWarning,
                stacklevel=2,
            )
        return Snapshot(self.storage, manifest, newest=expected)

    def pin(self, generation: int | None = None, tag: str | None = None) -> Snapshot:
        """A snapshot of a generation, of a tag or of the newest, with a lease: no collector removes what it reads.

        The lease lasts until the snapshot is closed or forgotten, or the process ends. In a store that this process
        may not write to, on a full disk, or on a file system without locks, the snapshot has no lease.
        """
        if tag is not None:
            generation = tagged(self.storage, tag).generation
        try:
            lease = self.storage.claim(files.LEASES, files.new_id())
        except (OSError, Incompatible):
            return self.snapshot(generation)
        try:
            while True:
                found = self.snapshot(generation)
                try:
                    lease.note({"generation": found.generation})
                except OSError:
                    lease.release()
                    return found
                # A collector lists the leases after it took a manifest away: it sees whoever still finds it here.
                if self.storage.exists(manifest_name(found.generation)):
                    return Snapshot(self.storage, found.manifest, newest=found.newest_generation, lease=lease)
        except BaseException:
            lease.release()
            raise

    def _newest(self) -> tuple[Manifest, int]:
        """The newest good manifest, and the generation that should have been the newest."""
        while True:
            hint = hinted(self.storage)  # before the listing, see `hinted`
            generations = listed(self.storage)
            found = self._last_good(generations)
            if found is not None:
                return found, max([hint, *generations])
            if listed(self.storage) == generations:
                raise StoreDamaged("no generation of the store can be read", next_step=files.RESTORE)

    def _last_good(self, generations: list[int]) -> Manifest | None:
        """The newest of the listed generations that is good; None when there is none, or the list is out of date."""
        for generation in reversed(generations):
            try:
                return load(self.storage, generation)
            except StoreDamaged:
                continue
            except NotFound:  # collected since it was listed, so that there are newer ones
                if listed(self.storage) != generations:
                    return None
        return None

    def generations(self) -> list[Generation]:
        """The store's history, oldest first; a damaged generation is left out with a `StoreWarning`."""
        return history(self.storage)

    def transaction(self, verb: str, *, repairs: bool = False) -> Transaction:
        """Begin to write; use it as a context manager. Only one that `repairs` may commit on a damaged head."""
        from isimed_index.store.transaction import Transaction

        return Transaction(self, verb, repairs=repairs)


def _make(storage: Storage) -> None:
    """Make the folders and documents of an empty store."""
    storage.prepare(_OURS)  # first: a store without one of them is damaged
    first = Manifest(0, None, files.new_id(), utc_now(), "create", next_row_id=0)
    form = {
        "format": "isimed-store",
        "format_version": FORMAT_VERSION,
        "features": [],
        "store": files.new_id(),
        "created": first.time,
    }
    with suppress(FileExistsError):  # left by a creation that was cut short
        storage.publish(manifest_name(0), first.to_bytes())
    try:
        storage.publish(files.FORMAT, seal(form))
    except FileExistsError:
        raise _there_already(storage) from None


def _committed(storage: Storage) -> bool:
    """Whether anything was committed there after generation 0, which creation writes."""
    return storage.exists(files.MANIFESTS) and max(listed(storage), default=0) > 0


def _there_already(storage: Storage) -> UsageError:
    return UsageError(f"{storage.name} is a store already", next_step="open it, or choose another path")


def _refuse_occupied(storage: Storage) -> None:
    try:
        names = storage.names("")
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UsageError(
            f"{storage.name} is a file, expected an empty folder", next_step="choose another path"
        ) from None
    occupied = any(name not in _OURS for name in names) or _committed(storage)
    # After the look inside: what another process has made there meanwhile is a store, not a folder in use.
    if storage.exists(files.FORMAT):
        raise _there_already(storage)
    if occupied:
        raise UsageError(f"{storage.name} is not empty", next_step="choose an empty folder or a new path")
