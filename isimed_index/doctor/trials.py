"""What a commit asks of a file system, tried out in a temporary folder.

publish   hard link, else exclusive lock and rename     hard_links, locks
durable   flush of files and folders                    fsync
hints     rename over a file                            rename
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Event, Thread

from isimed_index.doctor.probe import Probe, Status, failed, ok, warning
from isimed_index.store import files

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
FREE_SPACE = "free space on this file system"
_ELSEWHERE = "move the store to a local disk or a network file system with locks"
_FLUSHES = 5
_RENAMES = 100
_ANSWER_S = 10.0  # how long a second process may take to ask for a lock
_REFUSED = 3  # its exit code when it does not get the lock
_SECOND_PROCESS = f"""
import errno, fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as error:
    sys.exit({_REFUSED} if error.errno in (errno.EAGAIN, errno.EACCES) else error.strerror)
"""


def trials(room: Path | None) -> list[Probe]:
    """All probes of this module in the folder `room`; without one, each says that it was not made."""
    lock = _attempt("locks", locks, room)
    link = _attempt("hard_links", lambda folder: hard_links(folder, locked=lock.status is Status.OK), room)
    return [link, lock, _attempt("fsync", fsync, room), _attempt("rename", rename, room), _attempt("case", case, room)]


def _attempt(name: str, probe: Callable[[Path], Probe], room: Path | None) -> Probe:
    """Run a probe; the file system's refusal of something that every file system should do is a failure."""
    if room is None:
        return warning(name, "not probed: nothing can be written")
    try:
        return probe(room)
    except OSError as error:
        if error.errno in NO_ROOM:
            return failed(name, f"no room: {error.strerror}", FREE_SPACE)
        return failed(name, f"refused: {error.strerror or type(error).__name__}", _ELSEWHERE)


def hard_links(room: Path, *, locked: bool) -> Probe:
    """Whether a commit can be published by a hard link, which must refuse a name that is taken."""
    draft, target = room / "draft.json", room / "published.json"
    draft.touch()
    try:
        os.link(draft, target)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        if locked:
            return warning("hard_links", f"none ({error.strerror}); commits take an exclusive lock instead")
        return failed("hard_links", f"neither hard links ({error.strerror}) nor locks that hold", _ELSEWHERE)
    try:
        os.link(draft, target)
    except FileExistsError:
        return ok("hard_links", "yes")
    return failed("hard_links", "a link replaced a file that was there", _ELSEWHERE)


def locks(room: Path) -> Probe:
    """Whether a kernel lock keeps a second process out, and ends with the process that holds it."""
    from filelock import FileLock, Timeout

    path = room / "probe.lock"
    mend = f"mount it with locks, or {_ELSEWHERE}"
    lock = FileLock(path, timeout=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock falls back to a lock that is none, which the second process notices
        with lock:
            refused, trouble = _ask(path)
        if trouble:
            return failed("locks", trouble, mend)
        if not refused:
            return failed("locks", "a second process took a lock that was held", mend)
        if _ask(path)[0]:
            return failed("locks", "a lock that was released stayed held", mend)
        try:
            with lock:
                return ok("locks", "yes, a second process is refused")
        except Timeout:
            return failed("locks", "a lock outlived its process", mend)


def _ask(path: Path) -> tuple[bool, str]:
    """Let a second process take the lock and end with it: whether it was refused, and what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SECOND_PROCESS, str(path)],
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer to a request for a lock within {_ANSWER_S:g} s"
    if done.returncode not in (0, _REFUSED):
        return False, done.stderr.strip().rpartition("\n")[2] or f"a second process ended with {done.returncode}"
    return done.returncode == _REFUSED, ""


def fsync(room: Path) -> Probe:
    """Whether files and folders can be flushed to the disk, and how long it takes (median, milliseconds)."""
    taken_ms = []
    for number in range(_FLUSHES):
        path = room / f"flush-{number}"
        begin = time.perf_counter()
        files.write_durably(path, b"0123456789abcdef" * 256)
        files.sync_file(room)
        taken_ms.append(1000 * (time.perf_counter() - begin))
    return ok("fsync", f"yes, {median(taken_ms):.1f} ms for a small file and its folder")


def rename(room: Path) -> Probe:
    """Whether a file renamed over another is seen at every moment, by a thread that keeps looking."""
    target = room / "hint.json"
    target.touch()
    done, missed = Event(), Event()

    def look() -> None:
        while not done.is_set():
            try:
                target.stat()
            except OSError:
                missed.set()

    reader = Thread(target=look, daemon=True)
    reader.start()
    try:
        for number in range(_RENAMES):
            draft = room / f"hint-{number}.draft"
            draft.touch()
            draft.replace(target)
    finally:
        done.set()
        reader.join()
    if missed.is_set():
        return failed("rename", "the name was gone for a moment", _ELSEWHERE)
    return ok("rename", "atomic over a file that is there")


def case(room: Path) -> Probe:
    """Whether names that differ in case only are two files."""
    (room / "Case").touch()
    if not (room / "case").exists():
        return ok("case", "sensitive")
    return warning("case", "insensitive", "do not write results for scans whose names differ in case only here")
