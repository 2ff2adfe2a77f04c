"""Repair: a new generation of all that is whole; what is lost goes to `quarantine/`, and a report says what to do next.

    copies ─▶ audit ─▶ what is whole of the newest good generation, rows that are lost from older ones
    ─▶ commit ─▶ quarantine

A document of which one file is good is written again from that. A generation is lost when neither is: then the last
good one is followed, rows that the lost one had deleted stay dead, and what only it named goes to quarantine, so that
a person sees it before a collector does.

Nothing is made up: a scan whose voxels or row are lost leaves the store with all that was derived from it, so that its
file can be added again; frames, indexes and segments come back with the next `isimed index`. The commit comes first: a
repair that is cut short is finished by the next one, and a writer at work meanwhile commits before it or after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from isimed_index.contracts import FORMAT_VERSION
from isimed_index.errors import NotFound, StoreDamaged, StoreUnreadable, StoreWarning
from isimed_index.progress import Progress
from isimed_index.store import files
from isimed_index.store.integrity import check_hash, check_size
from isimed_index.store.manifest import Artefact, generation_of, load, read_published, seal, unseal
from isimed_index.store.place.storage import Storage
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.tags import tagged
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.audit import History, audit
from isimed_index.store.upkeep.collect import bring_back
from isimed_index.store.upkeep.copies import documents
from isimed_index.store.upkeep.findings import Finding
from isimed_index.store.upkeep.lost import buried_again, is_tombstone, rows_of, unnamed
from isimed_index.store.upkeep.salvage import Salvage

_BYTES_LOST = ("artefact_missing", "artefact_size", "artefact_hash")
_TAGS = ("tag_damaged", "tag_missing_generation")
_MEANING_LOST = (
    "segment_rows",
    "segment_form",
    "table_rows",
    "frame_form",
    "index_coverage",
    "row_ids_overlap",
    "row_ids_beyond",
    "tombstone_damaged",
)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did, and what is left for a person to do."""

    generation: int  # the newest now
    committed: bool = False  # whether a generation was added
    dropped: tuple[str, ...] = ()  # paths of artefacts that the newest generation no longer names
    quarantined: tuple[str, ...] = ()  # paths, as they were, of what was moved to quarantine/
    rewritten: tuple[str, ...] = ()  # FORMAT.json, HEAD.json and folders that were made again
    add_again: tuple[str, ...] = ()  # scans that are lost: their ids, or the ULID of the voxels where no id is known
    encode_again: tuple[str, ...] = ()  # scans whose segments were dropped; isimed index encodes them again
    index_again: tuple[str, ...] = ()  # encoders (card ids) whose frame or index was dropped
    rows_recovered: Mapping[str, int] = field(default_factory=dict)  # by table: rows taken from older generations
    rows_lost: Mapping[str, int] = field(default_factory=dict)  # by table: rows that no generation holds any more
    lost: tuple[str, ...] = ()  # what no repair can mend, with the way out
    not_whole: tuple[int, ...] = ()  # older generations that name something that is lost
    tags: tuple[str, ...] = ()  # tags that went to quarantine
    unnamed: tuple[str, ...] = ()  # paths, as they were, of what only lost generations named; in quarantine/

    def to_json(self) -> dict[str, Any]:
        """The report by field."""
        return asdict(self)


def repair(
    store: Repository | Path, findings: Sequence[Finding] | None = None, progress: Progress | None = None
) -> Repaired:
    """Mend a store as far as it can be; without `findings` the whole store is read first.

    `StoreDamaged` when no generation can be read, `StoreLocked` while another process repairs or collects,
    `StoreUnreadable` when the system keeps a file from being read: then nothing is dropped for it. A store without
    damage stays as it is. `FORMAT.json` of a store given by its path may be damaged.
    """
    repository = Repository.unchecked(store) if isinstance(store, Path) else store
    storage = repository.storage
    folders = tuple(_make_folders(storage))
    with warnings.catch_warnings(), storage.exclusive("repair"):
        warnings.simplefilter("ignore", StoreWarning)  # what it tells is what is mended
        mended = tuple(_mend(storage))
        found = audit(repository, read=1.0, progress=progress) if findings is None else list(findings)
        bad = _still_bad(storage, found)
        plan, put_away = _followed(repository, bad)
        head = plan.now
        past = History.read(storage)
        kept = {made.path for made in head.manifest.artefacts}
        gone = sorted(path for path in bad if path not in kept)
        moved = [path for path in (*gone, *_bad_documents(storage, found)) if _quarantine(storage, path)]
        return Repaired(
            generation=head.generation,
            committed=plan.committed,
            dropped=plan.dropped,
            quarantined=tuple(moved),
            rewritten=(*folders, *mended, *_documents(storage, found, past)),
            add_again=plan.add_again,
            encode_again=plan.encode_again,
            index_again=plan.index_again,
            rows_recovered=plan.recovered,
            rows_lost=plan.lost,
            lost=(*plan.undone, *_unmended(found, kept, plan.lost)),
            not_whole=tuple(sorted({number for path in gone for number in past.naming(path)})),
            tags=tuple(sorted(Path(path).stem for path in moved if Path(path).match(f"{files.TAGS}/*.json"))),
            unnamed=tuple(put_away),
        )


def _make_folders(storage: Storage) -> Iterator[str]:
    for folder in (files.MANIFESTS, files.INTENTS, files.TMP):
        if not storage.exists(folder):
            storage.prepare([folder])
            yield folder


def _mend(storage: Storage) -> Iterator[str]:
    """Write the bad file of each document again from the good one, while no collector takes any away."""
    with storage.exclusive("collect"):
        bring_back(storage)
        for document in documents(storage):
            if document.mend(storage):
                yield document.path if document.damage is not None else document.path + files.COPY


def _still_bad(storage: Storage, found: Sequence[Finding]) -> dict[str, str]:
    """The kind of finding by the path of each artefact that is not used any more; what came back meanwhile is."""
    bad = {}
    for finding in found:
        if finding.kind in _MEANING_LOST:
            bad[finding.artefact] = finding.kind
        elif finding.kind in _BYTES_LOST and not finding.artefact.startswith(files.FOLDERS["encoder"]):
            bad.setdefault(finding.artefact, finding.kind)
    history = History.read(storage)
    entries = {made.path: made for manifest in history.manifests.values() for made in manifest.artefacts}
    return {
        path: kind
        for path, kind in bad.items()
        if kind in _MEANING_LOST or path not in entries or not _whole(storage, entries[path])
    }


def _whole(storage: Storage, artefact: Artefact) -> bool:
    try:
        check_hash(check_size(storage, artefact), artefact)
    except StoreDamaged:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one commit changes in a head, and the head after it."""

    now: Snapshot
    committed: bool
    dropped: tuple[str, ...]
    add_again: tuple[str, ...]
    encode_again: tuple[str, ...]
    index_again: tuple[str, ...]
    recovered: Mapping[str, int]
    lost: Mapping[str, int]
    undone: tuple[str, ...]  # what is lost with whole generations, in sentences


def _followed(repository: Repository, bad: Mapping[str, str]) -> tuple[_Plan, list[str]]:
    """Commit what is whole; and, where the newest generation is lost, put away what only it named."""
    if not repository.snapshot().behind:
        return _commit(repository, bad, ()), []
    storage = repository.storage
    with storage.exclusive("collect"):
        left = unnamed(storage)
        tombstones = [path for path in left if is_tombstone(path)]
        # Before the commit, after which a collector may remove it; tombstones after it, because it is made from them.
        moved = [path for path in left if path not in tombstones and _quarantine(storage, path)]
        plan = _commit(repository, bad, tombstones)
        return plan, [*moved, *(path for path in tombstones if _quarantine(storage, path))]


def _undone(head: Snapshot, tombstones: Sequence[str]) -> Iterator[str]:
    """One sentence for each generation that is lost, and for each tombstone of it that is."""
    for number in range(head.generation + 1, head.newest_generation + 1):
        both = " with its copy" if head.storage.copies else ""
        yield (
            f"generation {number} is lost{both}: what it changed, deletions too, is undone. "
            "Next: look through quarantine/, and delete or add again what it had"
        )
    for path in tombstones:
        if rows_of(head.storage, path) is None:
            yield f"{Path(path).name}, which named deleted rows, cannot be read. Next: delete them again"


def _commit(repository: Repository, bad: Mapping[str, str], tombstones: Sequence[str]) -> _Plan:
    """Commit what is whole; nothing when the newest generation is."""
    salvages: list[Salvage] = []

    def propose(head: Snapshot) -> Proposal:
        salvages.append(Salvage.of(head, bad, History.read(head.storage, head.generation - 1)))
        proposal = salvages[-1].proposal()
        return replace(proposal, add=buried_again(transaction, head, proposal.drop_segments, tombstones))

    with repository.transaction("repair", repairs=True) as transaction:
        now = transaction.commit(propose)
    last = salvages[-1]
    after = {made.path for made in now.manifest.artefacts}
    return _Plan(
        now=now,
        committed=now.generation > last.head.generation,
        dropped=tuple(made.path for made in last.head.manifest.artefacts if made.path not in after),
        add_again=tuple(last.add_again()),
        encode_again=tuple(last.encode_again()),
        index_again=tuple(last.index_again()),
        recovered={name: rows.num_rows for name, rows in last.recovered.items() if rows.num_rows},
        lost={name: count for name, count in last.lost_rows().items() if count},
        undone=tuple(_undone(last.head, tombstones)),
    )


def _bad_documents(storage: Storage, found: Sequence[Finding]) -> Iterator[str]:
    """FORMAT.json, manifests and tags that are damaged with their copies, which follow; an old finding may be wrong."""
    for path in _bad_paths(storage, found):
        yield from (path, path + files.COPY)


def _bad_paths(storage: Storage, found: Sequence[Finding]) -> Iterator[str]:
    form = partial(read_published, storage, files.FORMAT, partial(unseal, name=files.FORMAT))
    for finding in found:
        path = finding.artefact
        if finding.kind == "format_damaged" and not _readable(form):
            yield path
        elif finding.kind == "manifest_damaged":
            number = generation_of(Path(path).name)
            if number is not None and not _readable(partial(load, storage, number)):
                yield path
        elif finding.kind in _TAGS and not _readable(partial(tagged, storage, Path(path).stem)):
            yield path


def _readable(read: Callable[[], object]) -> bool:
    try:
        read()
    except StoreUnreadable:
        raise
    except (OSError, NotFound):  # StoreDamaged is an OSError
        return False
    return True


def _quarantine(storage: Storage, path: str) -> bool:
    """Move a file or folder to quarantine/; False when it is not there any more."""
    folder, _, name = path.rpartition("/")
    target = f"{files.QUARANTINE}/{f'{folder}-' if folder else ''}{name}"
    if not storage.exists(path):
        return False
    storage.remove(target)  # of an earlier repair: this is the newer damage
    with suppress(FileNotFoundError):  # collected meanwhile
        storage.move(path, target)
        return True
    return False


def _documents(storage: Storage, found: Sequence[Finding], past: History) -> Iterator[str]:
    """Write FORMAT.json and HEAD.json again where they are damaged."""
    kinds = {finding.kind for finding in found}
    if "format_damaged" in kinds and not storage.exists(files.FORMAT):
        form = {
            "format": "isimed-store",
            "format_version": FORMAT_VERSION,
            "features": [],
            "store": files.new_id(),
            "created": past.manifests[min(past.manifests)].time,
        }
        with suppress(FileExistsError):
            storage.publish(files.FORMAT, seal(form))
        yield files.FORMAT
    if kinds & {"head_damaged", "head_missing"}:
        storage.replace(files.HEAD, seal({"generation": max(past.manifests)}))
        yield files.HEAD


def _unmended(found: Sequence[Finding], kept: Set[str], rows: Mapping[str, int]) -> Iterator[str]:
    """One sentence for each thing that stays as it is."""
    for finding in found:
        is_encoder = finding.artefact.startswith(f"{files.FOLDERS['encoder']}/")
        if is_encoder and finding.artefact in kept:
            yield f"{finding.message}. Next: restore it from a backup, or isimed delete --encoder"
    if rows.get("labels"):
        yield f"{rows['labels']} rows of labels are lost. Next: isimed delete the scans without, and add them again"
    if rows.get("transforms"):
        yield f"{rows['transforms']} transforms are lost. Next: isimed register"
    if rows.get("matches"):
        yield f"{rows['matches']} rows of kept answers are lost. Next: ask again"
