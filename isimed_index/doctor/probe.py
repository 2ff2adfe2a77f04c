"""What one probe found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a probe ended; `WARNING` means that work goes on, slower or with care."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe's outcome; base names only, no full paths."""

    name: str  # stable, for programs to look for
    status: Status
    found: str
    next_step: str = ""  # how to mend it; empty when nothing needs doing


def ok(name: str, found: str) -> Probe:
    """All is well."""
    return Probe(name, Status.OK, found)


def warning(name: str, found: str, next_step: str = "") -> Probe:
    """It works, with care."""
    return Probe(name, Status.WARNING, found, next_step)


def failed(name: str, found: str, next_step: str) -> Probe:
    """It does not work."""
    return Probe(name, Status.FAILED, found, next_step)


def gibibytes(size: float) -> str:
    """A size as a person reads it: MiB below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
