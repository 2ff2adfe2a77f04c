"""Deleting by SQL: scans with all that belongs to them, single patches, or an encoder with all that it made.

Scans and encoders are no longer named by the next generation; patches are named by a *tombstone*, a list of row ids
that every reader leaves out. Older generations still hold what was deleted until `collect` takes them: `purge` is for
erasing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import conform
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import SCAN_COLUMNS, Snapshot, StoredTable
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion took out of the newest generation, or would take out."""

    generation: int  # the newest now
    scans: tuple[str, ...] = ()  # their ids
    subjects: int = 0  # that have no scan any more
    patches: int = 0
    encoders: tuple[str, ...] = ()  # their card ids
    matches: int = 0  # rows of kept answers


def delete_scans(repository: Repository, where: str, *, dry_run: bool = False, verb: str = "delete") -> Deleted:
    """Delete the scans that an SQL condition over `scans` keeps: voxels, rows, labels and segments of all encoders."""

    def propose(head: Snapshot) -> tuple[Proposal, Deleted]:
        ids = head.matching("scans", where).column("scan").to_pylist()
        proposal = without_scans(head, set(ids))
        subjects = head.table("subjects").num_rows - proposal.rewrite.get("subjects", head.table("subjects")).num_rows
        patches = sum(segment.rows for segment in proposal.drop_segments)
        return proposal, Deleted(head.generation, tuple(ids), subjects, patches)

    return _commit(repository, verb, lambda transaction, head: propose(head), dry_run)


def without_scans(head: Snapshot, ids: Set[str]) -> Proposal:
    """The change that takes scans out of the head."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not ids:
        return Proposal()
    gone = pa.array(sorted(ids), pa.string())
    rewrite: dict[StoredTable, pa.Table] = {}
    for name, columns in SCAN_COLUMNS.items():
        rows = left = head.table(name)
        for column in columns:
            left = left.filter(pc.invert(pc.is_in(left.column(column), gone)))
        if left.num_rows < rows.num_rows:
            rewrite[name] = left
    before, after = _subjects(head.table("scans")), _subjects(rewrite["scans"])
    subjects = head.table("subjects")
    lost = pa.array(sorted(before - after), pa.string())
    kept = subjects.filter(pc.invert(pc.is_in(subjects.column("subject"), lost)))
    if kept.num_rows < subjects.num_rows:
        rewrite["subjects"] = kept
    voxels = {path for path, scan in head.scan_of.items() if scan in ids}
    there = {artefact.path for artefact in head.artefacts("scan")}
    segments = [segment for segment in head.segments() if segment.scan_artefact in voxels]
    return Proposal(drop=sorted(voxels & there), drop_segments=segments, rewrite=rewrite)


def _subjects(scans: pa.Table) -> set[str]:
    return set(scans.column("subject").to_pylist())


def delete_patches(repository: Repository, where: str, *, dry_run: bool = False) -> Deleted:
    """Delete the patches that an SQL condition over the view `patches` keeps; their scans stay."""

    def propose(transaction: Transaction | None, head: Snapshot) -> tuple[Proposal, Deleted]:
        rows = np.sort(head.matching("patches", where, ["patch"]).column("patch").to_numpy())
        found = Deleted(head.generation, patches=len(rows))
        if transaction is None or not len(rows):
            return Proposal(), found
        return Proposal(add=[tombstone(transaction, head.segments(), rows)]), found

    return _commit(repository, "delete", propose, dry_run)


def delete_matches(repository: Repository, where: str, *, dry_run: bool = False) -> Deleted:
    """Delete the rows of kept answers that an SQL condition over `matches` keeps."""

    def propose(_: Transaction | None, head: Snapshot) -> tuple[Proposal, Deleted]:
        gone = head.matching("matches", where, ["question", "rank"])
        dead = set(zip(*(gone.column(key).to_pylist() for key in ("question", "rank")), strict=True))
        rows = head.table("matches")
        pairs = zip(rows.column("question").to_pylist(), rows.column("rank").to_pylist(), strict=True)
        found = Deleted(head.generation, matches=len(dead))
        return Proposal(rewrite={"matches": rows.filter([pair not in dead for pair in pairs])} if dead else {}), found

    return _commit(repository, "delete", propose, dry_run)


def tombstone(transaction: Transaction, segments: Sequence[Segment], rows: NDArray[np.int64]) -> Artefact:
    """Stage the list of dead row ids (rising), with how many of them each segment has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    dead = {}
    for segment in segments:
        first, last = np.searchsorted(rows, [segment.first_row_id, segment.end_row_id])
        if last > first:
            dead[segment.key] = int(last - first)
    path = transaction.stage("tombstone")
    pq.write_table(conform("tombstones", pa.table({"patch": rows})), path, compression="zstd")
    return transaction.add("tombstone", path, rows=len(rows), dead=dead)


def delete_encoder(repository: Repository, encoder: str, *, dry_run: bool = False) -> Deleted:
    """Delete an encoder (id, beginning of one, or name) with its segments, frame and indexes."""

    def propose(_: Transaction | None, head: Snapshot) -> tuple[Proposal, Deleted]:
        card_id = head.encoder_artefact(encoder).fields["encoder"]
        made = [found.path for found in head.manifest.artefacts if found.fields.get("encoder") == card_id]
        patches = sum(segment.rows for segment in head.segments(card_id))
        return Proposal(drop=made), Deleted(head.generation, patches=patches, encoders=(card_id,))

    return _commit(repository, "delete", propose, dry_run)


def _commit(
    repository: Repository,
    verb: str,
    propose: Callable[[Transaction | None, Snapshot], tuple[Proposal, Deleted]],
    dry_run: bool,
) -> Deleted:
    """Commit what `propose` finds in the head, or only find it; what was found in the head that it was taken from."""
    if dry_run:
        return propose(None, repository.snapshot())[1]
    found: list[Deleted] = []
    with repository.transaction(verb) as transaction:

        def attempt(head: Snapshot) -> Proposal:
            proposal, what = propose(transaction, head)
            found.append(what)
            return proposal

        now = transaction.commit(attempt)
    return replace(found[-1], generation=now.generation)
