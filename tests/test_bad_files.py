"""Every bad or odd file is refused with its reason or read right: one by one, and all in one call that stays small."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bad_case import RAS, Case, own
from bad_files import CASES, write_all, write_one

from isimed_index.api import Store, create
from isimed_index.api import open as open_store
from isimed_index.errors import ScanRefused
from isimed_index.scans import volume
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.read import read_labels, read_scan
from isimed_index.scans.scan import Scan
from isimed_index.space import apply_affine, inverse

MOST_BYTES = 2 * 2**30
# What `wait4` tells begins with the peak of the process that started this one; VmHWM is of its own memory.
PROGRAM = """
import re, resource, sys
from pathlib import Path
from isimed_cli.main import main
peak = sys.argv.pop(1)
code = main()
own = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Path(peak).write_text(str(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)))
raise SystemExit(code)
"""
HANG_S = 600  # a guard, no measure


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create(tmp_path / "s.isimed")


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch):
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))


def assert_true(store: Store, scan: str, case: Case) -> None:
    """Every voxel that was written is in the store with its value, at its place."""
    values, affine = case.truth(case.name)
    stored = open_chunks(store.snapshot.chunks_path(scan), scan)
    index = np.argwhere(np.ones(values.shape, bool))
    places = apply_affine(affine, index)
    at = np.rint(apply_affine(inverse(stored.affine), places)).astype(int)
    extent = np.linalg.norm(np.ptp(places, axis=0))
    np.testing.assert_allclose(apply_affine(stored.affine, at), places, rtol=0, atol=1e-6 * max(extent, 300))
    np.testing.assert_allclose(stored.values()[tuple(at.T)], values[tuple(index.T)], rtol=1e-6)
    assert stored.values().size == values.size


def test_there_are_enough_and_each_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert all(case.what and (case.says or case.says is None) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_with_its_reason_or_read_right(case, store, tmp_path):
    if case.name == "name-unreadable" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    report = store.add(write_one(case, tmp_path / "in"))
    lines = [f"{item.reason} Next: {item.next_step}" for item in report.refused]
    if case.says is None:
        assert lines == []
        (scan,) = report.added
        assert_true(store, scan, case)
        return
    assert report.added == []
    assert len(lines) == case.lines
    for item, line in zip(report.refused, lines, strict=True):
        assert case.says in line
        assert item.next_step
        assert str(tmp_path) not in line + item.name
        assert item.name.isprintable()


def test_the_page_of_refusals_is_up_to_date():
    root = Path(__file__).resolve().parents[1]
    script = runpy.run_path(str(root / "scripts" / "make_refusals.py"))
    assert script["page"]() == script["PAGE"].read_text(encoding="utf-8"), "run python scripts/make_refusals.py"


def test_all_in_one_call(tmp_path):
    """Exit 3, all the good ones land, and the process stays below 2 GiB."""
    folder = tmp_path / "in"
    write_all(folder)
    root = os.geteuid() == 0
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "peak")]
    command += ["add", str(folder), "--store", str(tmp_path / "s.isimed"), "--report", str(report)]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        previous = signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(HANG_S)
        try:
            _, status = os.waitpid(process.pid, 0)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
            process.returncode = 0
    said = (tmp_path / "out").read_text(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 3, said[-3000:]
    peak_kib = int((tmp_path / "peak").read_text())
    assert 50 * 1024 < peak_kib < MOST_BYTES / 1024
    print(f"\n{len(CASES)} kinds, peak {peak_kib / 1024:.0f} MiB")

    good = [case for case in CASES if case.says is None]
    store = open_store(tmp_path / "s.isimed")
    assert len(store.scans()) == len(good) + root  # root reads what nobody may
    expected = sum(case.lines for case in CASES if case.says is not None) - root
    assert len(json.loads(report.read_text())["refused"]) == expected
    assert "Traceback" not in said


def test_a_label_map_of_its_scans_size_is_no_bomb(tmp_path, monkeypatch):
    """Sparse masks shrink like bombs; what the scan beside them has, they may have. As an image it is refused."""
    monkeypatch.setattr(volume, "_CREDIBLE_BYTES", 1000)
    shape = (64, 64, 64)
    nib.save(nib.Nifti1Image(own("scan", shape), RAS), tmp_path / "a.nii")
    mask = np.zeros(shape, np.uint8)
    mask[3, 4, 5] = 1
    nib.save(nib.Nifti1Image(mask, RAS), tmp_path / "s.nii")
    (tmp_path / "s.nii.gz").write_bytes(gzip.compress((tmp_path / "s.nii").read_bytes()))
    scan = read_scan(tmp_path / "a.nii", "a")
    assert read_labels(tmp_path / "s.nii.gz", scan, {}).voxels.sum() == 1
    with pytest.raises(ScanRefused, match="no image shrinks like that"):
        read_scan(tmp_path / "s.nii.gz", "s")
    small = Scan("b", scan.voxels[:-1], scan.affine)
    with pytest.raises(ScanRefused, match="no image shrinks like that"):
        read_labels(tmp_path / "s.nii.gz", small, {})
