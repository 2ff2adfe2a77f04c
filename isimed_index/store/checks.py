"""What must hold before anything is committed: contents, references between artefacts, keys of tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isimed_index.contracts import conform, table_contract, validate
from isimed_index.errors import EncoderMismatch, UsageError
from isimed_index.store.files import CARD, DERIVED, MODEL, WEIGHTS, file_digest
from isimed_index.store.manifest import Artefact
from isimed_index.store.segment import check_segment, parts_of
from isimed_index.store.snapshot import Snapshot, StoredTable

if TYPE_CHECKING:
    import pyarrow as pa

_NOUN = {"index": "an index covers", "region": "regions cover"}


def check_content(kind: str, path: Path, fields: Mapping[str, Any]) -> None:
    """Open what a staged segment or encoder holds and compare it with its manifest fields."""
    if kind == "segment":
        check_segment(path, fields)
    elif kind == "encoder":
        _check_card(path, fields)


def _check_card(path: Path, fields: Mapping[str, Any]) -> None:
    card = json.loads((path / CARD).read_text(encoding="utf-8"))
    validate("card", card, UsageError)
    if card["id"] != fields.get("encoder"):
        raise EncoderMismatch("an encoder's card carries another id than its manifest entry")
    if card["match_output"] not in card["outputs"]:
        raise UsageError(f"the card's match_output {card['match_output']!r} is not among its outputs")
    for name, sha256 in ((WEIGHTS, card["weights_sha256"]), (MODEL, card.get("model_sha256"))):
        if sha256 is not None and (not (path / name).is_file() or file_digest(path / name)[1] != sha256):
            raise EncoderMismatch(f"{name} does not match the sha256 on its card", next_step="isimed pretrain")


def check_references(kept: Sequence[Artefact], added: Sequence[Artefact], next_row_id: int) -> None:
    """New artefacts may name only what the same generation holds, and an index covers one encoder's rows."""
    everything = [*kept, *added]
    encoders = {artefact.fields["encoder"] for artefact in everything if artefact.kind == "encoder"}
    scans = {artefact.path for artefact in everything if artefact.kind == "scan"}
    for artefact in added:
        encoder = artefact.fields.get("encoder")
        if artefact.kind in ("segment", *DERIVED) and encoder not in encoders:
            raise EncoderMismatch(
                f"a {artefact.kind} was made by the encoder {str(encoder)[:12]!r}, which is not in the store",
                next_step="isimed ls encoders",
            )
        if artefact.kind == "segment" and any(part["scan_artefact"] not in scans for part in parts_of(artefact)):
            raise UsageError("a segment was made from a scan that is not in the store", next_step="isimed ls")
        if artefact.kind in ("index", "region"):
            check_coverage(artefact, everything, next_row_id)


def check_coverage(index: Artefact, everything: Sequence[Artefact], next_row_id: int) -> None:
    """What an index (or regions) covers are row ids that were given, none to a segment of another encoder."""
    covers = np.array(index.fields["covers"], dtype=np.int64).reshape(-1, 2)  # (r, 2) rising half-open ranges
    if (np.diff(covers.ravel()) <= 0).any() or (covers.size and not 0 <= covers[0, 0] < covers[-1, 1] <= next_row_id):
        raise UsageError(f"{_NOUN[index.kind]} rows that are not in the store", next_step="isimed index")
    others = [
        (part["first_row_id"], part.get("end_row_id", part["first_row_id"] + artefact.fields["rows"]))
        for artefact in everything
        if artefact.kind == "segment" and artefact.fields["encoder"] != index.fields["encoder"]
        for part in parts_of(artefact)
    ]
    if not others or not covers.size:
        return
    first, end = np.array(others, dtype=np.int64).T
    place = np.searchsorted(covers[:, 1], first, side="right")  # the first range that ends behind each segment's start
    inside = place < len(covers)
    if (covers[place[inside], 0] < end[inside]).any():
        raise EncoderMismatch(f"{_NOUN[index.kind]} segments of another encoder", next_step="isimed index")


def check_rows(head: Snapshot, name: StoredTable, rows: pa.Table, added: Sequence[Artefact]) -> pa.Table:
    """`rows` in the table's contract, or `UsageError` when they would not stand beside the rows that are there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = conform(name, rows)
    there = head.table(name)
    try:
        together = pa.concat_tables([there, rows], promote_options="permissive")
    except pa.ArrowException as error:
        raise UsageError(f"table {name}: a column has another type than in the store: {error}") from None
    folded = [column.casefold() for column in together.column_names]
    if len(set(folded)) < len(folded):
        raise UsageError(f"table {name}: a column is in the store already but for upper and lower case")
    key = table_contract(name)["key"]
    counts = together.select(key).group_by(key).aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1))
    if twice.num_rows:
        what = ", ".join(str(twice[column][0].as_py()) for column in key)
        raise UsageError(f"table {name}: {what} is there already", next_step="leave out what the store holds")
    if name == "scans":
        known = {artefact.path for artefact in (*head.manifest.artefacts, *added) if artefact.kind == "scan"}
        if not known.issuperset(rows.column("artefact").to_pylist()):
            raise UsageError("table scans: a row names voxels that are not in the store")
    return rows
