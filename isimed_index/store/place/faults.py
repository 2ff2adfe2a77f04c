"""What the operating system refuses while a store is written, as errors that say what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isimed_index.errors import IsimedError, StoreFull, StoreReadOnly

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def told(root: Path) -> Iterator[None]:
    """Raise `StoreFull` or `StoreReadOnly` in place of the `OSError` that it was; any other error passes."""
    try:
        yield
    except OSError as error:
        fault = fault_of(error, root)
        if fault is None:
            raise
        raise fault from error


def fault_of(error: BaseException | None, root: Path) -> IsimedError | None:
    """The error that stands for what the operating system said about the store at `root`; None for any other error."""
    if not isinstance(error, OSError) or isinstance(error, IsimedError):
        return None
    # numpy reports a write that was cut short without a number: then the file system is asked.
    if error.errno in _FULL or (error.errno is None and _no_room(root)):
        return StoreFull(
            f"there is no room left to write to {root.name}; nothing was committed that had not been before",
            next_step="free space on its file system, or isimed gc, then run the command again",
        )
    if error.errno in _READ_ONLY and _below(error.filename, root):
        return StoreReadOnly(
            f"{root.name} cannot be written to ({os.strerror(error.errno)})",
            next_step="make the folder writable for you, or copy the store to a place that is",
        )
    return None


def _no_room(root: Path) -> bool:
    state = os.statvfs(root)
    return state.f_bavail == 0 or (state.f_files > 0 and state.f_favail == 0)


def _below(name: object, root: Path) -> bool:
    return isinstance(name, str | os.PathLike) and root in (Path(name), *Path(name).parents)
