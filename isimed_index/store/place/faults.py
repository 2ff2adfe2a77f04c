"""What the operating system refuses while a store is read or written, as errors that say what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isimed_index.errors import IsimedError, StoreFull, StoreReadOnly, StoreUnreadable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_CONTENT = (  # what is said of the file itself: it is missing, no file, or its bytes are lost
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    *(errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ),
)


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
    if error.errno in _FULL:
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


@contextmanager
def numbered(folder: Path) -> Iterator[None]:
    """Give numpy's `OSError` of a write into `folder` that was cut short a number, while its file fills the disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        number = errno.ENOSPC if _no_room(folder) else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def spare(error: BaseException, name: str) -> None:
    """Raise `StoreUnreadable` when `error` says nothing of the content of the file `name`; else nothing happens.

    Too many open files, too little memory, no permission and a stale handle are no damage: to drop or replace a file
    for their sake would lose what is whole. Parsers raise an `OSError` without a number for what they cannot decode.
    """
    if isinstance(error, MemoryError):
        raise error
    if not isinstance(error, OSError) or isinstance(error, IsimedError):
        return
    if error.errno is not None and error.errno not in _CONTENT:
        raise StoreUnreadable(
            f"{name} could not be read ({os.strerror(error.errno)}), which says nothing about its content",
            next_step="see to its permissions, open files (ulimit -n), memory and mount, then run the command again",
        ) from None


def _no_room(root: Path) -> bool:
    state = os.statvfs(root)
    return state.f_bavail == 0 or (state.f_files > 0 and state.f_favail == 0)


def _below(name: object, root: Path) -> bool:
    return isinstance(name, str | os.PathLike) and root in (Path(name), *Path(name).parents)
