"""Where a store lies or would lie: its file system, the right to write there, room, and the clock."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from isimed_index.doctor.probe import Probe, failed, gibibytes, ok, warning
from isimed_index.doctor.trials import FREE_SPACE, NO_ROOM, trials
from isimed_index.errors import IsimedError, UsageError
from isimed_index.store import files
from isimed_index.store.manifest import unseal

_SKEW_S = 60.0
# Pattern of a type in /proc/mounts → what it means for a store, and what to do.
_KINDS = {
    r"nfs\d?": ("a network file system: locks and clocks are another machine's", "keep one writer at a time on NFS 3"),
    r"cifs|smb\d?|smbfs": ("a Windows share: slow for many small files", "keep the store on a local disk or NFS 4"),
    r"fuse\..*|fuse|fuseblk": (
        "runs in user space: links, locks and flushes are as good as its program",
        "heed hard_links, locks and fsync below",
    ),
    r"overlay|aufs": ("a container's layer: gone with the container", "mount a volume for the store"),
    r"tmpfs|ramfs": ("lies in memory: does not outlive a reboot", "move the store to a disk before you rely on it"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store lies or would lie."""

    folder: Path  # the store, or the nearest parent that exists
    store: bool  # whether there is a store already


def locate(path: Path) -> Place:
    """The place of the store at `path`; `UsageError` when a file is in its way."""
    path = path.absolute()
    for folder in (path, *path.parents):
        if _is(folder, Path.is_dir):
            resolved = folder.resolve()
            return Place(resolved, folder == path and _is(path / files.FORMAT, Path.is_file))
        if _is(folder, Path.exists):
            break
    raise UsageError(f"{folder.name} is a file, expected a folder", next_step="isimed doctor --store DIR")


def _is(path: Path, question: Callable[[Path], bool]) -> bool:
    """The answer to a question about a path, no where the right to ask is missing."""
    try:
        return question(path)
    except OSError:
        return False


def probes(place: Place) -> list[Probe]:
    """All probes of this module."""
    with scratch(place) as (room, refusal):
        tried = trials(room)
        skew_s = None if room is None else _skew(room)
    return [
        file_system(place.folder, _mounts()),
        writable(place, refusal),
        *tried,
        free_space(place.folder),
        inodes(place.folder),
        clock(skew_s, _head_time(place) if place.store else None, time.time()),
    ]


@contextmanager
def scratch(place: Place) -> Iterator[tuple[Path | None, OSError | None]]:
    """A fresh folder on the file system of `place`, removed on leaving, and why it is not in the place itself.

    In `tmp/` of a store, else in the place, else in the nearest parent on the same file system that can be written;
    no folder at all when none can.
    """
    device = place.folder.stat().st_dev
    parents = [parent for parent in place.folder.parents if _is(parent, lambda path: path.stat().st_dev == device)]
    inner = place.folder / files.TMP
    refusal = None
    room = None
    for folder in [*([inner] if place.store and _is(inner, Path.is_dir) else []), place.folder, *parents]:
        try:
            room = Path(tempfile.mkdtemp(prefix="isimed-doctor-", dir=folder))
            break
        except OSError as error:
            refusal = refusal or error
    try:
        yield room, refusal
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)


def writable(place: Place, refusal: OSError | None) -> Probe:
    """Whether a store can be written, or made, in this place."""
    if refusal is None:
        return ok("writable", "yes, the store" if place.store else "yes, there is no store yet")
    if refusal.errno in NO_ROOM:
        return failed("writable", f"no room: {refusal.strerror}", FREE_SPACE)
    try:
        next(place.folder.iterdir(), None)
    except OSError:
        return failed("writable", "neither readable nor writable", "ask for the right to read and write here")
    found = f"readable, not writable: {refusal.strerror}"
    if place.store:
        return warning("writable", found, "nothing to query it; to add to it, ask for the right to write here")
    return failed("writable", found, "choose a folder that you can write to")


def free_space(folder: Path) -> Probe:
    """Bytes left for this user."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return warning("free_space", f"unknown: {error.strerror}")
    found = f"{gibibytes(usage.free)} of {gibibytes(usage.total)}"
    if usage.free < 100 * 2**20:
        return failed("free_space", found, FREE_SPACE)
    if usage.free < 10 * 2**30 or usage.free < usage.total / 100:
        return warning("free_space", found, FREE_SPACE)
    return ok("free_space", found)


def inodes(folder: Path) -> Probe:
    """Files that can still be made; a scan takes some ten."""
    try:
        counts = os.statvfs(folder)
    except OSError as error:
        return warning("inodes", f"unknown: {error.strerror}")
    if counts.f_files == 0:
        return ok("inodes", "not counted by this file system")
    found = f"{counts.f_favail} of {counts.f_files}"
    mend = "remove small files from this file system"
    if counts.f_favail < 100:
        return failed("inodes", found, mend)
    if counts.f_favail < 10_000 or counts.f_favail < counts.f_files / 100:
        return warning("inodes", found, mend)
    return ok("inodes", found)


def clock(skew_s: float | None, head_s: float | None, now_s: float) -> Probe:
    """This machine's clock against the file system's and against the newest commit's.

    `skew_s`: time stamp of a new file less the time here, None when no file could be made; `head_s`: when the newest
    generation was committed, and `now_s`, both seconds since 1970.
    """
    mend = "set the clock of this machine (timedatectl status)"
    if head_s is not None and head_s > now_s:
        return warning("clock", f"clock set back: the newest commit is {head_s - now_s:.0f} s ahead of it", mend)
    if skew_s is None:
        return ok("clock", "not behind the newest commit" if head_s is not None else "not compared with a file's time")
    if abs(skew_s) > _SKEW_S:
        return warning("clock", f"the file system's clock differs by {skew_s:+.0f} s", mend)
    return ok("clock", "agrees with the file system's")


def _skew(room: Path) -> float | None:
    """Seconds by which the file system's clock is ahead of ours; None when no file can be made."""
    try:
        path = room / "time"
        path.touch()
        return path.stat().st_mtime - time.time()
    except OSError:
        return None


def _head_time(place: Place) -> float | None:
    """When the newest manifest was written, in seconds since 1970; None when it cannot be read."""
    try:
        newest = max((place.folder / files.MANIFESTS).glob("*.json"))
        return datetime.fromisoformat(unseal(newest.read_bytes(), newest.name)["time"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError, IsimedError):
        return None


def file_system(folder: Path, mounts: str) -> Probe:
    """The kind of the file system that `folder` (resolved) is on, by the text of `/proc/mounts`."""
    kind = _kind(folder, mounts)
    for pattern, (meaning, mend) in _KINDS.items():
        if re.fullmatch(pattern, kind):
            return warning("file_system", f"{kind} {meaning}", mend)
    return ok("file_system", kind or "unknown")


def _kind(folder: Path, mounts: str) -> str:
    """The type of the innermost mount above `folder`; of several at one point the last, which covers the others."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, name, *_ = line.split(" ")
        where = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        depth = len(where.parts)
        if depth >= best and folder.is_relative_to(where):
            best, kind = depth, name
    return kind


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
