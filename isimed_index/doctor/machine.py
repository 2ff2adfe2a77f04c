"""Processors, threads, memory and open files of this process."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from isimed_index.doctor.probe import Probe, gibibytes, ok, warning
from isimed_index.limits import kernel_text, own_limits

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LEAST_FILES = 1024  # Dask's workers, DuckDB and mapped segments hold some hundred files open
_LEAST_MEMORY = 2 * 2**30  # bytes: torch and one whole volume


def probes() -> list[Probe]:
    """All probes of this module."""
    limits = own_limits()
    allowed = len(os.sched_getaffinity(0))
    return [
        cpus(os.cpu_count() or allowed, allowed, limits.cpus),
        threads(os.environ, allowed, limits.cpus),
        memory(kernel_text(Path("/proc/meminfo")), limits.memory_bytes),
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
