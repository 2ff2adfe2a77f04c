"""`isimed doctor`: one row a probe, an exit code, and no package loaded that it is there to judge."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isimed_cli.main import main
from isimed_index.doctor import examine

HEAVY = "numpy scipy pandas nibabel zarr dask duckdb pyarrow faiss torch monai matplotlib jsonschema rich"


def healthy(path: Path) -> bool:
    """Whether nothing fails on this machine before a test breaks it."""
    return all(probe.status != "failed" for probe in examine(path))


def test_one_row_a_probe_and_exit_0(tmp_path: Path, capsys: Any):
    code = main(["doctor", "-s", str(tmp_path / "cohort.isimed"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert code == (0 if healthy(tmp_path) else 1)
    assert {tuple(row) for row in rows} == {("probe", "status", "found", "next_step")}
    assert [row["probe"] for row in rows] == [probe.name for probe in examine(tmp_path)]
    assert {row["status"] for row in rows} <= {"ok", "warning", "failed"}


def test_a_failed_probe_is_exit_1_and_says_what_to_do(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    def refused(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refused)
    assert main(["doctor", "-s", str(tmp_path)]) == 1
    told = capsys.readouterr()
    (line,) = [line for line in told.out.splitlines() if line.startswith("fsync ")]
    assert line.split()[1] == "failed"
    assert line.endswith("move the store to a local disk or a network file system with locks")
    assert told.err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_store_should_be_is_exit_2(tmp_path: Path, capsys: Any):
    (tmp_path / "notes.txt").touch()
    assert main(["doctor", "-s", str(tmp_path / "notes.txt")]) == 2
    assert capsys.readouterr().err.startswith("error[usage]: notes.txt is a file, expected a folder. Next: ")


def test_it_runs_where_the_packages_cannot_be_imported_and_few_files_may_be_open(tmp_path: Path):
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        f"sys.modules.update(dict.fromkeys({HEAVY!r}.split()))\n"
        "from isimed_cli.main import main\n"
        f"main(['doctor', '-s', {str(tmp_path)!r}, '--format', 'ndjson'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    rows = {row["probe"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["torch"]["status"] == "ok"
    assert rows["open_files"]["status"] == "warning"
    assert rows["open_files"]["next_step"].startswith("ulimit -n 1024")
