"""What is read is checked: size on every use, hash on the first use in a process.

Artefacts never change once they are committed, so one good hash holds for the life of the process; a size costs a
`stat`. Damage that strikes a file after it was hashed, without changing its size, is found by the next process.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from isimed_index.errors import StoreDamaged
from isimed_index.store.files import RESTORE, tree_digest, tree_size
from isimed_index.store.manifest import Artefact


def verify(root: Path, artefact: Artefact) -> Path:
    """The artefact's place on disk, or `StoreDamaged` when it is missing or does not match its manifest entry."""
    path = root / artefact.path
    try:
        size = tree_size(path)
    except OSError as error:
        raise _damaged(artefact, f"cannot be read ({error.strerror})") from None
    if not path.exists():
        raise _damaged(artefact, "is missing")
    if size != (artefact.bytes, artefact.files):
        raise _damaged(
            artefact,
            f"holds {size[0]} bytes in {size[1]} files, expected {artefact.bytes} bytes in {artefact.files} files",
        )
    _verify_hash(root, artefact.path, artefact.kind, artefact.bytes, artefact.files, artefact.sha256)
    return path


@lru_cache(maxsize=1 << 17)  # remembers success only: a failure raises, and is tried again
def _verify_hash(root: Path, relative: str, kind: str, size: int, count: int, sha256: str) -> None:
    artefact = Artefact(kind, relative, size, count, sha256)
    try:
        digest = tree_digest(root / relative)
    except OSError as error:
        raise _damaged(artefact, f"cannot be read ({error.strerror})") from None
    if digest.sha256 != sha256:
        raise _damaged(artefact, "does not match its hash")


def _damaged(artefact: Artefact, what: str) -> StoreDamaged:
    step = "isimed index" if artefact.kind in ("frame", "index") else RESTORE  # what can be derived again
    return StoreDamaged(f"the {artefact.kind} {Path(artefact.path).name} {what}", next_step=step)
