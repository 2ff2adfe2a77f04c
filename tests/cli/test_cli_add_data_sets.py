"""`isimed add` of data sets: what a person is told, and what the exit codes say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from data_sets import bids, msd, write_text


def isimed(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isimed_cli.main", *arguments, "-s", str(store), "--no-progress"],
        capture_output=True,
        text=True,
    )


def test_notes_go_to_stderr_and_results_to_stdout(tmp_path):
    bids(tmp_path / "data")
    sites = write_text(tmp_path / "sites.csv", "participant_id,site", "sub-01,A", "sub-O2,B")
    more = write_text(tmp_path / "more.csv", "scan,score", "sub-02_T1w,3")
    data = str(tmp_path / "data")
    done = isimed(tmp_path / "store", "add", data, "--metadata", str(sites), "--metadata", str(more), "--json")
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in json.loads(done.stdout)} == {"added"}
    assert "data is laid out as BIDS: 4 images of 2 subjects" in done.stderr
    assert "1 rows of the metadata table sites.csv are about no scan that was given or is stored: sub-O2" in done.stderr
    assert str(tmp_path) not in done.stderr.replace(f"new store {tmp_path / 'store'}", "")


def test_a_layout_that_is_unknown_or_not_there_is_a_usage_error(tmp_path):
    msd(tmp_path / "data")
    for layout, says in (("nnunet", "expected a layout among auto, files, bids"), ("bids", "is not laid out as BIDS")):
        done = isimed(tmp_path / "store", "add", str(tmp_path / "data"), "--layout", layout)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr


def test_what_breaks_the_layout_is_refused_and_the_rest_lands(tmp_path):
    root = bids(tmp_path / "data")
    (root / "sub-02" / "anat" / "sub-02_T2w.nii.gz").rename(root / "sub-02" / "anat" / "sub-09_T2w.nii.gz")
    done = isimed(tmp_path / "store", "add", str(root))
    assert done.returncode == 3, done.stderr
    assert "added 3 · unchanged 0 · refused 1" in done.stdout
    assert "error[scan_refused]: sub-09_T2w.nii.gz: its name breaks BIDS" in done.stderr
