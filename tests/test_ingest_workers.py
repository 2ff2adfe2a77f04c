"""`add` with several workers: the same store as with one, and a worker that dies costs its file alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from cohorts import tiny_scan
from dicoms import noise, write_series

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import IsimedError, StoreFull, UsageError
from isimed_index.ingest import crew
from isimed_index.report.added import to_json

# Runs in a worker before it serves: what `take` does with some files, by their names.
PRANKS = """
import sys; sys.path[:] = sys.argv[1:]
import os, signal, time
import isimed_index.ingest.take as module
take = module.take
def prank(task, job, wanted):
    name = task.file.path.name
    def asked(digest):
        answer = wanted(digest)
        if "dies-late" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    if "slow" in name:
        time.sleep(1)
    if "dies-early" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "crashes" in name:
        os._exit(7)
    if "full" in name:
        raise OSError(28, "No space left on device", str(task.folder / "zarr.json"))
    if "odd" in name:
        raise type("Local", (Exception,), {})("cannot be pickled")
    return take(task, job, asked)
module.take = prank
from isimed_index.ingest.worker import serve
serve()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return isi.create(tmp_path / "store")


@pytest.fixture
def pranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_START", PRANKS)


def folders(store: Store) -> int:
    return sum(1 for _ in (store.path / "scans").iterdir())


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if any("ingest.worker" in part for part in child.cmdline())]


def test_the_number_of_workers_changes_nothing(tmp_path: Path):
    for seed in range(18):
        tiny_scan(tmp_path / "in" / f"s{seed:02d}.nii.gz", seed, (6, 5, 4))
    tiny_scan(tmp_path / "in" / "s30.nii", 3, (6, 5, 4))  # the content of s03
    (tmp_path / "in" / "s05.nii.gz").write_bytes(b"no image")
    write_series(tmp_path / "in" / "dicom", noise(), series="1.2.3", study="1.2")
    found = []
    for workers in (1, 3):
        store = isi.create(tmp_path / f"store{workers}")
        report = store.add(tmp_path / "in", workers=workers, surrogate_key=tmp_path / "key")
        files = [replace(file, seconds=None) for file in report.files]
        rows = store.sql("SELECT * EXCLUDE (artefact) FROM scans").to_pylist()
        found.append((to_json(replace(report, files=files)), rows, store.generation))
        assert folders(store) == len(rows) == 18
        assert not workers_of(psutil.Process())
    assert found[0] == found[1]
    assert found[0][0]["unchanged"] == ["s03"]


@pytest.mark.parametrize("name", ["s1-dies-early", "s1-dies-late", "s1-crashes"])
@pytest.mark.usefixtures("pranks")
def test_a_worker_that_dies_costs_its_file_alone(store: Store, tmp_path: Path, name: str):
    for seed in range(6):
        tiny_scan(tmp_path / "in" / f"s{seed}.nii", seed)
    (tmp_path / "in" / "s1.nii").rename(tmp_path / "in" / f"{name}.nii")
    report = store.add(tmp_path / "in", workers=2)
    assert report.added == ["s0", "s2", "s3", "s4", "s5"]
    (refusal,) = report.refused
    assert refusal.name == f"{name}.nii"
    assert ("(exit code 7)" if "crashes" in name else "memory runs out") in refusal.reason
    assert str(tmp_path) not in refusal.reason
    assert folders(store) == 5


@pytest.mark.usefixtures("pranks")
def test_content_whose_first_file_died_comes_from_the_next_one(store: Store, tmp_path: Path):
    for name in ("a-dies-late", "b-slow", "c-slow"):
        tiny_scan(tmp_path / "in" / f"{name}.nii", 0)
    report = store.add(tmp_path / "in", workers=3)
    assert (report.added, report.unchanged) == (["b-slow"], ["b-slow"])
    assert [refusal.name for refusal in report.refused] == ["a-dies-late.nii"]
    assert folders(store) == 1


@pytest.mark.usefixtures("pranks")
def test_the_first_file_of_a_content_wins_even_when_it_is_slow(store: Store, tmp_path: Path):
    for name in ("a-slow", "b", "c"):
        tiny_scan(tmp_path / "in" / f"{name}.nii", 0)
    report = store.add(tmp_path / "in", workers=3)
    assert (report.added, report.unchanged) == (["a-slow"], ["a-slow", "a-slow"])
    assert folders(store) == 1
    assert isi.check(store.path) == []


@pytest.mark.usefixtures("pranks")
def test_a_full_disk_ends_the_add_and_leaves_nothing(store: Store, tmp_path: Path):
    for name in ("a", "b", "c-full", "d", "e"):
        tiny_scan(tmp_path / "in" / f"{name}.nii", ord(name[0]))
    with pytest.raises(StoreFull, match="no room left"):
        store.add(tmp_path / "in", workers=2)
    assert folders(store) == 0
    assert not workers_of(psutil.Process())


@pytest.mark.usefixtures("pranks")
def test_an_error_that_cannot_travel_is_told_all_the_same(store: Store, tmp_path: Path):
    tiny_scan(tmp_path / "in" / "odd.nii", 1)
    tiny_scan(tmp_path / "in" / "z.nii", 2)
    with pytest.raises(Exception, match="Local: cannot be pickled") as caught:
        store.add(tmp_path / "in", workers=2)
    assert "prank" in "".join(caught.value.__notes__)  # where it was raised
    assert folders(store) == 0


def test_workers_that_do_not_start_are_no_refusal_of_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(crew, "_START", "raise SystemExit(3)")
    for seed in range(2):
        tiny_scan(tmp_path / "in" / f"s{seed}.nii", seed)
    with pytest.raises(IsimedError, match=r"did not start \(exit code 3\)") as caught:
        store.add(tmp_path / "in", workers=2)
    assert "--workers 1" in caught.value.next_step
    assert folders(store) == 0


def test_one_file_needs_no_process(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "_START", "raise SystemExit(3)")
    assert store.add(tiny_scan(tmp_path / "s.nii"), workers=8).added == ["s"]


def test_a_folder_of_one_file_has_no_use_for_those_that_were_started(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(crew, "_START", "import time; time.sleep(600)  # ingest.worker")
    tiny_scan(tmp_path / "in" / "s.nii")
    assert store.add(tmp_path / "in", workers=3).added == ["s"]
    assert not workers_of(psutil.Process())


def test_workers_are_ended_when_there_is_nothing_for_them(store: Store, tmp_path: Path):
    tiny_scan(tmp_path / "in" / "s.nii")
    with pytest.raises(UsageError, match="no group"):
        store.add(tmp_path / "in", workers=2, subject_from="s")
    assert not workers_of(psutil.Process())
    (tmp_path / "empty").mkdir()
    assert store.add([tmp_path / "empty"], workers=2).added == []
    assert not workers_of(psutil.Process())


def test_when_one_worker_cannot_be_started_the_others_are_ended(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started, real = [], crew._started

    def no_memory(workers: int) -> subprocess.Popen[bytes]:
        if started:
            raise OSError(12, "Cannot allocate memory")
        started.append(real(workers))
        return started[0]

    monkeypatch.setattr(crew, "_started", no_memory)
    tiny_scan(tmp_path / "in" / "s.nii")
    with pytest.raises(IsimedError, match=r"did not start \(Cannot allocate memory\)"):
        store.add(tmp_path / "in", workers=2)
    assert started[0].returncode == -signal.SIGKILL


def test_more_workers_than_files_share_the_cores_as_so_few_would(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those that were started for a larger crew have fewer threads: others take their place."""
    monkeypatch.setattr(crew, "cores", lambda: 8)
    seen = tmp_path / "threads"
    script = (
        f"import os; open({str(seen)!r}, 'a').write(os.environ['ZARR_THREADING__MAX_WORKERS'] + ' ')\n{crew._START}"
    )
    monkeypatch.setattr(crew, "_START", script)
    for seed in range(2):
        tiny_scan(tmp_path / "in" / f"s{seed}.nii", seed)
    assert store.add(tmp_path / "in", workers=8).added == ["s0", "s1"]
    assert seen.read_text().split().count("4") == 2


def test_a_worker_loads_no_more_than_it_uses():
    script = (
        "import sys; sys.path[:] = sys.argv[1:]; from isimed_index.ingest.worker import _load; _load()\n"
        "print(*[name for name in ('pydicom', 'zarr', 'torch', 'gdcm', 'requests') if sys.modules.get(name)])\n"
        "import pydicom.pixels; print('nibabel' in sys.modules, hasattr(pydicom, 'dcmread'))"
    )
    out = subprocess.run([sys.executable, "-I", "-c", script, *sys.path], check=True, capture_output=True, text=True)
    assert out.stdout == "\nTrue True\n"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for seed in range(24):
        tiny_scan(tmp_path / "in" / f"s{seed:02d}.nii", seed, (48, 48, 48))
    return tmp_path / "in"


def at_work(store: Store, many: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """An add in a process of its own, once two workers write."""
    process = subprocess.Popen(
        [sys.executable, "-m", "isimed_cli.main", "add", str(many), "-s", str(store.path), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(list((store.path / "scans").glob("*/zarr.json"))) > 2:
            return process, workers_of(psutil.Process(process.pid))
        time.sleep(0.005)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_do_not_outlive_their_parent(store: Store, many: Path, number: signal.Signals):
    process, workers = at_work(store, many)
    assert len(workers) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), errors
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == 2
    after = isi.open(store.path)
    if number != signal.SIGKILL:
        assert folders(store) == after.scans().num_rows
    assert after.add(many).refused == []
    assert after.scans().num_rows == 24
