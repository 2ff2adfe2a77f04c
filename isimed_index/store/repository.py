"""A store directory: create it, open it, pin a generation of it, begin a transaction on it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from isimed_index.contracts import FORMAT_VERSION, check_version
from isimed_index.errors import StoreDamaged, StoreNotFound, StoreWarning, UsageError
from isimed_index.store import files
from isimed_index.store.manifest import (
    Generation,
    Manifest,
    hinted,
    history,
    listed,
    load,
    manifest_path,
    seal,
    unseal,
    utc_now,
)
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    from isimed_index.store.transaction import Transaction


class Repository:
    """A store directory; holds no file open and no lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path) -> Repository:
        """Make an empty store at `path`, a folder that is empty or does not exist; `UsageError` otherwise.

        `FORMAT.json` appears last: a folder without it is no store, and creating there again completes it. Of several
        processes that create at once, one succeeds; to the others it is a store already, which they can open.
        """
        path = path.absolute()
        _refuse_occupied(path)
        folders = [*files.FOLDERS.values(), files.MANIFESTS, files.INTENTS, files.TMP]
        for folder in folders:
            (path / folder).mkdir(parents=True, exist_ok=True)
        first = Manifest(0, None, files.new_id(), utc_now(), "create", next_row_id=0)
        form = {
            "format": "isimed-store",
            "format_version": FORMAT_VERSION,
            "features": [],
            "store": files.new_id(),
            "created": first.time,
        }
        with suppress(FileExistsError):  # left by a creation that was cut short
            files.publish(path, manifest_path(path, 0), first.to_bytes())
        try:
            files.publish(path, path / files.FORMAT, seal(form))
        except FileExistsError:
            raise UsageError(f"{path.name} is a store already", next_step="open it, or choose another path") from None
        files.sync_file(path.parent)
        return Repository(path)

    @staticmethod
    def open(path: Path) -> Repository:
        """The store at `path`; `StoreNotFound`, `StoreDamaged` or `Incompatible` when it cannot be read.

        Opening reads `FORMAT.json` only; `snapshot` verifies the manifest. A folder in which a creation was cut short,
        or is still under way, is no store yet.
        """
        path = path.absolute()
        committed = _committed(path)  # before FORMAT.json is looked for, which a new store has earlier
        try:
            content = (path / files.FORMAT).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if committed:
                raise StoreDamaged(f"{files.FORMAT} is missing", next_step=files.RESTORE) from None
            raise StoreNotFound(f"there is no store at {path.name}", next_step="isimed add -s STORE PATH…") from None
        except OSError as error:
            raise StoreDamaged(f"{files.FORMAT} cannot be read ({error.strerror})", next_step=files.RESTORE) from None
        check_version(unseal(content, files.FORMAT))
        return Repository(path)

    def head(self) -> int:
        """The newest generation that can be read."""
        return self._newest()[0].generation

    def snapshot(self, generation: int | None = None) -> Snapshot:
        """Pin `generation`, or the newest.

        When the newest is damaged or missing, the last good one stands in, with a `StoreWarning`; `StoreDamaged` when
        none is good. `NotFound` for a generation that does not exist.
        """
        if generation is not None:
            return Snapshot(self.path, load(self.path, generation))
        manifest, expected = self._newest()
        behind = manifest.generation < expected
        if behind:
            warnings.warn(
                f"generation {expected} of the store is damaged or missing; reading generation "
                f"{manifest.generation}, the last good one. Next: {files.RESTORE}",
                StoreWarning,
                stacklevel=2,
            )
        return Snapshot(self.path, manifest, behind=behind)

    def _newest(self) -> tuple[Manifest, int]:
        """The newest good manifest, and the generation that should have been the newest."""
        hint = hinted(self.path)  # before the listing, see `hinted`
        generations = listed(self.path)
        expected = max([hint, *generations])
        for generation in reversed(generations):
            try:
                return load(self.path, generation), expected
            except StoreDamaged:
                continue
        raise StoreDamaged("no generation of the store can be read", next_step=files.RESTORE)

    def generations(self) -> list[Generation]:
        """The store's history, oldest first; a damaged generation is left out with a `StoreWarning`."""
        return history(self.path)

    def transaction(self, verb: str) -> Transaction:
        """Begin to write; use it as a context manager."""
        from isimed_index.store.transaction import Transaction

        return Transaction(self, verb)


def _committed(path: Path) -> bool:
    """Whether anything was committed there after generation 0, which creation writes."""
    return (path / files.MANIFESTS).is_dir() and max(listed(path), default=0) > 0


def _refuse_occupied(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path.name} is a file, expected an empty folder", next_step="choose another path")
    ours = {*files.FOLDERS.values(), files.MANIFESTS, files.INTENTS, files.TMP}
    known = {path / name for name in ours}
    occupied = path.exists() and (any(entry not in known for entry in path.iterdir()) or _committed(path))
    # After the look inside: what another process has made there meanwhile is a store, not a folder in use.
    if (path / files.FORMAT).exists():
        raise UsageError(f"{path.name} is a store already", next_step="open it, or choose another path")
    if occupied:
        raise UsageError(f"{path.name} is not empty", next_step="choose an empty folder or a new path")
