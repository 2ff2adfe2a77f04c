"""Four copies of one head, turned, moved and stored in several axis orders, and a store registered to their mean."""

from __future__ import annotations

from pathlib import Path

from cohorts import Copy, head, rigid, write_copy

import isimed_index as isi
from isimed_index.api import Store

HEADS = (
    Copy("sub-01_T1w", "RAS", rigid()),
    Copy("sub-02_T1w", "LPS", rigid(shift=(37, -12, 5))),
    Copy("sub-03_T1w", "PSR", rigid((8, -6, 10), (0, 0, 20))),
    Copy("sub-04_T1w", "AIL", rigid((-20, 12, 30), (-50, 20, 100))),
)


def write_heads(folder: Path) -> Path:
    """The copies with their label maps, as files."""
    for copy in HEADS:
        write_copy(folder, copy, head())
    return folder


def register_heads(files: Path, path: Path) -> Path:
    """A store of the heads, registered to their mean in two rounds."""
    store = isi.create(path)
    store.add(files, labels="{stem}_seg.nii.gz")
    done = store.register(workers=2)
    assert (sorted(done.registered), done.refused, done.round, done.mean_of) == ([c.stem for c in HEADS], [], 2, 4)
    return store.path


def rows_of(store: Store) -> list[dict]:
    rows = store.snapshot.table("transforms").to_pylist()
    return sorted(({k: v for k, v in row.items() if k != "time"} for row in rows), key=lambda row: row["scan"])
