"""Writing: stage artefacts, then publish a manifest that names them.

    intent + kernel lock → stage under new ULIDs → fsync every file and new folder → hash, verify
    → propose against the head → manifest to tmp/, fsync → link to manifests/N+1 (the commit point) → fsync the folder

When another process commits first, the link fails and `propose` is called again with the new head (a rebase). A
process that dies leaves staged artefacts that no manifest names: they take room and are otherwise harmless.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from isimed_index.contracts import validate
from isimed_index.errors import StoreDamaged, StoreLocked, UsageError
from isimed_index.store import files
from isimed_index.store.checks import check_content, check_references, check_rows
from isimed_index.store.manifest import Artefact, Manifest, canonical, load, manifest_path, seal, utc_now
from isimed_index.store.snapshot import Snapshot, StoredTable

if TYPE_CHECKING:
    import pyarrow as pa

    from isimed_index.store.repository import Repository

_ATTEMPTS = 200  # conflicts in a row before a commit gives up; the wait is random, up to _LONGEST_WAIT_S
_LONGEST_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a commit would change in the head that it was computed from."""

    add: Sequence[Artefact] = ()  # from `Transaction.add`
    drop: Sequence[str] = ()  # paths of artefacts that the next generation no longer names
    tables: Mapping[StoredTable, pa.Table] = field(default_factory=dict)  # rows to append to scans, subjects, labels

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        return not (self.add or self.drop or any(rows.num_rows for rows in self.tables.values()))


class _ConflictError(Exception):
    """Another process published this generation first."""


class Transaction:
    """One writer; leaving it removes what was staged and not committed. It may commit several times."""

    def __init__(self, repository: Repository, verb: str) -> None:
        self.repository = repository
        self.verb = verb
        self.id = files.new_id()
        self._root = repository.path
        self._intent = self._root / files.INTENTS / f"{self.id}.jsonl"
        self._lock = FileLock(self._intent.with_suffix(".lock"), thread_local=False)
        self._staged: set[str] = set()  # paths that are ours to remove on leaving

    def __enter__(self) -> Transaction:
        self._lock.acquire()
        self._note({"verb": self.verb, "time": utc_now(), "process": os.getpid()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for relative in sorted(self._staged):
            self._remove(relative)
        self._intent.unlink(missing_ok=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def stage(self, kind: str) -> Path:
        """A new place for an artefact: an empty folder, or for a table the path of a file yet to be written."""
        if not self._lock.is_locked:
            raise UsageError("a transaction stages inside its `with` block only")
        relative = f"{files.FOLDERS[kind]}/{files.new_id()}{files.SUFFIXES.get(kind, '')}"
        self._note({"staged": relative})  # first, so that a collector knows it has an owner
        self._staged.add(relative)
        path = self._root / relative
        if kind != "table":
            path.mkdir()
        return path

    def add(self, kind: str, path: Path, **fields: Any) -> Artefact:
        """Make a staged artefact durable, check it against its contract, hash it and describe it."""
        relative = path.relative_to(self._root).as_posix()
        if relative not in self._staged:
            raise UsageError(f"{path.name} was not staged by this transaction")
        check_content(kind, path, fields)
        files.sync_tree(path)
        digest = files.tree_digest(path)
        artefact = Artefact(kind, relative, digest.bytes, digest.files, digest.sha256, fields)
        # Row ids are given when the commit is sequenced; any number stands in for them until then.
        validate("artefact", {"first_row_id": 0, **artefact.to_json()}, UsageError)
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
        head = self.repository.snapshot()
        if head.behind:
            raise StoreDamaged(
                "the newest generation of the store is damaged, so nothing can be added", next_step=files.RESTORE
            )
        proposal = propose(head)
        if proposal.empty:
            return head
        pieces = [self._write_piece(head, proposal, name) for name, rows in proposal.tables.items() if rows.num_rows]
        manifest = _next_manifest(head, self.verb, proposal, pieces)
        added = [artefact.path for artefact in (*proposal.add, *pieces)]
        for folder in sorted({path.split("/")[0] for path in added}):
            files.sync_file(self._root / folder)
        self._publish(manifest, added)
        return Snapshot(self._root, manifest)

    def _write_piece(self, head: Snapshot, proposal: Proposal, name: StoredTable) -> Artefact:
        """Rows of one table as a piece of their own, checked against the rows that the head has."""
        import pyarrow.parquet as pq

        rows = check_rows(head, name, proposal.tables[name], proposal.add)
        path = self.stage("table")
        pq.write_table(rows, path, compression="zstd")
        return self.add("table", path, table=name, rows=rows.num_rows)

    def _publish(self, manifest: Manifest, added: Sequence[str]) -> None:
        ours = self._staged & set(added)
        # From here on a failure may leave the commit done: its artefacts are not ours to remove any more.
        self._staged -= ours
        try:
            files.publish(self._root, manifest_path(self._root, manifest.generation), manifest.to_bytes())
        except FileExistsError:
            # A network file system may lose the answer to a link that it made: the write id tells.
            if load(self._root, manifest.generation).write_id != manifest.write_id:
                self._staged |= ours
                raise _ConflictError from None
            files.sync_file(self._root / files.MANIFESTS)
        files.replace_hint(self._root, self._root / files.HEAD, seal({"generation": manifest.generation}))

    def _note(self, entry: Mapping[str, Any]) -> None:
        with self._intent.open("ab") as stream:
            stream.write(canonical(entry) + b"\n")

    def _remove(self, relative: str) -> None:
        path = self._root / relative
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        self._staged.discard(relative)


def _next_manifest(head: Snapshot, verb: str, proposal: Proposal, pieces: Sequence[Artefact]) -> Manifest:
    """The head's successor: dropped artefacts out, new ones in, row ids given; references must hold."""
    before = {artefact.path: artefact for artefact in head.manifest.artefacts}
    missing = [path for path in proposal.drop if path not in before]
    if missing:
        raise UsageError(f"{Path(missing[0]).name} is not in the store, so it cannot be dropped")
    dropped = set(proposal.drop)
    kept = [artefact for path, artefact in before.items() if path not in dropped]
    next_row_id = head.manifest.next_row_id
    added = []
    for artefact in (*proposal.add, *pieces):
        if artefact.path in before:
            raise UsageError(f"{Path(artefact.path).name} is in the store already")
        if artefact.kind == "segment":
            artefact = replace(artefact, fields={**artefact.fields, "first_row_id": next_row_id})
            next_row_id += artefact.fields["rows"]
        added.append(artefact)
    check_references(kept, added)
    return Manifest(
        generation=head.generation + 1,
        parent=(head.generation, head.manifest.sha256),
        write_id=files.new_id(),
        time=max(utc_now(), head.manifest.time),  # a clock set back must not reorder the history
        verb=verb,
        next_row_id=next_row_id,
        artefacts=(*kept, *added),
        features=head.manifest.features,
    )
