"""What a lost generation leaves behind: artefacts that nothing names any more, and deletions that must hold even so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from isimed_index.store import files
from isimed_index.store.manifest import Artefact
from isimed_index.store.place.faults import spare
from isimed_index.store.place.storage import Storage
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Transaction
from isimed_index.store.upkeep.audit import History
from isimed_index.store.upkeep.collect import entries_of, staged_by_living
from isimed_index.store.upkeep.delete import tombstone
from isimed_index.store.upkeep.soundness import parts_in

if TYPE_CHECKING:
    from numpy.typing import NDArray


def unnamed(storage: Storage) -> list[str]:
    """Paths of artefacts that no good manifest names and no living writer has staged; nobody may collect meanwhile."""
    entries = entries_of(storage)  # before intents and manifests are read: see `collect`
    staged = staged_by_living(storage)
    named = {made.path for manifest in History.read(storage).manifests.values() for made in manifest.artefacts}
    return [entry for entry in entries if entry not in named | staged]


def is_tombstone(path: str) -> bool:
    """Whether a path is that of a tombstone."""
    return path.startswith(f"{files.FOLDERS['tombstone']}/")


def buried_again(
    transaction: Transaction, head: Snapshot, gone: Collection[Segment], tombstones: Sequence[str]
) -> list[Artefact]:
    """Stage a tombstone of all rows of a head, but for parts that are `gone`, that unnamed `tombstones` name."""
    before = _rows(head.storage, [made.path for made in head.artefacts("tombstone")])
    dead = np.setdiff1d(_rows(head.storage, tombstones), before)
    left_out = {(part.path, part.first_row_id) for part in gone}
    kept = [part for part in parts_in(head) if (part.path, part.first_row_id) not in left_out] if dead.size else []
    hit = [np.intersect1d(dead, part.row_ids) for part in kept]
    rows = np.sort(np.concatenate(hit)) if hit else dead
    return [tombstone(transaction, kept, rows)] if hit and rows.size else []


def _rows(storage: Storage, tombstones: Sequence[str]) -> NDArray[np.int64]:
    """Row ids in all tombstones that can be read, rising."""
    read = [rows for path in tombstones if (rows := rows_of(storage, path)) is not None]
    return np.unique(np.concatenate(read)) if read else np.empty(0, np.int64)


def rows_of(storage: Storage, path: str) -> NDArray[np.int64] | None:
    """Row ids (n,) in a tombstone that no manifest describes; None when it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: NDArray[np.int64] = pq.read_table(storage.fetch(path), partitioning=None).column("patch").to_numpy()
    except (OSError, KeyError, pa.ArrowException) as error:
        spare(error, f"the tombstone {path.split('/')[1]}")
        return None
    return rows.astype(np.int64)
