"""Kernel locks on files: held by one process at a time, and gone at the latest when it is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from isimed_index.errors import Incompatible

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def take(path: Path, timeout_s: float = -1) -> FileLock:
    """Lock a file, which is made; `Timeout` when another holds it that long, `Incompatible` where nothing can lock."""
    # The soft lock that filelock would fall back to is a file that outlives its process: everything would seem held.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise Incompatible(
            f"the file system of {path.parent.parent.name} has no locks, so no commit would be safe there",
            next_step="move the store to another file system; isimed doctor tells which will do",
        ) from error
    return lock


@contextmanager
def unowned(path: Path) -> Iterator[bool]:
    """Whether no process holds the lock on a file, which is not made; if so, none can take it within the block."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False  # it cannot be told, and who may live is respected
        return
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
