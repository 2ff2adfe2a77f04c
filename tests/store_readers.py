"""A writer and readers of one store; imported by the processes that `store/test_readers.py` starts.

The writer notes, before each commit, what the next generation will hold. Readers compare what they pinned with that.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from store_builders import add_scan, content, encode_again

from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import without_scans

SCANS = 6
SQL_EVERY = 25  # reads


def expected(scans: list[str], rows: dict[int, tuple[str, int]]) -> dict[str, Any]:
    """What a generation holds: scan ids, and by row id the scan and the seed of its vectors."""
    return {"scans": scans, "rows": {str(row): list(patch) for row, patch in rows.items()}}


class Journal:
    """Lines that one process writes and others read: a generation and what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, generation: int, holds: dict[str, Any]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps([generation, holds]) + "\n")

    def find(self, generation: int) -> dict[str, Any]:
        lines = [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return dict(lines)[generation]


def write(store: Path, journal: Journal, commits: int, seed: int) -> None:
    """Commit, compact and collect; nobody else commits, so the next generation is known."""
    chance, repository = random.Random(seed), Repository.open(store)
    scans: list[str] = []
    rows: dict[int, tuple[str, int]] = {}
    generation, next_row = repository.head(), 0
    while generation < commits:
        generation += 1
        if len(scans) > SCANS:
            gone = scans.pop(0)
            rows = {row: patch for row, patch in rows.items() if patch[0] != gone}
            journal.note(generation, expected(scans, rows))
            with repository.transaction("delete") as transaction:
                transaction.commit(lambda head, gone=gone: without_scans(head, {gone}))
        elif generation % 2 or not scans:
            scans.append(f"s{generation}")
            journal.note(generation, expected(scans, rows))
            add_scan(repository, scans[-1])
        else:
            scan = chance.choice(scans)
            rows = {row: patch for row, patch in rows.items() if patch[0] != scan}
            rows |= {next_row + number: (scan, generation) for number in range(4)}
            next_row += 4
            journal.note(generation, expected(scans, rows))
            encode_again(repository, scan, 4, seed=generation)
        if generation % 10 == 0:
            journal.note(generation + 1, expected(scans, rows))
            generation = compact(repository).generation
        if generation % 3 == 0:
            collect(repository, keep=1)


def vectors_of(seed: int, number: int) -> bytes:
    """As `store_builders.vectors` makes them, in the order of their names."""
    random_state = np.random.default_rng(seed)
    position = random_state.normal(size=(4, 3)).astype(np.float32)
    descriptor = random_state.normal(size=(4, 4)).astype(np.float16)
    return bytes(descriptor[number].tobytes() + position[number].tobytes())


def check(snapshot: Snapshot, journal: Journal, with_sql: bool) -> None:
    """Everything in one pinned generation is what the writer said, whatever was committed or collected meanwhile."""
    holds = journal.find(snapshot.generation)
    found = content(snapshot)
    assert list(found["scans"]) == holds["scans"]
    assert sorted(found["patches"]) == sorted(map(int, holds["rows"]))
    for row, (scan, number, data) in found["patches"].items():
        assert [scan] == holds["rows"][str(row)][:1]
        assert data == vectors_of(holds["rows"][str(row)][1], number)
    for scan in snapshot.scan_ids():
        snapshot.chunks_path(scan)
    if with_sql:
        count = snapshot.sql("SELECT (SELECT count(*) FROM patches) AS p, (SELECT count(*) FROM scans) AS s")
        assert count.to_pylist() == [{"p": len(holds["rows"]), "s": len(holds["scans"])}]


def read(store: Path, journal: Journal, number: int) -> int:
    """Read until the file `stop` appears; how many reads there were."""
    reads = 0
    while not (store.parent / "stop").exists():
        with Repository.open(store).pin() as snapshot:
            check(snapshot, journal, reads % SQL_EVERY == number)
        reads += 1
    return reads


def main() -> None:
    """Arguments: `write`, store, journal, commits, seed; or `read`, store, journal, number."""
    role, store, journal = sys.argv[1], Path(sys.argv[2]), Journal(Path(sys.argv[3]))
    os.nice(role == "read")  # on a small machine the writer must get its turn
    if role == "write":
        write(store, journal, int(sys.argv[4]), int(sys.argv[5]))
    else:
        print(read(store, journal, int(sys.argv[4])))
