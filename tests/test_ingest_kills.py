"""`isimed add` killed at twenty random moments and started again each time: the cohort ends complete and whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cohorts import tiny_scan
from dicoms import noise, write_series

import isimed_index as isi
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.read import read_scan

KILLS = 20
SCANS = 30
SEED = 4
ADD = ("-s", "store", "--workers", "2", "--quiet", "--surrogate-key", "key")
SHAPE = (72, 64, 60)  # some tens of milliseconds to write, so that kills meet files half written


def add(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "isimed_cli.main", "add", "in", *ADD],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def written(folder: Path) -> int:
    """How many scans were begun, committed or not."""
    return len(os.listdir(folder / "store" / "scans"))  # noqa: PTH208 — asked often, beside what it waits for


def kill(folder: Path, scans: int, pause_s: float) -> bool:
    """Start an add and kill it a moment after it has begun so many scans; whether it was alive then."""
    before, process = written(folder), add(folder)
    while process.poll() is None and written(folder) - before < scans:
        time.sleep(0.005)
    time.sleep(pause_s)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors
    return process.returncode != 0


@pytest.mark.timeout(900)  # twenty starts of three processes each
def test_killed_twenty_times_and_rerun_the_cohort_is_complete(tmp_path: Path):
    for seed in range(SCANS):
        tiny_scan(tmp_path / "in" / f"s{seed:02d}.nii.gz", seed, SHAPE)
    write_series(tmp_path / "in" / "dicom", noise((40, 50, 12)), series="1.2.3", study="1.2")
    chance = random.Random(SEED)
    store = isi.create(tmp_path / "store")
    kept, orphans, killed = [0], 0, 0
    for number in range(KILLS):
        # A commit comes after 16 files: most moments lie before the first one, or in the batch after it. Every fifth is
        # one while libraries load and files are listed, as are all once nothing is left to do.
        if number % 5 == 4 or kept[-1] == SCANS + 1:
            killed += kill(tmp_path, 0, chance.uniform(0, 2))
        else:
            killed += kill(tmp_path, chance.randint(1, 20), chance.uniform(0, 0.05))
        store.refresh()  # opens after every kill
        kept.append(store.scans().num_rows)
        orphans += written(tmp_path) > kept[-1]
    assert killed
    assert orphans  # some kills fell on scans that were half written, or written and not committed
    assert kept == sorted(kept)

    last = add(tmp_path)
    _, errors = last.communicate(timeout=240)
    assert last.returncode == 0, errors
    store.refresh()
    rows = store.snapshot.table("scans").to_pylist()
    names = Counter(row["scan"] for row in rows)
    assert set(names.values()) == {1}
    assert sorted(name for name in names if name.startswith("s0")) == [f"s{n:02d}" for n in range(10)]
    assert len(rows) == SCANS + 1
    assert len({row["digest"] for row in rows}) == len(rows)
    again = store.add(tmp_path / "in", surrogate_key=tmp_path / "key")
    assert (again.added, again.refused, len(again.unchanged)) == ([], [], SCANS + 1)

    store.gc(keep=1)
    assert isi.check(tmp_path / "store", read=1.0) == []
    named = {Path(row["artefact"]).name for row in rows}
    assert {folder.name for folder in (tmp_path / "store" / "scans").iterdir()} == named  # no orphan
    assert not list((tmp_path / "store" / "intents").iterdir())
    for seed in (0, 15, SCANS - 1):
        own = read_scan(tmp_path / "in" / f"s{seed:02d}.nii.gz", "x")
        stored = open_chunks(store.snapshot.chunks_path(f"s{seed:02d}"))
        np.testing.assert_array_equal(stored.voxels(), own.voxels)
