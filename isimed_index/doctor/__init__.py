"""What works on this machine and on the file system that a store lies on, probe by probe, and how to mend the rest.

    software  python, packages, the FAISS wheel, accelerators   importlib.metadata only: what is broken is not imported
    place     file system, right to write, room, clock
    trials    links, locks, flushes, renames                    in a temporary folder that is removed again
    machine   processors, threads, memory, open files

Nothing that belongs to a store is written; of a store only the time of its newest manifest is read.
"""

from __future__ import annotations

from pathlib import Path

from isimed_index.doctor import machine, place, software
from isimed_index.doctor.probe import Probe, Status

__all__ = ["Probe", "Status", "examine"]


def examine(path: Path) -> list[Probe]:
    """Probe this machine and the place of the store at `path`, which need not exist yet.

    Always the same probes in the same order; what cannot be probed says so. `UsageError` when `path` or one of its
    parents is a file.
    """
    here = place.locate(path)  # first, because it refuses a path that cannot hold a store
    return [*software.probes(), *place.probes(here), *machine.probes()]
