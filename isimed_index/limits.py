"""What the control groups of this process allow it of its machine, and how many cores that leaves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups of this process allow it; None where they set no limit."""

    cpus: float | None
    memory_bytes: int | None


def cores() -> int:
    """How many cores this process may use: those it may run on, or its share of processor time, rounded up, if less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = own_limits().cpus
    return allowed if share is None else max(1, min(allowed, math.ceil(share)))


def own_limits() -> Limits:
    """The limits of this process; none on systems without control groups."""
    return cgroup_limits(Path("/sys/fs/cgroup"), kernel_text(Path("/proc/self/cgroup")))


def cgroup_limits(root: Path, membership: str) -> Limits:
    """The tightest limits on the way from the process's control groups to the top, of versions 1 and 2.

    `root` is where the control groups are mounted, `membership` the text of `/proc/self/cgroup`.
    """
    shares: list[float] = []
    sizes: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for text in _up(root, path, "cpu.max"):
                shares += _share(*text.split()[:2])
            sizes += [int(text) for text in _up(root, path, "memory.max") if text.isdecimal()]
        if "cpu" in controllers.split(","):
            quotas, periods = (_up(root / "cpu", path, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            for quota, period in zip(quotas, periods, strict=False):
                shares += _share(quota, period)
        if "memory" in controllers.split(","):
            sizes += [int(text) for text in _up(root / "memory", path, "memory.limit_in_bytes")]
    return Limits(min(shares, default=None), min(sizes, default=None))


def _up(top: Path, path: str, name: str) -> Iterator[str]:
    """The texts of the files called `name` from the control group at `path` up to `top`, where they can be read."""
    inner = PurePosixPath(path.strip("/"))
    for folder in (inner, *inner.parents):
        if text := kernel_text(top / folder / name):
            yield text


def _share(quota: str, period: str = "") -> list[float]:
    """Processors' worth of time; nothing when the quota is `max` or -1, or what is read is no quota."""
    return [int(quota) / int(period)] if quota.isdecimal() and period.isdecimal() and int(period) else []


def kernel_text(path: Path) -> str:
    """The text of a file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
