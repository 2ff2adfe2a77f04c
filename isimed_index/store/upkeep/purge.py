"""Purging: erase everything of one subject from all generations, prove that it is gone, and say what remains elsewhere.

    commit without the subject ─▶ expire every generation that names what holds something of it ─▶ collect
    ─▶ search what is left for its ids ─▶ report

Packed segments that hold rows of the subject are written anew without them; frames and indexes that were made with them
are dropped, and `isimed index` makes them again. A purge that stops at a reader or writer is finished by running it
again: until the old generations have gone, they tell what belongs to the subject.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from isimed_index.errors import NotFound, StoreDamaged, StoreLocked
from isimed_index.progress import Progress, Silent
from isimed_index.store import files
from isimed_index.store.manifest import listed, utc_now
from isimed_index.store.place.storage import Storage
from isimed_index.store.repository import Repository
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot, StoredTable
from isimed_index.store.tags import find_tag, remove_tag, tag_names
from isimed_index.store.transaction import Proposal, Transaction
from isimed_index.store.upkeep.absence import Searched, Words, search
from isimed_index.store.upkeep.audit import History
from isimed_index.store.upkeep.collect import bring_back, collect, notes_of
from isimed_index.store.upkeep.compact import pack
from isimed_index.store.upkeep.delete import without_scans
from isimed_index.store.upkeep.soundness import TABLES
from isimed_index.store.upkeep.traces import Spans, Traces

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.store.manifest import Artefact, Manifest

_CHECKPOINTS = "pretrain-"  # folders in tmp/
_ELSEWHERE = (
    "backups and copies of the store, and files that were exported from it",
    "blocks of the disk and snapshots of the file system that the removed files lay in, until these are overwritten",
)


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was erased, how its absence was proved, and what remains; but for tags it names no subject and no scan."""

    generation: int  # the newest now
    time: str  # UTC, ISO 8601, when the proof was done
    scans: int
    patches: int
    artefacts: tuple[str, ...]  # paths that held something of the subject and are gone
    rewritten: int  # packed segments that were written anew without its rows
    generations: tuple[int, ...]  # that expired
    tags: tuple[str, ...]  # that named one of these
    leftovers: tuple[str, ...]  # removed from quarantine/ and tmp/
    index_again: tuple[str, ...]  # encoders (card ids) whose frame or index was dropped
    files_searched: int
    bytes_searched: int
    hits: int  # files in which anything of the subject was found: 0
    remains: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report by field, with the number of tags: what a person calls a tag may name somebody."""
        return {**asdict(self), "tags": len(self.tags)}


def purge(repository: Repository, subject: str, progress: Progress | None = None) -> Erasure:
    """Erase a subject: its scans, rows, embeddings and whatever was derived from them, in every generation.

    `NotFound` when no generation knows the subject. `StoreLocked` while a reader has pinned an old generation, or a
    writer is at work that began before: the newest generation is without the subject then, and running it again ends
    it. `StoreDamaged` when the store cannot be read, or when something of the subject is found in the end.
    """
    storage = repository.storage
    with storage.exclusive("collect"):
        bring_back(storage)  # what a purge that was cut short had taken away still tells what is to go
    head = repository.snapshot()
    for name in TABLES:
        head.table(name)  # raises where one is damaged: what belongs to the subject would not be known
    traces = Traces.read(storage, subject)
    if not traces.known:
        raise NotFound(
            f"no generation of the store knows a subject {subject!r}", next_step="isimed sql 'SELECT * FROM subjects'"
        )
    before = History.read(storage).manifests
    now, rewritten = _commit(repository, traces, before.values(), progress or Silent())
    traces = traces.beside(now)
    history = History.read(storage)
    manifests = {**before, **history.manifests}
    spans = traces.spans(manifests.values())
    held = traces.held_by(storage, manifests.values(), spans)
    expire = {number for number, made in history.manifests.items() if number < now.generation and _names(made, held)}
    expire |= {number for number in history.damaged if number < now.generation}
    _nobody_needs(storage, expire)
    tags = _untag(storage, expire)
    leftovers = _clear(storage)
    collect(repository, keep=max(1, len(listed(storage))), expire=expire)
    left = sorted(expire & set(listed(storage)))
    if left:
        raise _locked(f"{len(left)} generations are in use")
    searched = _prove(storage, traces, held, repository.snapshot())
    return Erasure(
        generation=now.generation,
        time=utc_now(),
        scans=len(traces.scans),
        patches=sum(end - first for first, end in spans),
        artefacts=tuple(sorted(held)),
        rewritten=rewritten,
        generations=tuple(sorted(expire)),
        tags=tuple(tags),
        leftovers=tuple(leftovers),
        index_again=tuple(_without_index(manifests, held, now)),
        files_searched=searched.files,
        bytes_searched=searched.bytes,
        hits=len(searched.hits),
        remains=tuple(_remains(now)),
    )


def _commit(
    repository: Repository, traces: Traces, past: Collection[Manifest], progress: Progress
) -> tuple[Snapshot, int]:
    """The newest generation without the subject, and how many packed segments were written anew."""
    counts = [0]

    def propose(head: Snapshot) -> Proposal:
        spans = traces.spans([*past, head.manifest])
        proposal = _without_subject(transaction, head, traces.beside(head), spans, progress)
        counts.append(len(proposal.add))
        return proposal

    with repository.transaction("purge") as transaction:
        return transaction.commit(propose), counts[-1]


def _without_subject(
    transaction: Transaction, head: Snapshot, traces: Traces, spans: Spans, progress: Progress
) -> Proposal:
    """The change that takes the subject out of a head, traces of its former scans included."""
    import pyarrow.compute as pc

    scans = head.table("scans")
    ids = set(scans.filter(pc.equal(scans.column("subject"), traces.subject)).column("scan").to_pylist())
    base = without_scans(head, ids)
    rewrite: dict[StoredTable, pa.Table] = {**base.rewrite}
    subjects = rewrite.get("subjects", head.table("subjects"))
    left = subjects.filter(pc.not_equal(subjects.column("subject"), traces.subject))
    if left.num_rows < subjects.num_rows:
        rewrite["subjects"] = left
    held = traces.held_by(head.storage, [head.manifest], spans)
    voxels = traces.voxels | set(base.drop)
    gone, packed = _repacked(transaction, head, held, voxels, progress)
    touched = {segment.encoder for segment in gone if segment.scan_artefact in voxels}
    derived = [
        made.path
        for made in (*head.artefacts("frame"), *head.artefacts("index"))
        if made.path in held or made.fields["encoder"] in touched
    ]
    return Proposal(
        add=packed,
        drop=[*base.drop, *derived],
        drop_segments=[*base.drop_segments, *gone],
        rewrite={name: _plain(rows) for name, rows in rewrite.items()},
        buried=[made.path for made in head.artefacts("tombstone")],
    )


def _repacked(
    transaction: Transaction, head: Snapshot, held: Set[str], voxels: Set[str], progress: Progress
) -> tuple[list[Segment], list[Artefact]]:
    """All living parts of segments that hold rows of the subject, and new segments with those that are others'."""
    by_path: dict[str, list[Segment]] = {}
    for segment in head.segments():
        if segment.path in held or segment.scan_artefact in voxels:
            by_path.setdefault(segment.path, []).append(segment)
    kept = [[part for part in parts if part.scan_artefact not in voxels] for parts in by_path.values()]
    groups = [parts for parts in kept if parts]
    progress.start("purge", len(groups), "segments")
    packed = [pack(transaction, parts, Silent()) for parts in groups]
    progress.finish()
    return [part for parts in by_path.values() for part in parts], packed


def _plain(rows: pa.Table) -> pa.Table:
    """Rows without dictionaries, which would be written with the values of rows that are not there any more."""
    import pyarrow as pa

    for number, column in enumerate(rows.schema):
        if pa.types.is_dictionary(column.type):
            rows = rows.set_column(number, column.name, rows.column(number).cast(column.type.value_type))
    return rows


def _names(manifest: Manifest, held: Set[str]) -> bool:
    return any(made.path in held for made in manifest.artefacts)


def _nobody_needs(storage: Storage, expire: Set[int]) -> None:
    """Raise `StoreLocked` while a reader or writer at work holds what is to go."""
    readers = writers = 0
    for _, notes, alive in storage.claims(files.LEASES):
        readers += alive and any(int(entry["generation"]) in expire for entry in notes_of(notes))
    for _, notes, alive in storage.claims(files.INTENTS):
        entries = notes_of(notes) if alive else []
        staged = any("staged" in entry and storage.exists(entry["staged"]) for entry in entries)
        writers += staged or any(entry.get("head") in expire for entry in entries)
    if readers or writers:
        raise _locked(f"{readers} readers and {writers} writers are at work on generations that hold the subject")


def _locked(what: str) -> StoreLocked:
    return StoreLocked(
        f"{what}; the newest generation is without the subject, older ones still hold it",
        next_step="close what reads or writes the store, then run isimed purge again",
    )


def _untag(storage: Storage, expire: Set[int]) -> list[str]:
    """Remove the tags on generations that expire."""
    found = [name for name in tag_names(storage) if find_tag(storage, name).generation in expire]
    for name in found:
        remove_tag(storage, name)
    return found


def _clear(storage: Storage) -> list[str]:
    """Remove what was quarantined, and what trainings that were cut short left: both may hold anything."""
    found = [files.QUARANTINE] if storage.exists(files.QUARANTINE) else []
    found += [f"{files.TMP}/{name}" for name in storage.names(files.TMP) if name.startswith(_CHECKPOINTS)]
    for path in found:
        storage.remove(path)
    return found


def _prove(storage: Storage, traces: Traces, held: Set[str], head: Snapshot) -> Searched:
    """Search all that is left; `StoreDamaged`, naming files, when anything of the subject is there."""
    there = sorted(path for path in held if storage.exists(path))
    named = [number for number, made in History.read(storage).manifests.items() if _names(made, held)]
    scans = head.table("scans")
    others = {str(value) for name in ("scan", "subject", "digest") for value in scans.column(name).to_pylist()}
    sessions = traces.sessions - set(scans.column("session").to_pylist())
    words = Words.of({traces.subject, *traces.scans, *traces.digests} - {""}, others)
    words = Words((*words.anywhere, *Words.of(sessions, others).anywhere), words.cells)
    searched = search(storage, words)
    found = sorted({*there, *searched.hits})
    if found or named:
        raise StoreDamaged(
            f"something of the subject is still in {len(found)} files ({', '.join(found[:10])}) and {len(named)} "
            "generations",
            next_step="run isimed purge again; remove files by hand that are not the store's",
        )
    return searched


def _without_index(manifests: Mapping[int, Manifest], held: Set[str], now: Snapshot) -> list[str]:
    """Encoders that are still there and have lost a frame or an index."""
    derived = [made for manifest in manifests.values() for kind in ("frame", "index") for made in manifest.find(kind)]
    there = {made.fields["encoder"] for made in now.artefacts("encoder")}
    lost = {made.fields["encoder"] for made in derived if made.path in held}
    has = {made.fields["encoder"] for made in now.artefacts("index")}
    return sorted((lost & there) - has)


def _remains(now: Snapshot) -> Sequence[str]:
    encoders = len(now.artefacts("encoder"))
    learned = (
        f"{encoders} encoders: their weights hold no rows and no voxels, but may have been learned from the subject's "
        "scans; isimed delete --encoder removes one"
    )
    return [learned, *_ELSEWHERE] if encoders else _ELSEWHERE
