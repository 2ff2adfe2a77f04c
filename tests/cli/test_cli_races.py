"""Two commands at once, in processes of their own, into a store that is not there yet: both land."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cohorts import tiny_scan

import isimed_index as isi

ROUNDS = 12
# Starts are slow and uneven, races are short: each process is ready first, and then told the store of each round.
WORKER = """
import contextlib, io, json, sys
import isimed_index.api, isimed_index.ingest.add, isimed_index.scans.chunks, isimed_index.scans.read, pyarrow.parquet
from isimed_cli.main import main
print("ready", flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(json.loads(line))
    print(code, flush=True)
"""


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that run one command line after another."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", WORKER]
    with ExitStack() as stack:
        started = []
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen(command, env=environment, text=True, **pipes))
            stack.callback(process.kill)
            started.append(process)
        yield started


def test_two_adds_into_a_new_store_both_land(tmp_path: Path, workers: list[subprocess.Popen[str]]):
    images = [tiny_scan(tmp_path / f"s{number}.nii", number) for number in range(2)]
    for process in workers:
        assert process.stdout.readline() == "ready\n"
    for number in range(ROUNDS):
        store = tmp_path / f"{number}.isimed"
        if number % 3 == 1:  # a creation that was cut short in its first step
            (store / "manifests").mkdir(parents=True)
        elif number % 3 == 2:  # and in its last
            isi.create(store)
            (store / "FORMAT.json").unlink()
            (store / "FORMAT.json.copy").unlink()  # which is written last
        for process, image in zip(workers, images, strict=True):
            process.stdin.write(json.dumps(["add", str(image), "-s", str(store), "--quiet"]) + "\n")
        for process in workers:
            process.stdin.flush()
        codes = [process.stdout.readline().strip() for process in workers]
        if codes != ["0", "0"]:
            pytest.fail(f"round {number}: {codes} {[process.communicate()[1] for process in workers]}")
        assert sorted(isi.open(store).scans().column("scan").to_pylist()) == ["s0", "s1"]
        assert [line["verb"] for line in isi.open(store).log().to_pylist()] == ["create", "add", "add"]
