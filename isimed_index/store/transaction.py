"""Writing: stage artefacts, then publish a manifest that names them.

    intent + kernel lock → stage under new ULIDs → fsync every file and new folder → hash, verify
    → propose against the head → manifest to tmp/, fsync → link to manifests/N+1 (the commit point) → fsync the folder

When another process commits first, the link fails and `propose` is called again with the new head (a rebase). A
process that dies leaves staged artefacts that no manifest names: they take room and are otherwise harmless.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from isimed_index.contracts import conform, validate
from isimed_index.errors import StoreDamaged, StoreLocked, UsageError
from isimed_index.store import files
from isimed_index.store.checks import check_content, check_references, check_rows
from isimed_index.store.integrity import check_there
from isimed_index.store.manifest import Artefact, Manifest, is_there, listed, load, manifest_name, seal, utc_now
from isimed_index.store.place.claims import Claim
from isimed_index.store.place.faults import fault_of, told
from isimed_index.store.segment import Segment, part_keys, parts_of
from isimed_index.store.snapshot import Snapshot, StoredTable

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.store.repository import Repository

_ATTEMPTS = 200  # conflicts in a row before a commit gives up; the wait is random, up to _LONGEST_WAIT_S
_LONGEST_WAIT_S = 0.5
_MOST_ROWS = 1 << 24  # that one commit gives ids to
_FILE = ".parquet"  # artefacts with this suffix are files, all others folders
_FEATURES: Mapping[str, Callable[[Artefact], bool]] = {  # what a reader must know to read a generation rightly
    "matches": lambda artefact: artefact.fields.get("table") == "matches",
    "packed-segments": lambda artefact: "parts" in artefact.fields,
    "regions": lambda artefact: artefact.kind == "region",
    "tombstones": lambda artefact: artefact.kind == "tombstone",
    "transforms": lambda artefact: artefact.kind == "reference" or artefact.fields.get("table") == "transforms",
}


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a commit would change in the head that it was computed from."""

    add: Sequence[Artefact] = ()  # from `Transaction.add`
    drop: Sequence[str] = ()  # paths of artefacts that the next generation no longer names
    drop_segments: Sequence[Segment] = ()  # of the head; of a packed one, that part alone
    tables: Mapping[StoredTable, pa.Table] = field(default_factory=dict)  # rows to append
    rewrite: Mapping[StoredTable, pa.Table] = field(default_factory=dict)  # all rows of a table, in place of its pieces
    buried: Sequence[str] = ()  # paths of tombstones whose rows the packed segments in `add` were written without
    become: Manifest | None = None  # an older generation whose artefacts the next one has; nothing else then

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        appended = any(rows.num_rows for rows in self.tables.values())
        return not (self.add or self.drop or self.drop_segments or appended or self.rewrite or self.become)


class _ConflictError(Exception):
    """Another process published this generation first."""


class Transaction:
    """One writer; leaving it removes what was staged and not committed. It may commit several times."""

    def __init__(self, repository: Repository, verb: str, *, repairs: bool = False) -> None:
        self.repository = repository
        self.verb = verb
        self.repairs = repairs  # whether it may commit after a head that is damaged
        self.id = files.new_id()
        self._storage = repository.storage
        self._root = repository.storage.root
        self._claim: Claim | None = None
        self._staged: set[str] = set()  # paths that are ours to remove on leaving

    def __enter__(self) -> Transaction:
        with told(self._root):
            self._claim = self._storage.claim(files.INTENTS, self.id)
            try:
                self._claim.note({"verb": self.verb, "time": utc_now(), "process": os.getpid()})
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fault = fault_of(error, self._root)  # before room is made
        self._leave()
        if fault is not None:
            raise fault from error

    def _leave(self) -> None:
        try:
            for relative in sorted(self._staged):
                self._storage.remove(relative)
        finally:
            self._staged.clear()
            if self._claim is not None:
                self._claim.release()
                self._claim = None

    def stage(self, kind: str) -> Path:
        """A new place for an artefact: an empty folder; for a table or tombstone, the path of a file to be written."""
        if self._claim is None:
            raise UsageError("a transaction stages inside its `with` block only")
        relative = f"{files.FOLDERS[kind]}/{files.new_id()}{files.SUFFIXES.get(kind, '')}"
        self._claim.note({"staged": relative})  # first, so that a collector knows it has an owner
        self._staged.add(relative)
        path = self._root / relative
        files.make_folder(path.parent)
        if not relative.endswith(_FILE):
            path.mkdir()
        return path

    def add(self, kind: str, path: Path, **fields: Any) -> Artefact:
        """Make a staged artefact durable, check it against its contract, hash it and describe it."""
        relative = path.relative_to(self._root).as_posix()
        if relative not in self._staged:
            raise UsageError(f"{path.name} was not staged by this transaction")
        check_content(kind, path, fields)
        self._storage.seal(relative)
        digest = files.tree_digest(path)
        artefact = Artefact(kind, relative, digest.bytes, digest.files, digest.sha256, fields)
        # Row ids are given when the commit is sequenced; any number stands in for them until then.
        given = {"first_row_id": 0} if kind == "segment" and "parts" not in fields else {}
        validate("artefact", {**given, **artefact.to_json()}, UsageError)
        return artefact

    def commit(self, propose: Callable[[Snapshot], Proposal]) -> Snapshot:
        """Publish the next generation and return it pinned; an empty proposal returns the head unchanged.

        `propose` is called with the head, and again with the new one after each conflict; it must not depend on what
        an earlier call returned. `StoreLocked` when conflicts do not end, `StoreDamaged` when the head is damaged.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(_ConflictError),
            wait=wait_random_exponential(multiplier=0.005, max=_LONGEST_WAIT_S),
            stop=stop_after_attempt(_ATTEMPTS),
            reraise=True,
        )
        try:
            return retrying(self._attempt, propose)
        except _ConflictError:
            raise StoreLocked(
                f"{_ATTEMPTS} attempts to commit met another writer's commit", next_step="try again later"
            ) from None

    def _attempt(self, propose: Callable[[Snapshot], Proposal]) -> Snapshot:
        head = self._head()
        if head.behind and not self.repairs:
            raise StoreDamaged(
                "the newest generation of the store is damaged, so nothing can be added", next_step=files.REPAIR
            )
        proposal = propose(head)
        if proposal.empty and not head.behind:
            return head
        manifest = self._restored(head, proposal.become) if proposal.become else self._changed(head, proposal)
        before = {artefact.path for artefact in head.manifest.artefacts}
        self._publish(manifest, [artefact.path for artefact in manifest.artefacts if artefact.path not in before])
        return Snapshot(self._storage, manifest)

    def _head(self) -> Snapshot:
        """The newest generation, named in the intent.

        A collector leaves it and the one after it alone: what is read of it stays, and the link that publishes its
        successor cannot fall into a gap that a collector made among newer generations. The collector lists generations
        before it reads intents, so whoever could take this one away would have listed a newer one.
        """
        if self._claim is None:
            raise UsageError("a transaction commits inside its `with` block only")
        while True:
            head = self.repository.snapshot()
            self._claim.note({"head": head.newest_generation})
            if max(listed(self._storage)) <= head.newest_generation:
                return head

    def _restored(self, head: Snapshot, old: Manifest) -> Manifest:
        for artefact in old.artefacts:
            check_there(self._storage, artefact)
        return _successor(head, self.verb, old.artefacts, max(head.manifest.next_row_id, old.next_row_id))

    def _changed(self, head: Snapshot, proposal: Proposal) -> Manifest:
        pieces = [self._write_piece(head, proposal, name) for name, rows in proposal.tables.items() if rows.num_rows]
        rewritten = [
            self._write_table(name, conform(name, rows)) for name, rows in proposal.rewrite.items() if rows.num_rows
        ]
        replaced = [piece.path for piece in head.artefacts("table") if piece.fields["table"] in proposal.rewrite]
        manifest = _next_manifest(head, self.verb, proposal, [*proposal.drop, *replaced], [*rewritten, *pieces])
        self._storage.settle([artefact.path for artefact in (*proposal.add, *rewritten, *pieces)])
        return manifest

    def _write_piece(self, head: Snapshot, proposal: Proposal, name: StoredTable) -> Artefact:
        """Rows of one table as a piece of their own, checked against the rows that the head has."""
        return self._write_table(name, check_rows(head, name, proposal.tables[name], proposal.add))

    def _write_table(self, name: StoredTable, rows: pa.Table) -> Artefact:
        import pyarrow.parquet as pq

        path = self.stage("table")
        pq.write_table(rows, path, compression="zstd")
        return self.add("table", path, table=name, rows=rows.num_rows)

    def _publish(self, manifest: Manifest, added: Sequence[str]) -> None:
        ours = self._staged & set(added)
        # From here on a failure may leave the commit done: its artefacts are not ours to remove any more.
        self._staged -= ours
        try:
            self._storage.publish(manifest_name(manifest.generation), manifest.to_bytes())
        except OSError as error:
            if not isinstance(error, FileExistsError):
                if fault_of(error, self._root) and not is_there(self._storage, manifest.generation):
                    self._staged |= ours  # there was no link: what fills the disk is to go
                raise
            # A network file system may lose the answer to a link that it made: the write id tells.
            if load(self._storage, manifest.generation).write_id != manifest.write_id:
                self._staged |= ours
                raise _ConflictError from None
            self._storage.settle([manifest_name(manifest.generation)])
        with suppress(OSError):  # it is a hint; the commit is done, and must not be reported as failed
            self._storage.replace(files.HEAD, seal({"generation": manifest.generation}))


def _next_manifest(
    head: Snapshot, verb: str, proposal: Proposal, drop: Sequence[str], pieces: Sequence[Artefact]
) -> Manifest:
    """The head's successor: dropped artefacts out, new ones in, row ids given; references must hold."""
    before = {artefact.path: artefact for artefact in head.manifest.artefacts}
    missing = [path for path in drop if path not in before]
    if missing:
        raise UsageError(f"{Path(missing[0]).name} is not in the store, so it cannot be dropped")
    dropped = set(drop)
    gone = {(segment.path, segment.first_row_id) for segment in proposal.drop_segments}
    kept = [
        left
        for path, artefact in before.items()
        if path not in dropped and (left := _without_parts(artefact, gone)) is not None
    ]
    # A damaged generation may have given row ids away that indexes, tombstones or exported files still know.
    next_row_id = first_row_id = head.manifest.next_row_id + _MOST_ROWS * (head.newest_generation - head.generation)
    added = []
    for artefact in (*proposal.add, *pieces):
        if artefact.path in before:
            raise UsageError(f"{artefact.name} is in the store already")
        if artefact.kind == "segment" and "parts" not in artefact.fields:  # a packed one brings its row ids along
            artefact = replace(artefact, fields={**artefact.fields, "first_row_id": next_row_id})
            next_row_id += artefact.fields["rows"]
        added.append(artefact)
    if next_row_id - first_row_id > _MOST_ROWS:  # what a repair leaves free for a lost generation
        raise UsageError(
            f"expected at most {_MOST_ROWS} new rows in a commit, found {next_row_id - first_row_id}",
            next_step="commit fewer segments at a time",
        )
    kept = _tombstones_left(kept, added, set(proposal.buried))
    check_references(kept, added, next_row_id)
    return _successor(head, verb, (*kept, *added), next_row_id)


def _tombstones_left(kept: Sequence[Artefact], added: Sequence[Artefact], buried: Set[str]) -> list[Artefact]:
    """`kept` with each tombstone naming only rows that segments still hold; one that names none is gone."""
    packed = {key for artefact in added if "parts" in artefact.fields for key in part_keys(artefact)}
    there = {key for artefact in (*kept, *added) if artefact.kind == "segment" for key in part_keys(artefact)}
    left = []
    for artefact in kept:
        if artefact.kind == "tombstone":
            live = there - packed if artefact.path in buried else there
            dead = {key: rows for key, rows in artefact.fields["dead"].items() if key in live}
            if not dead:
                continue
            artefact = replace(artefact, fields={**artefact.fields, "dead": dead})
        left.append(artefact)
    return left


def _without_parts(artefact: Artefact, gone: Set[tuple[str, int]]) -> Artefact | None:
    """A segment artefact without the parts that are dropped; None when none is left."""
    if artefact.kind != "segment" or not gone:
        return artefact
    parts = parts_of(artefact)
    left = [part for part in parts if (artefact.path, part["first_row_id"]) not in gone]
    if len(left) == len(parts):
        return artefact
    return replace(artefact, fields={**artefact.fields, "parts": left}) if left else None


def _successor(head: Snapshot, verb: str, artefacts: Sequence[Artefact], next_row_id: int) -> Manifest:
    used = {feature for feature, is_used in _FEATURES.items() if any(map(is_used, artefacts))}
    return Manifest(
        generation=head.newest_generation + 1,
        parent=(head.generation, head.manifest.sha256),
        write_id=files.new_id(),
        time=max(utc_now(), head.manifest.time),  # a clock set back must not reorder the history
        verb=verb,
        next_row_id=next_row_id,
        artefacts=tuple(artefacts),
        features=tuple(sorted(used)),
    )
