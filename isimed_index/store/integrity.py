"""What is read is checked: size on every use, hash on the first use in a process.

Artefacts never change once they are committed, so one good hash holds for the life of the process; a size costs a
`stat`. Damage that strikes a file after it was hashed, without changing its size, is found by the next process.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from isimed_index.errors import StoreDamaged, StoreUnreadable
from isimed_index.store.files import DERIVED, REPAIR, tree_digest, tree_size
from isimed_index.store.manifest import Artefact
from isimed_index.store.place.faults import spare
from isimed_index.store.place.storage import Storage


def verify(storage: Storage, artefact: Artefact) -> Path:
    """The artefact's place on disk, or `StoreDamaged` when it is missing or does not match its manifest entry."""
    try:
        return _verified(storage, artefact)
    except StoreDamaged:
        if not storage.forget(artefact.path):
            raise
    _verify_hash.cache_clear()
    return _verified(storage, artefact)  # the damage may have been in a copy alone: this is another one


def _verified(storage: Storage, artefact: Artefact) -> Path:
    path = check_size(storage, artefact)
    _verify_hash(path, artefact.path, artefact.kind, artefact.bytes, artefact.files, artefact.sha256)
    return path


def check_size(storage: Storage, artefact: Artefact) -> Path:
    """The artefact's place on disk, or `StoreDamaged` when it is missing or has another size; it is not read."""
    try:
        path = storage.fetch(artefact.path)
        size = tree_size(path)
    except StoreUnreadable:
        raise
    except FileNotFoundError:
        raise _damaged(artefact, "is missing") from None
    except OSError as error:
        raise _unread(artefact, error) from None
    if not path.exists():
        raise _damaged(artefact, "is missing")
    _compare(artefact, size)
    return path


def check_there(storage: Storage, artefact: Artefact) -> None:
    """`StoreDamaged` when an artefact is missing from the store or has another size there; nothing is fetched."""
    try:
        size = storage.size(artefact.path)
    except StoreUnreadable:
        raise
    except FileNotFoundError:
        raise _damaged(artefact, "is missing") from None
    except OSError as error:
        raise _unread(artefact, error) from None
    _compare(artefact, size)


def _compare(artefact: Artefact, size: tuple[int, int]) -> None:
    if size != (artefact.bytes, artefact.files):
        raise _damaged(
            artefact,
            f"holds {size[0]} bytes in {size[1]} files, expected {artefact.bytes} bytes in {artefact.files} files",
        )


@lru_cache(maxsize=1 << 17)  # remembers success only: a failure raises, and is tried again
def _verify_hash(path: Path, relative: str, kind: str, size: int, count: int, sha256: str) -> None:
    check_hash(path, Artefact(kind, relative, size, count, sha256))


def check_hash(path: Path, artefact: Artefact) -> None:
    """Read the artefact whole, whatever was read before; `StoreDamaged` when it does not match its hash."""
    try:
        digest = tree_digest(path)
    except OSError as error:
        raise _unread(artefact, error) from None
    if digest.sha256 != artefact.sha256:
        raise _damaged(artefact, "does not match its hash")


def _unread(artefact: Artefact, error: OSError) -> StoreDamaged:
    """The damage that an error tells of; `StoreUnreadable` is raised when it does not."""
    spare(error, f"the {artefact.kind} {artefact.name}")
    return _damaged(artefact, f"cannot be read ({error.strerror})")


def _damaged(artefact: Artefact, what: str) -> StoreDamaged:
    step = "isimed index" if artefact.kind in DERIVED else REPAIR
    return StoreDamaged(f"the {artefact.kind} {artefact.name} {what}", next_step=step)
