"""What an import commits: scans with their rows and embeddings, a batch at a time, beside what is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from isimed_index.errors import EncoderMismatch, UsageError
from isimed_index.store.manifest import Artefact
from isimed_index.store.snapshot import Snapshot, StoredTable
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    import pyarrow as pa

IMPORTED: tuple[StoredTable, ...] = ("scans", "subjects", "labels")  # what else is stored is made again from these
_FEW = 3  # ids that a message names
_UNBINDING = ("name", "training")  # fields of a card that change no embedding


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: ids of new scans, ids of scans that were there already, new encoders, new patches."""

    generation: int
    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    encoders: list[str] = field(default_factory=list)  # card ids
    patches: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Some scans, all that belongs to them, and the encoders that their segments name."""

    tables: Mapping[StoredTable, pa.Table]  # scans (with `artefact`), subjects, labels
    voxels: Mapping[str, Artefact]  # of the scans in `tables`, by id
    segments: Sequence[tuple[str, Artefact]]  # each with the id of its scan
    encoders: Sequence[Artefact]


def commit(transaction: Transaction, batch: Batch) -> tuple[Snapshot, int]:
    """Commit a batch but for what the head holds already; returns the new head and how many patches came in.

    `UsageError` when the head has a scan of the same id and other content.
    """
    patches = 0

    def propose(head: Snapshot) -> Proposal:
        nonlocal patches
        proposal = _proposal(batch, head)
        patches = sum(int(new.fields["rows"]) for new in proposal.add if new.kind == "segment")
        return proposal

    return transaction.commit(propose), patches


def _proposal(batch: Batch, head: Snapshot) -> Proposal:
    import pyarrow as pa
    import pyarrow.compute as pc

    there = set(head.scan_ids())
    refuse_other_content(head, batch.tables["scans"])
    fresh = [scan for scan in batch.voxels if scan not in there]
    subjects = head.table("subjects").column("subject")
    only: dict[StoredTable, Callable[[pa.Table], Any]] = {
        "scans": lambda rows: pc.is_in(rows["scan"], pa.array(fresh, pa.string())),
        "subjects": lambda rows: pc.invert(pc.is_in(rows["subject"], subjects.combine_chunks())),
        "labels": lambda rows: pc.is_in(rows["scan"], pa.array(fresh, pa.string())),
    }
    known = {artefact.fields["encoder"] for artefact in head.artefacts("encoder")}
    encoded = {(segment.encoder, segment.scan_artefact) for segment in head.segments()}
    place = {scan: head.scan_row(scan)["artefact"] for scan, _ in batch.segments if scan in there}
    place |= {scan: batch.voxels[scan].path for scan in fresh}
    gone = sorted({scan for scan, _ in batch.segments} - place.keys())
    if gone:
        raise UsageError(
            f"{len(gone)} scans were deleted from the store while they were imported", next_step="import again"
        )
    segments = [
        replace(artefact, fields={**artefact.fields, "scan_artefact": place[scan]}) for scan, artefact in batch.segments
    ]
    return Proposal(
        add=[
            *(encoder for encoder in batch.encoders if encoder.fields["encoder"] not in known),
            *(batch.voxels[scan] for scan in fresh),
            *(new for new in segments if (new.fields["encoder"], new.fields["scan_artefact"]) not in encoded),
        ],
        tables={name: rows.filter(only[name](rows)) for name, rows in batch.tables.items()},
    )


def refuse_other_content(head: Snapshot, scans: pa.Table) -> None:
    """Raise `UsageError` when a scan's id is in the store with other content, or its content under another id."""
    stored = dict(zip(head.scan_ids(), head.table("scans").column("digest").to_pylist(), strict=True))
    ids_of = {digest: scan for scan, digest in stored.items()}
    pairs = list(zip(scans.column("scan").to_pylist(), scans.column("digest").to_pylist(), strict=True))
    other = [scan for scan, digest in pairs if stored.get(scan, digest) != digest]
    if other:
        raise UsageError(
            f"{named(other)} in the store with other content", next_step="import into a new store, or delete it there"
        )
    renamed = [f"{scan} (there {ids_of[digest]})" for scan, digest in pairs if ids_of.get(digest, scan) != scan]
    if renamed:
        raise UsageError(f"{named(renamed)} in the store under another id", next_step="import into a new store")


def refuse_other_card(head: Snapshot, card: Mapping[str, Any]) -> None:
    """Raise `EncoderMismatch` when the store has an encoder of that id that makes other embeddings."""
    for artefact in head.artefacts("encoder"):
        if artefact.fields["encoder"] == card["id"] and _binding(head.card(artefact)) != _binding(card):
            raise EncoderMismatch(
                f"the store has another encoder with the id {card['id']}", next_step="give the card an id of its own"
            )


def _binding(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key not in _UNBINDING}


def rows_of(
    tables: Mapping[StoredTable, pa.Table], scans: Sequence[str], places: Mapping[str, str]
) -> dict[StoredTable, pa.Table]:
    """The rows of some scans, their subjects and labels; `artefact` is the place of each scan's voxels."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = pa.array(scans, pa.string())
    kept = {name: tables[name].filter(pc.is_in(tables[name]["scan"], ids)) for name in ("scans", "labels")}
    subjects = tables["subjects"]
    of = kept["scans"]["subject"].combine_chunks()
    artefacts = pa.array([places[scan] for scan in kept["scans"]["scan"].to_pylist()], pa.string())
    return {
        "scans": kept["scans"].append_column("artefact", artefacts),
        "subjects": subjects.filter(pc.is_in(subjects["subject"], of)),
        "labels": kept["labels"],
    }


def named(scans: Sequence[str]) -> str:
    """`scan a is`, or `scans a, b and 7 more are`."""
    few = ", ".join(scans[:_FEW])
    more = f" and {len(scans) - _FEW} more" if len(scans) > _FEW else ""
    return f"scan {few} is" if len(scans) == 1 else f"scans {few}{more} are"
