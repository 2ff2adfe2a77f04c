"""`index` on a Dask cluster of real processes, of which some are killed: what dies costs only what it was at."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import dask
import pytest
import torch
from clusters import Processes, processes, two_networks, wait_for
from cohorts import segment_vectors, shifted_heads
from distributed import Client

import isimed_index as isi
from isimed_index.encode import cluster as cluster_module
from isimed_index.errors import IsimedWarning
from isimed_index.store.repository import Repository

SCANS = 10
FIRST = "scan < 'sub-05'"  # as a condition

# What a worker runs first; `before` comes between a beginning, when it is on disk, and what is begun.
_COUNTING = """
import os, signal, time
from pathlib import Path
from isimed_index.encode import scan

calls = []

def mark(path, task, plain=scan._mark):
    begun = plain(path, task)
    if begun < task.starts:
        calls.append(task.scan)
        before(task)
    return begun

if scan._mark.__module__ == scan.__name__:  # Dask runs this file twice
    scan._mark = mark
"""
SOUND = _COUNTING + "before = lambda task: None"
# Never ends a scan, and says that it is at one: by the file that the variable BUSY names.
HANGS = (
    _COUNTING
    + """
def before(task):
    Path(os.environ["BUSY"]).touch()
    time.sleep(1000)
"""
)
# As a scan would that needs more memory than there is.
DIES = (
    _COUNTING
    + """
def before(task):
    if task.scan == "sub-03":
        with open("deaths", "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
"""
)
# Ends its worker at one scan, once; `{folder}` is one that all processes see.
DIES_ONCE = (
    _COUNTING
    + """
def before(task):
    if task.scan == "sub-01":
        try:
            (Path({folder!r}) / "died").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
"""
)
# Takes as many scans as the file `hold` says, as long as there is one.
HOLDS = (
    _COUNTING
    + """
def before(task):
    number, hold = len(calls), Path("hold")
    while hold.exists() and number > int(hold.read_text() or 0):
        time.sleep(0.02)
"""
)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with ten scans and an encoder."""
    return shifted_heads(tmp_path_factory.mktemp("heads"), SCANS)


@pytest.fixture(scope="module")
def expected(heads: Path) -> dict[str, dict[str, bytes]]:
    """The vectors that threads of one process give; with as many threads for a pass as the workers have."""
    store, threads = shutil.copytree(heads, heads.with_name("threads.isimed")), torch.get_num_threads()
    torch.set_num_threads(2)
    isi.open(store).index()
    torch.set_num_threads(threads)
    return segment_vectors(store)


@pytest.fixture
def store(heads: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(heads, tmp_path / "store.isimed"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Processes]:
    """Somewhere to start processes; workers that are far are behind another network, where this machine allows that."""
    with ExitStack() as stack:
        try:
            networks = stack.enter_context(two_networks())
        except OSError as error:  # no `ip` here, or not ours to use
            print(f"all on one network: {error}")
            networks = ()
        yield stack.enter_context(processes(tmp_path / "run", networks))


def index(ours: Processes, store: Path, address: str, *options: str):
    return ours.isimed(
        "index", "-s", str(store), "--scheduler", address, "--no-progress", "--json", "--runtime", "torch", *options
    )


def first_of(vectors: dict) -> dict:
    return {scan: y for scan, y in vectors.items() if scan < "sub-05"}


def committed(store: Path) -> list[str]:
    snapshot = Repository.open(store).snapshot()
    return [snapshot.scan_of[segment.scan_artefact] for segment in snapshot.segments()]


def test_a_worker_that_is_killed_and_a_cable_that_is_cut_cost_nothing(
    cluster: Processes, store: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is killed; where there are network namespaces, another one that is at a scan is cut off."""
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", "12s")  # sooner than at a user's; its probes take ten
    _, address = cluster.scheduler()
    lost = 2 if cluster.far else 1
    # One that is killed is near, and one that is cut off is far; each is at a scan before a sound one is there.
    hanging = [
        cluster.worker(address, HANGS, "--no-nanny", far=far, BUSY=f"busy-{far}") for far in (False, True)[:lost]
    ]
    run = index(cluster, store, address, "--where", FIRST)
    wait_for(lambda: len(list(cluster.folder.glob("busy-*"))) == lost)
    cluster.worker(address, SOUND, "--no-nanny")
    os.killpg(hanging[0].pid, signal.SIGKILL)
    if cluster.far:
        cluster.cut()
    output, errors = run.communicate(timeout=100)
    assert run.returncode == 0, errors
    report = json.loads(output)
    assert report["workers_lost"] == lost
    told = [line for line in errors.splitlines() if "worker was lost" in line]
    said = "warning: a worker was lost ({} so far); what it had been given is encoded again: sub-0"
    assert len(told) == lost
    assert all(line.startswith(said.format(number)) for number, line in enumerate(told, 1))
    assert "tcp" not in "".join(told)
    assert sorted(report["encoded"]) == sorted(committed(store)) == ["sub-00", "sub-01", "sub-02", "sub-03", "sub-04"]
    assert segment_vectors(store) == first_of(expected)
    assert len(list((store / "segments").iterdir())) == 5  # nothing of the attempts that were cut short


def test_a_process_of_our_own_that_is_killed_costs_nothing(
    tmp_path: Path, store: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, scans = "scan < 'sub-03'", ["sub-00", "sub-01", "sub-02"]
    preload = tmp_path / "preload.py"
    preload.write_text(DIES_ONCE.replace("{folder!r}", repr(str(tmp_path))))
    monkeypatch.setattr(cluster_module, "cores", lambda: 4)  # two for each process, as many as `expected` had
    with dask.config.set({"distributed.worker.preload": [str(preload)]}), pytest.warns(IsimedWarning) as told:
        report = isi.open(store).index(where=where, scheduler="processes:2", runtime="torch")
    lost = [str(warning.message) for warning in told]  # on a busy machine the next one may be lost while it starts
    assert all(text.startswith(f"a worker was lost ({n} so far)") for n, text in enumerate(lost, 1)), lost
    assert "what it had been given is encoded again: sub-0" in lost[0]
    assert (tmp_path / "died").exists()
    assert (sorted(report.encoded), report.refused, report.workers_lost) == (scans, [], len(lost))
    assert segment_vectors(store) == {scan: expected[scan] for scan in scans}
    again = isi.open(store).index(where=where)
    assert (again.encoded, sorted(again.skipped)) == ([], scans)
    assert segment_vectors(store) == {scan: expected[scan] for scan in scans}


def test_a_scan_that_kills_its_workers_is_refused_and_the_rest_is_encoded(
    cluster: Processes, store: Path, expected: dict
) -> None:
    _, address = cluster.scheduler()
    cluster.worker(address, DIES, far=True)  # its nanny starts it again
    run = index(cluster, store, address, "--where", FIRST)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 3, errors
    assert json.loads(output)["refused"] == ["sub-03"]
    assert json.loads(output)["workers_lost"] == errors.count("warning: a worker was lost") == 3
    assert "its worker was ended each time" in errors
    assert "give each worker more memory" in errors
    assert (cluster.folder / "deaths").read_text() == "xxx"  # and no more
    assert segment_vectors(store) == {scan: y for scan, y in first_of(expected).items() if scan != "sub-03"}


def test_coordinator_and_scheduler_may_die_and_what_was_committed_stays(
    tmp_path: Path, store: Path, expected: dict
) -> None:
    with processes(tmp_path / "run") as ours:
        hold = ours.folder / "hold"
        hold.write_text("4")
        scheduler, address = ours.scheduler()
        ours.worker(address, HOLDS, "--no-nanny")
        first = index(ours, store, address)
        wait_for(lambda: len(committed(store)) == 4)
        os.killpg(first.pid, signal.SIGKILL)
        kept = committed(store)
        with Client(address) as client:  # until then the worker may go on with what the first one asked for
            wait_for(lambda: not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

        hold.write_text("10")  # two that were begun for the first one, and four
        second = index(ours, store, address)
        wait_for(lambda: len(committed(store)) == 8)
        os.killpg(scheduler.pid, signal.SIGKILL)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "error[worker_failed]: the connection to the Dask scheduler was lost" in errors
        assert "give the same command again" in errors
        assert "Traceback" not in errors
        assert committed(store)[:4] == kept

    kept = committed(store)
    torch.set_num_threads(2)
    report = isi.open(store).index()
    assert sorted(report.skipped) == sorted(kept)
    assert len(report.encoded) == SCANS - len(kept)
    assert segment_vectors(store) == expected
