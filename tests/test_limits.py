"""Limits of control groups are found on the way up, in both versions, and bound the cores that are used."""

from __future__ import annotations

from pathlib import Path

import pytest
from dask.system import cpu_count

from isimed_index import limits
from isimed_index.limits import Limits, cgroup_limits, cores

GIB = 2**30


def test_limits_of_control_groups(tmp_path: Path):
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    assert cgroup_limits(tmp_path, "0::/pod/job") == Limits(None, None)
    write("pod/job/cpu.max", "max 100000")
    write("pod/job/memory.max", "max")
    assert cgroup_limits(tmp_path, "0::/pod/job") == Limits(None, None)
    write("pod/cpu.max", "150000 100000")
    write("pod/memory.max", str(GIB))
    assert cgroup_limits(tmp_path, "0::/pod/job") == Limits(1.5, GIB)
    assert cgroup_limits(tmp_path, "0::/other") == Limits(None, None)


def test_limits_of_control_groups_of_version_1(tmp_path: Path):
    for path, text in {
        "cpu/job/cpu.cfs_quota_us": "50000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/job/memory.limit_in_bytes": str(GIB),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    groups = "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/job\n0::/"
    assert cgroup_limits(tmp_path, groups) == Limits(0.5, GIB)


@pytest.mark.parametrize("text", ["", "max", "50000", "50000 0", "0x10 100000", "a b c"])
def test_what_is_no_quota_limits_nothing(tmp_path: Path, text: str):
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup_limits(tmp_path, "0::/") == Limits(None, None)


@pytest.mark.parametrize(
    ("allowed", "share", "expected"), [(8, None, 8), (8, 2.5, 3), (2, 6.0, 2), (4, 0.1, 1), (4, 4.0, 4)]
)
def test_cores_are_those_allowed_or_a_share_of_time(
    monkeypatch: pytest.MonkeyPatch, allowed: int, share: float | None, expected: int
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(limits, "own_limits", lambda: Limits(share, None))
    assert cores() == expected


def test_cores_are_no_more_than_dask_finds():
    """Dask looks at the innermost control group alone."""
    assert 1 <= cores() <= cpu_count()
