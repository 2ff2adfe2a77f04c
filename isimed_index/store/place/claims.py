"""Claims: who writes or reads right now, seen by others, and gone at the latest when the process is.

    <folder>/<name>.lock     held by a kernel lock (`flock`)
    <folder>/<name>.jsonl    what the claim is about, one note a line, written before it becomes true

An intent is a writer's claim to what it stages; a lease is a reader's claim to the generation that it has pinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from isimed_index.store.manifest import canonical
from isimed_index.store.place import locks

_LOCK, _NOTES = ".lock", ".jsonl"
_PATIENCE_S = 10.0


class Claim(Protocol):
    """A claim that is held until `release`, or until the process ends."""

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a note that others can read."""

    def release(self) -> None:
        """End the claim; a second call does nothing."""


class LocalClaim:
    """A claim by kernel lock in a folder of a local file system."""

    def __init__(self, lock: FileLock, notes: Path) -> None:
        self._lock = lock
        self._notes = notes

    @classmethod
    def take(cls, folder: Path, name: str) -> LocalClaim:
        """Take the claim `name`, which nobody else may hold."""
        # Who looks whether it is held, holds it for a moment.
        return cls(locks.take(folder / f"{name}{_LOCK}", _PATIENCE_S), folder / f"{name}{_NOTES}")

    def note(self, entry: Mapping[str, Any]) -> None:
        """Append a line of JSON."""
        with self._notes.open("ab") as stream:
            stream.write(canonical(entry) + b"\n")

    def release(self) -> None:
        """Remove the files and drop the lock."""
        if not self._lock.is_locked:
            return
        # The notes go first: a lock without notes claims nothing, notes without a lock are a dead writer's.
        with suppress(OSError):
            self._notes.unlink(missing_ok=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    @staticmethod
    def listed(folder: Path) -> list[tuple[str, bytes, bool]]:
        """Every claim in a folder: its name, its notes, and whether its process lives."""
        found = []
        for name in _names(folder):
            with locks.unowned(folder / f"{name}{_LOCK}") as dead:
                alive = not dead
            try:
                notes = (folder / f"{name}{_NOTES}").read_bytes()
            except FileNotFoundError:
                notes = b""
            if alive or notes or (folder / f"{name}{_LOCK}").exists():
                found.append((name, notes, alive))
        return found

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the claims of dead processes; one that is just being taken is not harmed."""
        for name in _names(folder):
            lock = folder / f"{name}{_LOCK}"
            with locks.unowned(lock) as dead:
                if dead:
                    (folder / f"{name}{_NOTES}").unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted({path.stem for path in folder.iterdir() if path.suffix in (_LOCK, _NOTES)})
