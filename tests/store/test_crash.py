"""A writer that is killed leaves a store at the old or the new generation, and leftovers that harm nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_builders import ENCODER, add_segment, start, whole_store

from isimed_index.store.files import INTENTS
from isimed_index.store.repository import Repository

# Dies by SIGKILL at the n-th call of a function, before or after it ran, while it commits a scan.
VICTIM = """
import os, signal, sys
from pathlib import Path
from isimed_index.store import files
from isimed_index.store.repository import Repository
from isimed_index.store.place.storage import LocalStorage
from store_builders import add_scan
owner = {"os": os, "files": files, "storage": LocalStorage}[sys.argv[2].split(".")[0]]
name, when, countdown = sys.argv[2].split(".")[1], sys.argv[3], int(sys.argv[4])
original = getattr(owner, name)
def deadly(*arguments):
    global countdown
    countdown -= 1
    if when == "before" and countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments)
    if when == "after" and countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, deadly)
add_scan(Repository.open(Path(sys.argv[1])), "sub-03")
print("acknowledged")
"""
POINTS = [
    ("files.tree_digest", "before", 1, "old"),  # voxels written
    ("files.tree_digest", "after", 2, "old"),  # row written
    ("os.fsync", "after", 3, "old"),
    ("storage.publish", "before", 1, "old"),
    ("files.write_durably", "after", 1, "old"),  # manifest in tmp/
    ("os.link", "before", 1, "old"),
    ("os.link", "after", 1, "new"),
    ("storage.publish", "after", 1, "new"),
    ("storage.replace", "before", 1, "new"),
    ("storage.replace", "after", 1, "new"),
]


@pytest.mark.parametrize(("function", "when", "nth", "expected"), POINTS)
def test_killed_at(tmp_path: Path, function: str, when: str, nth: int, expected: str) -> None:
    repository = whole_store(tmp_path / "c")
    victim = start(VICTIM, str(repository.path), function, when, str(nth))
    output, errors = victim.communicate(timeout=60)
    assert victim.returncode == -9, errors
    assert output == ""

    opened = Repository.open(repository.path)
    snapshot = opened.snapshot()
    old = ["sub-01_T1w", "sub-02_ct"]
    assert snapshot.scan_ids() == (old if expected == "old" else [*old, "sub-03"])
    for scan in snapshot.scan_ids():
        snapshot.chunks_path(scan)
    assert len(list((repository.path / INTENTS).glob("*.jsonl"))) == 1  # a collector can see who died

    after = add_segment(opened, "sub-01_T1w", 2)
    assert after.generation == snapshot.generation + 1
    assert [segment.first_row_id for segment in after.segments(ENCODER)] == [0, 3, 8]
    assert after.sql("SELECT count(*) AS n FROM patches").to_pylist() == [{"n": 10}]
