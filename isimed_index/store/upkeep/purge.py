"""Purging: erase everything of one subject from all generations, prove that it is gone, and say what remains elsewhere.

    record ─▶ commit without the subject ─▶ expire every generation that names what holds something of it ─▶ collect
    ─▶ search what is left for its ids ─▶ remove the record ─▶ report

Packed segments that hold rows of the subject, or rows of nobody, are written anew without them; frames, indexes and
regions that were made with them, or may have been, are dropped, and `isimed index` makes them again. So is a mean
image that their voxels are averaged in, or an atlas that is a scan of theirs, with all transforms to it: `isimed
register` makes these again. A purge that fails or is cut short at any point is finished by running it again: until the
proof is done, a record in `tmp/` (see `unfinished`) tells what has to be gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from isimed_index.errors import NotFound, StoreLocked
from isimed_index.progress import Progress, Silent
from isimed_index.store import files
from isimed_index.store.manifest import listed, utc_now
from isimed_index.store.place.storage import LocalStorage, Storage
from isimed_index.store.repository import Repository
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import SCAN_COLUMNS, STORED_TABLES, Snapshot, StoredTable
from isimed_index.store.tags import find_tag, remove_tag, tag_names
from isimed_index.store.transaction import Proposal, Transaction
from isimed_index.store.upkeep.absence import Words, search
from isimed_index.store.upkeep.collect import bring_back, collect, notes_of
from isimed_index.store.upkeep.compact import pack
from isimed_index.store.upkeep.delete import without_scans
from isimed_index.store.upkeep.proof import forget_copies, history_of, prove, words_of
from isimed_index.store.upkeep.traces import Traces, voxels_averaged
from isimed_index.store.upkeep.unfinished import Unfinished

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.store.manifest import Artefact, Manifest

_CHECKPOINTS = "pretrain-"  # folders in tmp/
_BUCKET = (
    "caches of this bucket on other machines: delete them there",
    "old versions of objects where the bucket keeps versions, and parts of uploads that were cut off: expire both",
)
_ELSEWHERE = (
    "backups and copies of the store, and files that were exported from it",
    "blocks of the disk and snapshots of the file system that the removed files lay in, until these are overwritten",
)


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was erased, how its absence was proved, and what remains; but for tags it names no subject and no scan.

    It tells of all attempts, when earlier ones failed or were stopped; of tags and leftovers, it tells of the last.
    """

    generation: int  # the newest now
    time: str  # UTC, ISO 8601, when the proof was done
    scans: int
    patches: int
    artefacts: tuple[str, ...]  # paths that held something of the subject and are gone
    rewritten: int  # packed segments that were written anew without its rows
    generations: tuple[int, ...]  # that expired
    tags: tuple[str, ...]  # that named one of these
    leftovers: tuple[str, ...]  # removed from quarantine/ and tmp/
    index_again: tuple[str, ...]  # encoders (card ids) whose frame, index or regions were dropped
    register_again: int  # references that the newest generation had before and has no more, nor transforms to them
    files_searched: int
    bytes_searched: int
    hits: int  # files in which anything of the subject was found: 0
    remains: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report by field, with the number of tags: what a person calls a tag may name somebody."""
        return {**asdict(self), "tags": len(self.tags)}


def purge(repository: Repository, subject: str, progress: Progress | None = None, *, unknown: bool = False) -> Erasure:
    """Erase a subject: its scans, rows, embeddings and whatever was derived from them, in every generation.

    What no scan of others accounts for goes too: a collector may have taken the rows that told whose it was. `NotFound`
    when no generation knows the subject and no file holds its id: it is mistyped, or was deleted and collected under
    ids that do not name it; `unknown` then erases what is left of all deleted scans. `StoreLocked` while a reader has
    pinned an old generation, or a writer is at work that began before: the newest generation is without the subject
    then, and running it again ends it. `StoreDamaged` when the store cannot be read, or when something of the subject
    is found in the end; running it again searches again.
    """
    storage = repository.storage
    with storage.exclusive("collect"):
        bring_back(storage)  # what a purge that was cut short had taken away still tells what is to go
    head = repository.snapshot()
    for table in STORED_TABLES:
        head.table(table)  # raises where one is damaged: what belongs to the subject would not be known
    before = history_of(storage).manifests
    traces = Traces.read(storage, subject).beside(head)
    record = _record(storage, traces, before, Unfinished.find(storage, subject), head)
    if not (record.begun or traces.known or (unknown and record.artefacts)):
        _not_known(storage, head, subject, len(record.artefacts))
    record = record.knowing(traces.scans, words_of(traces, head))
    references = {made.path for made in head.artefacts("reference") if made.path in record.artefacts}
    record = replace(record, register_again=record.register_again | references)
    record.publish(storage, subject)
    now, done = _commit(repository, traces, before, record.artefacts, progress or Silent())
    history = history_of(storage)
    manifests = {**before, **history.manifests}
    traces = traces.joined(Traces.read(storage, subject)).beside(now)
    record = _record(storage, traces, manifests, record, now)
    held = record.artefacts
    expire = {number for number, made in history.manifests.items() if number < now.generation and _names(made, held)}
    expire |= {number for number in history.damaged if number < now.generation}
    tags = [name for name in tag_names(storage) if find_tag(storage, name).generation in expire]
    record = replace(
        record.knowing(traces.scans, words_of(traces, now)),
        generations=record.generations | expire,
        index_again=record.index_again | _without_derived(manifests, held, now),
        register_again=record.register_again | {path for path in done.drop if path in held and _is_reference(path)},
        rewritten=record.rewritten + len(done.add),
    )
    record.publish(storage, subject)
    _nobody_needs(storage, expire)
    for name in tags:
        remove_tag(storage, name)
    leftovers = _clear(storage)
    collect(repository, keep=max(1, len(listed(storage))), expire=expire)
    left = sorted(expire & set(listed(storage)))
    if left:
        raise _locked(f"{len(left)} generations are in use")
    forget_copies(storage)
    searched = prove(storage, traces, record, repository.snapshot())
    Unfinished.forget(storage, subject)
    return Erasure(
        generation=now.generation,
        time=utc_now(),
        scans=len(record.scans),
        patches=sum(end - first for first, end in record.spans),
        artefacts=tuple(sorted(held)),
        rewritten=record.rewritten,
        generations=tuple(sorted(record.generations)),
        tags=tuple(tags),
        leftovers=tuple(leftovers),
        index_again=tuple(sorted(record.index_again)),
        register_again=len(record.register_again),
        files_searched=searched.files,
        bytes_searched=searched.bytes,
        hits=len(searched.hits),
        remains=tuple(_remains(storage, now)),
    )


def _record(
    storage: Storage, traces: Traces, manifests: Mapping[int, Manifest], record: Unfinished, head: Snapshot
) -> Unfinished:
    """A record with all that is known to hold something of the subject, and the row ids that it had."""
    there = {made.path for made in head.manifest.artefacts}
    gone = {path for path in record.artefacts if path not in there}
    held = traces.held_by(storage, manifests) | gone
    return replace(record, artefacts=frozenset(held), spans=record.spans | frozenset(traces.spans(manifests.values())))


def _not_known(storage: Storage, head: Snapshot, subject: str, unaccounted: int) -> None:
    """Raise `NotFound` unless a file of the store holds the id of a subject that no row knows."""
    others = {value for name in ("scan", "subject") for value in head.table("scans").column(name).to_pylist()}
    if not search(storage, Words.of({subject}, others)).hits:
        nobody = f"; {unaccounted} artefacts hold something of deleted scans, or may" if unaccounted else ""
        raise NotFound(
            f"no generation of the store knows a subject {subject!r}, and no file holds its id{nobody}",
            next_step="check the id; isimed purge --unknown erases what is left of all deleted scans"
            if unaccounted
            else "isimed sql 'SELECT * FROM subjects'",
        )


def _commit(
    repository: Repository, traces: Traces, past: Mapping[int, Manifest], held: Set[str], progress: Progress
) -> tuple[Snapshot, Proposal]:
    """The newest generation without the subject, and the change that made it so."""
    changes = [Proposal()]

    def propose(head: Snapshot) -> Proposal:
        beside, found = traces.beside(head), held
        if head.generation not in past:  # another process committed meanwhile
            found = held | beside.held_by(head.storage, {**past, head.generation: head.manifest})
        proposal = _without_subject(transaction, head, beside, found, progress)
        changes.append(proposal)
        return proposal

    with repository.transaction("purge") as transaction:
        return transaction.commit(propose), changes[-1]


def _without_subject(
    transaction: Transaction, head: Snapshot, traces: Traces, held: Set[str], progress: Progress
) -> Proposal:
    """The change that takes the subject out of a head, traces of its former scans included."""
    import pyarrow as pa
    import pyarrow.compute as pc

    scans = head.table("scans")
    ids = set(scans.filter(pc.equal(scans.column("subject"), traces.subject)).column("scan").to_pylist())
    base = without_scans(head, ids)
    rewrite: dict[StoredTable, pa.Table] = {**base.rewrite}
    living = pa.array(sorted(set(scans.column("scan").to_pylist()) - ids), pa.string())
    subjects = rewrite.get("subjects", head.table("subjects"))
    rest: dict[StoredTable, pa.Table] = {
        "subjects": subjects.filter(pc.not_equal(subjects.column("subject"), traces.subject))
    }
    for name, columns in SCAN_COLUMNS.items():
        rest[name] = rewrite.get(name, head.table(name))
        for column in columns:
            rest[name] = rest[name].filter(pc.is_in(rest[name].column(column), living))
    means = {made.path: made.fields["reference"] for made in head.artefacts("reference") if made.path in held}
    to = pa.array(sorted(set(means.values())), pa.string())
    rest["transforms"] = rest["transforms"].filter(pc.invert(pc.is_in(rest["transforms"].column("reference"), to)))
    rewrite |= {name: rows for name, rows in rest.items() if rows.num_rows < head.table(name).num_rows}
    gone, packed = _repacked(transaction, head, held, traces.their_voxels, progress)
    touched = {segment.encoder for segment in gone if segment.scan_artefact not in traces.their_voxels}
    derived = [
        made.path
        for made in head.manifest.artefacts
        if made.kind in files.DERIVED and (made.path in held or made.fields["encoder"] in touched)
    ]
    voxels = {made.path for made in head.artefacts("scan") if made.path in held}
    return Proposal(
        add=packed,
        drop=[*sorted({*base.drop, *voxels}), *derived, *means],
        drop_segments=gone,
        rewrite={name: _plain(rows) for name, rows in rewrite.items()},
        buried=[made.path for made in head.artefacts("tombstone")],
    )


def _repacked(
    transaction: Transaction, head: Snapshot, held: Set[str], theirs: Set[str], progress: Progress
) -> tuple[list[Segment], list[Artefact]]:
    """All living parts of segments that hold rows of the subject, and new segments with those that are others'."""
    by_path: dict[str, list[Segment]] = {}
    for segment in head.segments():
        if segment.path in held or segment.scan_artefact not in theirs:
            by_path.setdefault(segment.path, []).append(segment)
    kept = [[part for part in parts if part.scan_artefact in theirs] for parts in by_path.values()]
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


def _clear(storage: Storage) -> list[str]:
    """Remove what was quarantined, and what trainings that were cut short left: both may hold anything."""
    found = [files.QUARANTINE] if storage.exists(files.QUARANTINE) else []
    found += [f"{files.TMP}/{name}" for name in storage.names(files.TMP) if name.startswith(_CHECKPOINTS)]
    for path in found:
        storage.remove(path)
    return found


def _without_derived(manifests: Mapping[int, Manifest], held: Set[str], now: Snapshot) -> set[str]:
    """Encoders that are still there and have lost their frame, their index or their regions."""
    there = {made.fields["encoder"] for made in now.artefacts("encoder")}
    lost: set[str] = set()
    for kind in files.DERIVED:
        gone = {
            made.fields["encoder"]
            for manifest in manifests.values()
            for made in manifest.find(kind)
            if made.path in held
        }
        lost |= gone - {made.fields["encoder"] for made in now.artefacts(kind)}
    return lost & there


def _is_reference(path: str) -> bool:
    return path.startswith(f"{files.FOLDERS['reference']}/")


def _remains(storage: Storage, now: Snapshot) -> Sequence[str]:
    encoders = len(now.artefacts("encoder"))
    learned = (
        f"{encoders} encoders: their weights hold no rows and no voxels, but may have been learned from the subject's "
        "scans; isimed delete --encoder removes one"
    )
    atlases = sum(voxels_averaged(storage, made) == set() for made in now.artefacts("reference"))
    atlas = (
        f"{atlases} atlases that isimed register --to read from files: none has the content of a stored scan of the "
        "subject, but what was stored at another spacing (isimed add --spacing) has other content than its file; where "
        "an atlas shows the subject, isimed add its file without --spacing as theirs, then run isimed purge again"
    )
    bucket = () if isinstance(storage, LocalStorage) else _BUCKET
    return [*((learned,) if encoders else ()), *((atlas,) if atlases else ()), *bucket, *_ELSEWHERE]
