"""Processors, threads, memory and open files of this process."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isimed_index.doctor.probe import Probe, gibibytes, ok, warning

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LEAST_FILES = 1024  # Dask's workers, DuckDB and mapped segments hold some hundred files open
_LEAST_MEMORY = 2 * 2**30  # bytes: torch and one whole volume


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups of this process allow it; None where they set no limit."""

    cpus: float | None
    memory_bytes: int | None


def probes() -> list[Probe]:
    """All probes of this module."""
    limits = cgroup_limits(Path("/sys/fs/cgroup"), _text(Path("/proc/self/cgroup")))
    allowed = len(os.sched_getaffinity(0))
    return [
        cpus(os.cpu_count() or allowed, allowed, limits.cpus),
        threads(os.environ, allowed, limits.cpus),
        memory(_text(Path("/proc/meminfo")), limits.memory_bytes),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


def cpus(count: int, allowed: int, quota: float | None) -> Probe:
    """Processors of the machine, those that this process may run on, and its share of their time."""
    share = "no quota" if quota is None else f"quota {quota:g}"
    return ok("cpus", f"{count}, {allowed} allowed, {share}")


def threads(environment: Mapping[str, str], allowed: int, quota: float | None) -> Probe:
    """Whether numerical libraries start as many threads as there are processors for them."""
    values = {name: environment.get(name, "") for name in THREAD_VARIABLES}
    found = ", ".join(f"{name}={value}" if value else f"{name} unset" for name, value in values.items())
    usable = allowed if quota is None else max(1, min(allowed, int(quota)))
    mend = f"set {' '.join(f'{name}={usable}' for name in THREAD_VARIABLES)}"
    for name, value in values.items():
        if value and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value.strip()):
            return warning("threads", f"{found}: {name} is not a number of threads", mend)
        if value and int(value.split(",")[0]) > usable:
            return warning("threads", f"{found}: more threads than the {usable} usable processors", mend)
    if usable < allowed and not all(values.values()):
        return warning("threads", f"{found}: libraries start {allowed} threads where the quota is {usable}", mend)
    return ok("threads", found)


def memory(meminfo: str, limit_bytes: int | None) -> Probe:
    """Memory of the machine and what is left of it, from `/proc/meminfo`, and the limit of this process."""
    kibibytes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    total, left = (kibibytes.get(name, 0) * 1024 for name in ("MemTotal", "MemAvailable"))
    if not total or not left:
        return ok("memory", "unknown")
    found = f"{gibibytes(total)}, {gibibytes(left)} available"
    if limit_bytes is not None and limit_bytes < total:
        found, left = f"{found}, limit {gibibytes(limit_bytes)}", min(left, limit_bytes)
    if left < _LEAST_MEMORY:
        return warning("memory", found, "close other programs, and give isimed index a --max-ram")
    return ok("memory", found)


def open_files(soft: int, hard: int) -> Probe:
    """How many files this process may hold open."""
    if soft == resource.RLIM_INFINITY:
        return ok("open_files", "no limit")
    if soft >= _LEAST_FILES:
        return ok("open_files", str(soft))
    reach = "" if hard == resource.RLIM_INFINITY or hard >= _LEAST_FILES else f" (the administrator's limit is {hard})"
    return warning("open_files", f"{soft}, expected {_LEAST_FILES} or more", f"ulimit -n {_LEAST_FILES}{reach}")


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
                shares += _share(*text.split())
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
        if text := _text(top / folder / name):
            yield text


def _share(quota: str, period: str) -> list[float]:
    """Processors' worth of time; nothing when the quota is `max` or -1."""
    return [int(quota) / int(period)] if quota.isdecimal() and period.isdecimal() else []


def _text(path: Path) -> str:
    """The text of a file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
