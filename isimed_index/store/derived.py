"""Committing what is derived from segments, of which an encoder has one at a time: a frame, regions, an index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

from isimed_index.store.manifest import Artefact
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction

Derived = Literal["frame", "index", "region"]


def commit_derived(transaction: Transaction, artefact: Artefact, made_from: Mapping[Derived, Artefact | None]) -> bool:
    """Commit an artefact in place of the newest of its kind, which is no longer named then.

    `made_from` says by kind, its own among them, what was the newest of its encoder when it was made; None: there was
    none. False, and nothing is committed, when another process has committed another one of these since.
    """
    encoder, before = artefact.fields["encoder"], made_from[cast(Derived, artefact.kind)]

    def propose(now: Snapshot) -> Proposal:
        if any(_path(now.newest(kind, encoder)) != _path(known) for kind, known in made_from.items()):
            return Proposal()
        return Proposal(add=[artefact], drop=[before.path] if before else [])

    return artefact.path in {found.path for found in transaction.commit(propose).artefacts(artefact.kind)}


def _path(artefact: Artefact | None) -> str | None:
    return None if artefact is None else artefact.path
