"""Whether indexes keep what they promise: recall@10 measured again, without and with filters, over what lives now.

Other rows ask than when the index was built. What was deleted or came since counts, as it does for those who search.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from isimed_index.errors import IsimedError, StoreWarning
from isimed_index.index.card import IndexCard
from isimed_index.index.plan import measure_again
from isimed_index.neighbours import Neighbours
from isimed_index.progress import Progress, Silent
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.upkeep.findings import Finding


def broken_promises(repository: Repository, progress: Progress | None = None) -> list[Finding]:
    """A finding for each index of the newest generation whose recall is below what it was built for.

    Below means with a confidence of 95 %. Damaged indexes are left out: the audit names them.
    """
    told = progress or Silent()
    found: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        try:
            head = repository.pin()
        except IsimedError:
            return []  # the audit tells why there is nothing to measure
        with head:
            artefacts = [head.newest("index", encoder) for encoder in _encoders(head)]
            told.start("recall", len(artefacts), "indexes")
            for artefact in artefacts:
                if artefact is not None:
                    found += _below(head, artefact)
                told.advance(1)
            told.finish()
    return found


def _encoders(head: Snapshot) -> list[str]:
    return sorted({artefact.fields["encoder"] for artefact in head.artefacts("index")})


def _below(head: Snapshot, artefact: Artefact) -> Iterator[Finding]:
    try:
        neighbours = Neighbours(head, artefact.fields["encoder"])
        path = head.index_path(neighbours.card.id)
        if path is None:
            return
        card, live = IndexCard.read(path), neighbours.index
    except IsimedError:
        return
    if live.index is None:
        return
    below = [one for one in measure_again(live) if one.at_most < card.min_recall]
    if below:
        measured = ", ".join(f"{one.recall:.4f} ({one.name})" for one in below)
        message = f"recall@10 is {measured}, and was promised to be {card.min_recall:g}"
        yield Finding.of(
            "recall_below_target", artefact.path, message, severity="warning", generations=[head.generation]
        )
