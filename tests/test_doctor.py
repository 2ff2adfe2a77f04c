"""What each probe says of a machine or file system that will do, and of one that was broken on purpose.

What a test may mount (a full or a read-only file system) is real, in a mount namespace of its own; what no file system
at hand does (no hard links, locks that do not hold) is put in place of the system call.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import isimed_index
from isimed_index.doctor import Probe, examine, machine, place, software, trials
from isimed_index.errors import UsageError
from isimed_index.store.manifest import Manifest

NAMES = [
    *("python", "torch", "monai", "zarr", "dask", "duckdb", "pyarrow", "numpy", "faiss", "accelerators", "torch_build"),
    *("file_system", "writable", "hard_links", "locks", "fsync", "rename", "case", "free_space", "inodes", "clock"),
    *("cpus", "threads", "memory", "open_files"),
]
TRIED = ("hard_links", "locks", "fsync", "rename", "case")
GIB = 2**30


def refuse(number: int) -> Any:
    """A system call that fails with the error `number`."""

    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def named(probes: list[Probe]) -> dict[str, Probe]:
    """Probes by name."""
    return {probe.name: probe for probe in probes}


class TestExamine:
    def test_a_folder_without_a_store_is_left_as_it_was(self, tmp_path: Path):
        probes = named(examine(tmp_path / "deep" / "cohort.isimed"))
        assert list(probes) == NAMES
        assert list(tmp_path.iterdir()) == []
        assert [probes[name].status for name in ("writable", *TRIED)] == ["ok"] * 6
        assert probes["writable"].found == "yes, there is no store yet"
        assert all(probe.next_step for probe in probes.values() if probe.status == "failed")

    def test_a_store_keeps_every_file_as_it_was(self, tmp_path: Path):
        root = tmp_path / "cohort.isimed"
        isimed_index.create(root)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.name != "tmp"}
        probes = named(examine(root))
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.name != "tmp"} == before
        assert probes["writable"].found == "yes, the store"
        assert probes["clock"].status == "ok"

    def test_probes_of_a_store_work_in_its_tmp(self, tmp_path: Path):
        root = tmp_path / "cohort.isimed"
        isimed_index.create(root)
        with place.scratch(place.locate(root)) as (room, refusal):
            assert room is not None
            assert (room.parent, refusal) == (root / "tmp", None)
            (room / "left").write_text("over")
        assert not room.exists()

    def test_the_folder_goes_when_a_probe_breaks(self, tmp_path: Path):
        with pytest.raises(KeyboardInterrupt), place.scratch(place.locate(tmp_path)):
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("inner", ["", "cohort.isimed"])
    def test_a_file_in_the_way_is_refused(self, tmp_path: Path, inner: str):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(UsageError, match=r"^notes\.txt is a file"):
            examine(tmp_path / "notes.txt" / inner)


MOUNT = "import subprocess; subprocess.run(['mount', '-t', 'tmpfs', *{options!r}, 'none', {folder!r}], check=True)"


def on_mount(folder: Path, options: str, prepare: str) -> dict[str, dict[str, str]]:
    """Probes of `folder` with a tmpfs mounted there and `prepare` done to it, in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    mount = MOUNT.format(options=["-o", options], folder=str(folder))
    if unshare is None or subprocess.run([unshare, "-rm", sys.executable, "-c", mount], check=False).returncode:
        pytest.skip("no right to mount")
    code = (
        f"{mount}\nfrom pathlib import Path\nfolder = Path({str(folder)!r})\n{prepare}\n"
        "import dataclasses, json\nfrom isimed_index.doctor import examine\n"
        "probes = [dataclasses.asdict(probe) for probe in examine(folder / 'cohort.isimed')]\n"
        "left = [path.name for path in folder.rglob('isimed-doctor-*')]\n"
        "print(json.dumps({'left': left, **{probe['name']: probe for probe in probes}}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [unshare, "-rm", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    probes: dict[str, Any] = json.loads(done.stdout)
    assert probes.pop("left") == []
    assert list(probes) == NAMES
    return probes


READ_ONLY = "subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)"


class TestMounted:
    def test_a_store_that_is_mounted_read_only(self, tmp_path: Path):
        make = "import isimed_index; isimed_index.create(folder / 'cohort.isimed')"
        probes = on_mount(tmp_path, "size=20m", f"{make}\n{READ_ONLY}")
        assert probes["writable"]["status"] == "warning"
        assert probes["writable"]["found"] == "readable, not writable: Read-only file system"
        assert {probes[name]["found"] for name in TRIED} == {"not probed: nothing can be written"}
        assert probes["clock"]["found"] == "not behind the newest commit"

    def test_a_read_only_folder_without_a_store_cannot_get_one(self, tmp_path: Path):
        probes = on_mount(tmp_path, "size=20m", READ_ONLY)
        assert probes["writable"]["status"] == "failed"
        assert probes["writable"]["next_step"] == "choose a folder that you can write to"

    def test_a_full_file_system(self, tmp_path: Path):
        fill = "try: (folder / 'big').write_bytes(bytes(1 << 20))\nexcept OSError: pass"
        probes = on_mount(tmp_path, "size=256k", fill)
        assert (probes["free_space"]["status"], probes["free_space"]["found"][:5]) == ("failed", "0 MiB")
        assert probes["fsync"]["status"] == "failed"
        assert probes["fsync"]["found"] == "no room: No space left on device"
        assert probes["hard_links"]["status"] == "ok"

    def test_memory_is_no_place_for_a_store(self, tmp_path: Path):
        found = on_mount(tmp_path, "size=200m", "")
        assert found["file_system"]["status"] == "warning"
        assert "does not outlive a reboot" in found["file_system"]["found"]
        assert found["free_space"]["status"] == "warning"

    def test_no_inodes_left(self, tmp_path: Path):
        fill = "try: [(folder / str(number)).touch() for number in range(60)]\nexcept OSError: pass"
        probes = on_mount(tmp_path, "size=1m,nr_inodes=50", fill)
        assert (probes["inodes"]["status"], probes["inodes"]["found"]) == ("failed", "0 of 50")
        assert (probes["writable"]["status"], probes["writable"]["next_step"]) == ("failed", trials.FREE_SPACE)


class TestTrials:
    def test_without_hard_links_a_lock_stands_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
        probes = named(trials.trials(tmp_path))
        assert (probes["hard_links"].status, probes["locks"].status) == ("warning", "ok")
        assert "exclusive lock" in probes["hard_links"].found

    def test_neither_hard_links_nor_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
        monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
        probes = named(trials.trials(tmp_path))
        assert (probes["hard_links"].status, probes["locks"].status) == ("failed", "failed")
        assert probes["hard_links"].next_step == ("move the store to a local disk or a network file system with locks")
        assert probes["locks"].found == f"refused: {os.strerror(errno.ENOLCK)}"

    def test_a_link_that_replaces_is_no_commit_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "link", shutil.copyfile)
        assert trials.hard_links(tmp_path, locked=True).status == "failed"

    @pytest.mark.parametrize("answer", [lambda *_: None, refuse(errno.ENOSYS)])
    def test_a_lock_that_holds_nobody_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any):
        monkeypatch.setattr(fcntl, "flock", answer)  # the second process has the real one
        probe = trials.locks(tmp_path)
        assert (probe.status, probe.found) == ("failed", "a second process took a lock that was held")

    def test_a_second_process_that_cannot_ask(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trials, "_SECOND_PROCESS", "import sys; sys.exit('Function not implemented')")
        probe = trials.locks(tmp_path)
        assert (probe.status, probe.found) == ("failed", "Function not implemented")

    def test_no_answer_to_a_request_for_a_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trials, "_SECOND_PROCESS", "import time; time.sleep(60)")
        monkeypatch.setattr(trials, "_ANSWER_S", 0.2)
        assert "no answer" in trials.locks(tmp_path).found

    def test_a_lock_that_stays_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trials, "_SECOND_PROCESS", f"import sys; sys.exit({trials._REFUSED})")
        assert trials.locks(tmp_path).found == "a lock that was released stayed held"

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
    def test_a_flush_that_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
        monkeypatch.setattr(os, "fsync", refuse(number))
        probe = named(trials.trials(tmp_path))["fsync"]
        assert (probe.status, probe.found) == ("failed", f"refused: {os.strerror(number)}")

    def test_a_flush_tells_its_time(self, tmp_path: Path):
        assert " ms " in trials.fsync(tmp_path).found

    def test_a_rename_with_a_gap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def replace(draft: Path, target: Path) -> Path:
            target.unlink()
            time.sleep(0.001)
            return draft.rename(target)

        monkeypatch.setattr(Path, "replace", replace)
        assert trials.rename(tmp_path).status == "failed"

    def test_a_file_system_that_folds_case(self, tmp_path: Path):
        (tmp_path / "case").touch()  # what `Case` would answer to there
        assert trials.case(tmp_path).status == "warning"


Usage = namedtuple("Usage", "total used free")


class TestPlace:
    @pytest.mark.parametrize(
        ("total", "free", "status"),
        [
            (500 * GIB, 200 * GIB, "ok"),
            (500 * GIB, 9 * GIB, "warning"),
            (5000 * GIB, 40 * GIB, "warning"),  # under 1 %
            (500 * GIB, 100 * 2**20, "warning"),
            (500 * GIB, 100 * 2**20 - 1, "failed"),
        ],
    )
    def test_free_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, status: str):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))
        assert place.free_space(tmp_path).status == status

    def test_inodes_that_are_not_counted(self):
        assert place.inodes(Path("/proc")).found == "not counted by this file system"

    @pytest.mark.parametrize(
        ("skew", "head", "status", "found"),
        [
            (0.5, None, "ok", "agrees"),
            (-59.0, 900.0, "ok", "agrees"),
            (61.0, None, "warning", "+61 s"),
            (-3600.0, 900.0, "warning", "-3600 s"),
            (0.0, 1100.0, "warning", "clock set back: the newest commit is 100 s ahead"),
            (None, 1100.0, "warning", "clock set back"),
            (None, 900.0, "ok", "not behind"),
            (None, None, "ok", "not compared"),
        ],
    )
    def test_clock(self, skew: float | None, head: float | None, status: str, found: str):
        probe = place.clock(skew, head, 1000.0)
        assert probe.status == status
        assert found in probe.found

    def test_a_commit_from_the_future(self, tmp_path: Path):
        root = tmp_path / "cohort.isimed"
        isimed_index.create(root)
        future = Manifest(1, (0, "0" * 64), "x", "2999-01-01T00:00:00.000000Z", "add", next_row_id=0)
        path = root / "manifests" / f"{1:020d}.json"
        path.write_bytes(future.to_bytes())
        assert named(examine(root))["clock"].found.startswith("clock set back")
        path.write_bytes(future.to_bytes()[:-9])  # damage is not the doctor's to judge
        assert named(examine(root))["clock"].status == "ok"

    @pytest.mark.parametrize(
        ("mounts", "kind", "status"),
        [
            ("/dev/sda1 / ext4 rw 0 0", "ext4", "ok"),
            ("/dev/sda1 / ext4 rw 0 0\nhost:/x /data nfs4 rw 0 0", "nfs4", "warning"),
            ("host:/x /data nfs4 rw 0 0\n/dev/sda1 / ext4 rw 0 0", "nfs4", "warning"),
            ("/dev/sda1 / ext4 rw 0 0\nhost:/x /da nfs rw 0 0", "ext4", "ok"),
            ("/dev/sda1 /data ext4 rw 0 0\nnone /data tmpfs rw 0 0", "tmpfs", "warning"),
            ("//host/x /data/two\\040words cifs rw 0 0", "cifs", "warning"),
            ("a / fuse.sshfs rw 0 0", "fuse.sshfs", "warning"),
            ("overlay / overlay rw 0 0", "overlay", "warning"),
            ("none / fusectl rw 0 0", "fusectl", "ok"),
            ("", "unknown", "ok"),
        ],
    )
    def test_file_system(self, mounts: str, kind: str, status: str):
        probe = place.file_system(Path("/data/two words/cohort.isimed"), mounts)
        assert (probe.found.split()[0], probe.status) == (kind, status)
        assert bool(probe.next_step) == (status == "warning")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages in place of all that are installed."""
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    return tmp_path


def install(site: Path, name: str, version: str, files: dict[str, str], requires: str = "") -> None:
    """Lay a distribution down as pip does."""
    information = site / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    more = f"Requires-Dist: {requires}\n" if requires else ""
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
    (information / "RECORD").write_text("".join(f"{path},,{len(content)}\n" for path, content in files.items()))
    importlib.invalidate_caches()


FAISS = {"faiss/__init__.py": "raise SystemExit", "faiss/swigfaiss.so": "cpu"}


class TestSoftware:
    @pytest.mark.parametrize(
        ("version", "status"),
        [((3, 10, 9), "failed"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "failed"), ((4, 0, 0), "failed")],
    )
    def test_python(self, version: tuple[int, ...], status: str):
        assert software.python(version).status == status

    @pytest.mark.parametrize(
        ("version", "least", "status"),
        [("2.13.0+cpu", "2.6", "ok"), ("2.6", "2.6.0", "ok"), ("2.10", "2.9", "ok"), ("1.9.9", "2.0", "failed")],
    )
    def test_package(self, site: Path, version: str, least: str, status: str):
        install(site, "torch", version, {})
        assert software.package("torch", least).status == status

    def test_a_package_that_is_missing(self, site: Path):
        assert software.package("duckdb", "2.0") == Probe(
            "duckdb", "failed", "not installed", "pip install 'duckdb>=2.0'"
        )

    def test_lowest_versions_come_from_our_own_metadata(self, site: Path):
        assert software.least_versions() == {}
        install(site, "isimed-index", "0.1.0", {}, requires="duckdb>=2.0")
        assert software.least_versions() == {"duckdb": "2.0"}

    def test_one_faiss(self, site: Path):
        install(site, "faiss-cpu", "1.15.1", FAISS)
        assert software.faiss() == Probe("faiss", "ok", "faiss-cpu 1.15.1")

    def test_no_faiss(self, site: Path):
        assert software.faiss().status == "warning"

    @pytest.mark.parametrize("other", ["faiss-gpu", "faiss-gpu-cu12"])
    def test_two_wheels_of_faiss(self, site: Path, other: str):
        install(site, "faiss-cpu", "1.15.1", FAISS)
        install(site, other, "1.14", FAISS)
        probe = software.faiss()
        assert probe.status == "failed"
        assert f"pip uninstall -y faiss-cpu {other}" in probe.next_step

    def test_a_wheel_whose_files_another_one_wrote_over(self, site: Path):
        install(site, "faiss-cpu", "1.15.1", FAISS)
        (site / "faiss/swigfaiss.so").write_text("of the GPU wheel")
        probe = software.faiss()
        assert (probe.status, probe.next_step) == (
            "failed",
            "pip install --force-reinstall --no-deps faiss-cpu==1.15.1",
        )
        (site / "faiss/swigfaiss.so").unlink()
        assert "1 of its files" in software.faiss().found

    def test_a_wheel_whose_folder_went_with_another_one(self, site: Path):
        install(site, "faiss-cpu", "1.15.1", FAISS)
        shutil.rmtree(site / "faiss")
        importlib.invalidate_caches()
        assert software.faiss().found == "faiss-cpu 1.15.1, but its folder is missing"

    def test_a_folder_that_nobody_owns(self, site: Path):
        install(site, "faiss-cpu", "1.15.1", FAISS)
        shutil.rmtree(site / "faiss_cpu-1.15.1.dist-info")
        importlib.invalidate_caches()
        assert (software.faiss().status, software.faiss().found) == ("failed", "a folder faiss that no package owns")

    @pytest.mark.parametrize(
        ("version", "files", "found"),
        [
            ("2.13.0+cpu", {}, "CPU only"),
            ("2.6.0+cu126", {}, "CUDA 12.6"),
            ("2.13.0+cu130", {}, "CUDA 13.0"),
            ("2.6.0+rocm6.2", {}, "ROCm 6.2"),
            ("2.13.0", {"torch/lib/libtorch_cuda.so": "x"}, "CUDA"),
            ("2.13.0", {"torch/lib/libtorch_cpu.so": "x"}, "CPU only"),
            ("2.13.0", {}, "unknown"),
        ],
    )
    def test_torch_build(self, site: Path, version: str, files: dict[str, str], found: str):
        install(site, "torch", version, files)
        assert software.torch_build(gpu=False) == Probe("torch_build", "ok", found)
        assert software.torch_build(gpu=True).status == ("warning" if found == "CPU only" else "ok")

    @pytest.mark.parametrize(
        ("script", "status", "found"),
        [
            ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'; echo '  MIG 1g.10gb Device 0: (UUID: M-2)'", "ok", ""),
            ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "warning", "NVML"),
            ("true", "warning", "exit 0"),
        ],
    )
    def test_accelerators(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, found: str):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        probe = software.accelerators()
        assert probe.status == status
        assert found in probe.found
        if status == "ok":
            assert probe.found == "NVIDIA H100 80GB HBM3"

    def test_no_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert software.accelerators().status == "ok"


class TestMachine:
    @pytest.mark.parametrize(
        ("values", "allowed", "quota", "status"),
        [
            ({}, 8, None, "ok"),
            ({"OMP_NUM_THREADS": "4,2"}, 8, None, "ok"),
            ({"OMP_NUM_THREADS": "all"}, 8, None, "warning"),
            ({"MKL_NUM_THREADS": "0"}, 8, None, "warning"),
            ({"OPENBLAS_NUM_THREADS": "9"}, 8, None, "warning"),
            ({}, 8, 2.5, "warning"),
            (dict.fromkeys(machine.THREAD_VARIABLES, "2"), 8, 2.5, "ok"),
            (dict.fromkeys(machine.THREAD_VARIABLES, "1"), 8, 0.5, "ok"),
        ],
    )
    def test_threads(self, values: dict[str, str], allowed: int, quota: float | None, status: str):
        assert machine.threads(values, allowed, quota).status == status

    def test_processors_are_those_that_this_process_may_use(self, monkeypatch: pytest.MonkeyPatch):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            assert ", 1 allowed, " in named(machine.probes())["cpus"].found
        finally:
            os.sched_setaffinity(0, before)

    @pytest.mark.parametrize(
        ("meminfo", "limit", "status", "found"),
        [
            (
                "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB",
                None,
                "ok",
                "16.0 GiB, 8.0 GiB available",
            ),
            ("MemTotal: 16777216 kB\nMemAvailable: 1048576 kB", None, "warning", "16.0 GiB, 1.0 GiB available"),
            (
                "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB",
                GIB,
                "warning",
                "16.0 GiB, 8.0 GiB available, limit 1.0 GiB",
            ),
            ("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB", 1 << 62, "ok", "16.0 GiB, 8.0 GiB available"),
            ("", None, "ok", "unknown"),
        ],
    )
    def test_memory(self, meminfo: str, limit: int | None, status: str, found: str):
        probe = machine.memory(meminfo, limit)
        assert (probe.status, probe.found) == (status, found)

    @pytest.mark.parametrize(
        ("soft", "hard", "status"),
        [
            (1024, 4096, "ok"),
            (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok"),
            (256, 4096, "warning"),
            (256, 512, "warning"),
        ],
    )
    def test_open_files(self, soft: int, hard: int, status: str):
        probe = machine.open_files(soft, hard)
        assert probe.status == status
        assert ("administrator" in probe.next_step) == (hard == 512)
