"""Whether indexes keep what they promise: recall@10 measured again, without and with filters, over what lives now.

Other rows ask than when the index was built. What was deleted or came since counts, as it does for those who search.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from isimed_index.errors import IsimedError, StoreWarning
from isimed_index.index.card import IndexCard, row_ranges
from isimed_index.index.plan import measure_again
from isimed_index.neighbours import Neighbours
from isimed_index.progress import Progress, Silent
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.upkeep.findings import NOTHING, Finding


def broken_promises(repository: Repository, progress: Progress | None = None) -> list[Finding]:
    """A finding for each index of the newest generation whose recall is below what it was built for.

    Below means with a confidence of 95 % for all filters of an index together (Bonferroni). Damaged indexes are left
    out: the audit names them.
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
    below = [one for one in measure_again(live, centres=neighbours.common_mm()) if one.at_most < card.min_recall]
    if below:
        measured = ", ".join(f"{one.recall:.4f} ({one.name})" for one in below)
        message = f"recall@10 is {measured}, and was promised to be {card.min_recall:g}"
        changed = card.row_ranges != row_ranges([row_ids for row_ids, _ in live.exact.blocks])
        step = _next_step(neighbours.card.id, card, changed)
        yield Finding.of(
            "recall_below_target",
            artefact.path,
            message,
            severity="warning",
            generations=[head.generation],
            repair=f"{NOTHING}{step}",
        )


def _next_step(encoder: str, card: IndexCard, changed: bool) -> str:
    """What mends the recall: an index of the rows that live now, or of the same rows for a target halfway to 1."""
    target = card.min_recall if changed else (1 + card.min_recall) / 2
    if not changed and target == card.min_recall:
        return "isimed query --exact asks without the index"
    limits = f" --max-ram {card.max_ram_bytes}" if card.max_ram_bytes is not None else ""
    limits += f" --max-latency {card.max_latency_ms:g}" if card.max_latency_ms is not None else ""
    return f"isimed index --encoder {encoder} --min-recall {target:g}{limits}"
