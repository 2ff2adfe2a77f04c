"""Restoring: a new generation that holds what an old one held. Nothing is lost by it: the head stays in the history."""

from __future__ import annotations

from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal


def restore(repository: Repository, generation: int | None = None, tag: str | None = None) -> Snapshot:
    """Commit a generation that equals an old one and return it; the head unchanged when it equals that already.

    `NotFound` when there is no such generation or tag; `StoreDamaged` when something that it names is gone.
    """
    with repository.pin(generation, tag) as old, repository.transaction("restore") as transaction:

        def propose(head: Snapshot) -> Proposal:
            same = head.manifest.artefacts == old.manifest.artefacts
            return Proposal() if same else Proposal(become=old.manifest)

        return transaction.commit(propose)
