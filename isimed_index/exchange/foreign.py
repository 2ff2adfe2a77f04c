"""Embeddings of other programs, with a card that describes them, as if an encoder of the store had made them.

    table, or arrays beside a table ─▶ points in RAS+ mm, inside their scans ─▶ one regular lattice a scan ─▶ segments

Lookup asks neighbours on a lattice, so positions that form none are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from isimed_index.encode import grid_key, task_key
from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import EncoderMismatch, NotFound, OutsideScan, UsageError
from isimed_index.exchange.columns import no_shares
from isimed_index.exchange.geometry import Points, Regular, attributes_of, count_outside, read_scans, regular
from isimed_index.exchange.given import Foreign, foreign_card, read_foreign
from isimed_index.exchange.incoming import (
    Batch,
    Imported,
    commit,
    named,
    refuse_other_card,
    refuse_other_content,
    rows_of,
)
from isimed_index.ingest.add import BATCH
from isimed_index.lattice import ScanGeometry
from isimed_index.progress import Progress, Silent
from isimed_index.space import apply_affine, flip_lps
from isimed_index.store.files import CARD
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.segment import LATTICE, Segment, write_segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Transaction

if TYPE_CHECKING:
    import pyarrow as pa

_MM, _IJK = ("x_mm", "y_mm", "z_mm"), ("i", "j", "k")
_HELP = "isimed import --help"


@dataclass(frozen=True, slots=True)
class _Embedded:
    """The embeddings of one scan, in the order of their lattice."""

    scan: str
    at: ScanGeometry
    lattice: Regular
    points: Points  # (n, 3) RAS+ mm
    foreground: NDArray[np.float32]
    numbers: NDArray[np.int64]  # rows of `Foreign`, (n,)


def import_embeddings(
    repository: Repository,
    source: Path,
    card_file: Path,
    space: Literal["ras", "lps"] = "ras",
    scans_file: Path | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Import the embeddings in a Parquet file, or in a folder of `<output>.npy` beside a table `patches`.

    Args:
        source: rows with `scan` and a patch centre: `x_mm`, `y_mm`, `z_mm` in patient mm, or else `i`, `j`, `k`, voxel
            indices of the scan's own file; and one column of vectors, or one array, for each output of the card.
        card_file: the encoder's card; see `foreign_card`.
        space: whether the millimetres are RAS+ or LPS+.
        scans_file: shape and affine of scans that are not in the store; they get no voxels.

    Errors: `NotFound` for scans that are not there, `OutsideScan` for positions outside of them, `EncoderMismatch` for
    vectors that are not as on the card, NaN or infinite, `UsageError` for positions that form no lattice. Nothing is
    committed then.
    """
    progress = progress or Silent()
    card = foreign_card(card_file)
    given = read_foreign(source, card)
    head = repository.pin()
    refuse_other_card(head, card.to_json())
    new = read_scans(scans_file)
    refuse_other_content(head, new.rows)
    embedded = _placed(head, given, new.geometry, card, space)
    _refuse_other_vectors(head, card, embedded, given)
    there = set(head.scan_ids())
    patches = 0
    progress.start("import", len(embedded), "scans")
    with repository.transaction("import") as transaction:
        encoder = _encoder(transaction, card)
        for start in range(0, len(embedded), BATCH):
            some = embedded[start : start + BATCH]
            batch = _batch(transaction, repository.pin(), new.tables, given, card, some)
            now, count = commit(transaction, Batch(*batch, [encoder]))
            patches += count
            progress.advance(len(some), f"{patches:,} patches")
    progress.finish()
    scans = [one.scan for one in embedded]
    known = {artefact.fields["encoder"] for artefact in head.artefacts("encoder")}
    return Imported(
        now.generation,
        [scan for scan in scans if scan not in there],
        [scan for scan in scans if scan in there],
        [] if card.id in known else [card.id],
        patches,
    )


def _placed(
    head: Snapshot, given: Foreign, new: Mapping[str, ScanGeometry], card: EncoderCard, space: str
) -> list[_Embedded]:
    """Rows by scan, each inside its scan and on a lattice; all scans are looked at before the first is refused."""
    groups = _by_scan(given.rows)
    geometry = {scan: new.get(scan) for scan in groups}
    there = set(head.scan_ids())
    unknown = [scan for scan, at in geometry.items() if at is None and scan not in there]
    if unknown:
        raise NotFound(f"{named(unknown)} not in the store", next_step="add it, or describe it in --scans FILE")
    outside, found = [], []
    for scan, numbers in groups.items():
        at = geometry[scan] or stored_geometry(head, scan)
        points = _points(given.rows, numbers, at, space)
        bad = count_outside(points, at, card.spacing_mm)
        if bad:
            outside.append(f"{scan} ({bad} of {len(points)})")
        elif not outside:
            lattice = regular(scan, points, at, card)
            order = np.lexsort(lattice.ijk.T[::-1])  # x first, z fastest, as patches of the store are
            foreground = _foreground(given.rows, numbers)
            lattice = replace(lattice, ijk=lattice.ijk[order])
            found.append(_Embedded(scan, at, lattice, points[order], foreground[order], numbers[order]))
    if outside:
        raise OutsideScan(
            f"positions lie outside of their scan: {', '.join(outside[:3])}; {len(outside)} of {len(groups)} scans",
            next_step="check whether they are RAS or LPS millimetres (--space), and of this very scan",
        )
    return found


def _by_scan(rows: pa.Table) -> dict[str, NDArray[np.int64]]:
    """Row numbers of each scan, in the order in which scans first occur."""
    if "scan" not in rows.column_names or not rows.num_rows or rows["scan"].null_count:
        raise UsageError("expected a column 'scan' that names a scan in every row", next_step=_HELP)
    codes = rows["scan"].combine_chunks().dictionary_encode()
    numbers = codes.indices.to_numpy()
    return {scan: np.flatnonzero(numbers == code) for code, scan in enumerate(codes.dictionary.to_pylist())}


def _points(rows: pa.Table, numbers: NDArray[np.int64], at: ScanGeometry, space: str) -> Points:
    there = set(rows.column_names)
    names = _MM if set(_MM) <= there else _IJK
    if not set(names) <= there:
        raise UsageError("expected the columns x_mm, y_mm, z_mm, or i, j, k", next_step=_HELP)
    points = np.stack([_column(rows, name, numbers).astype(np.float64) for name in names], axis=1)
    if not np.isfinite(points).all():
        raise UsageError("a position is missing, NaN or infinite", next_step="leave such rows out")
    if names is _IJK:
        return apply_affine(at.source_affine, points)
    return flip_lps(points) if space == "lps" else points


def _foreground(rows: pa.Table, numbers: NDArray[np.int64]) -> NDArray[Any]:
    if "foreground" not in rows.column_names:
        return np.ones(len(numbers), np.float32)  # nothing is known, so all of it
    shares = _column(rows, "foreground", numbers)
    if wrong := no_shares(shares):
        raise UsageError(
            f"foreground: expected shares from 0 to 1, found {wrong} others, or missing ones",
            next_step="mend the column, or leave it out",
        )
    return shares


def _column(rows: pa.Table, name: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
    try:
        values: NDArray[Any] = rows[name].to_numpy()[numbers].astype(np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"column {name}: expected numbers, found {rows[name].type}") from None
    return values


def stored_geometry(head: Snapshot, scan: str) -> ScanGeometry:
    """Where a stored scan's voxels lie."""
    from isimed_index.scans.chunks import open_chunks

    stored = open_chunks(head.chunks_path(scan), scan)
    return ScanGeometry.of(stored.shape, stored.affine, stored.attributes)


def _refuse_other_vectors(head: Snapshot, card: EncoderCard, embedded: Sequence[_Embedded], given: Foreign) -> None:
    """The same embeddings again are nothing new; others of the same scan and encoder are refused, not swapped in."""
    stored = head.segments_by_scan(card.id)
    other = [one.scan for one in embedded if one.scan in stored and not _same(stored[one.scan], one, given)]
    if other:
        raise EncoderMismatch(
            f"{named(other)} embedded by {card.name!r} already, with other vectors or places",
            next_step="give the card another training or stride, or isimed delete those scans first",
        )


def _same(segment: Segment, one: _Embedded, given: Foreign) -> bool:
    if segment.rows != len(one.numbers):
        return False
    patches = segment.patches(_MM)
    places = np.stack([patches[name].to_numpy() for name in _MM], axis=1)
    return np.array_equal(places, one.points.astype(np.float32)) and all(
        np.array_equal(segment.vectors(name), vectors[one.numbers]) for name, vectors in given.outputs.items()
    )


def _encoder(transaction: Transaction, card: EncoderCard) -> Artefact:
    directory = transaction.stage("encoder")
    (directory / CARD).write_text(json.dumps(card.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return transaction.add("encoder", directory, encoder=card.id)


def _batch(
    transaction: Transaction,
    head: Snapshot,
    tables: Mapping[Any, pa.Table],
    given: Foreign,
    card: EncoderCard,
    some: Sequence[_Embedded],
) -> tuple[dict[Any, pa.Table], dict[str, Artefact], list[tuple[str, Artefact]]]:
    """Stage what the head lacks of some scans: rows, scans without voxels, segments."""
    there = set(head.scan_ids())
    voxels = {one.scan: _absent(transaction, one.at) for one in some if one.scan not in there}
    places = {
        one.scan: voxels[one.scan].path if one.scan in voxels else head.scan_row(one.scan)["artefact"] for one in some
    }
    new = tables["scans"]
    digests = dict(zip(new["scan"].to_pylist(), new["digest"].to_pylist(), strict=True))
    stored = head.segments_by_scan(card.id)
    segments = []
    for one in some:
        if one.scan not in stored:
            digest = digests[one.scan] if one.scan in voxels else head.scan_row(one.scan)["digest"]
            segments.append((one.scan, _segment(transaction, one, given, card, digest, places[one.scan])))
    return rows_of(tables, list(voxels), places), voxels, segments


def _absent(transaction: Transaction, at: ScanGeometry) -> Artefact:
    from isimed_index.scans.chunks import write_absent

    directory = transaction.stage("scan")
    write_absent(at.shape, at.affine, attributes_of(at), directory)
    return transaction.add("scan", directory)


def _segment(
    transaction: Transaction, one: _Embedded, given: Foreign, card: EncoderCard, digest: str, place: str
) -> Artefact:
    import pyarrow as pa

    columns: dict[str, Any] = {"scan": pa.array([one.scan] * len(one.numbers), pa.string())}
    columns |= {name: one.lattice.ijk[:, axis].astype(np.int32) for axis, name in enumerate(_IJK)}
    columns |= {name: one.points[:, axis].astype(np.float32) for axis, name in enumerate(_MM)}
    columns["foreground"] = one.foreground.astype(np.float32)
    directory = transaction.stage("segment")
    outputs = {name: vectors[one.numbers] for name, vectors in given.outputs.items()}
    fields = write_segment(directory, pa.table(columns), outputs)
    lattice = {
        "scan": {
            "shape": list(one.at.shape),
            "affine": one.at.affine.tolist(),
            "source_affine": one.at.source_affine.tolist(),
        },
        "shape": list(one.lattice.shape),
        "affine": one.lattice.affine.tolist(),
        "patch_vox": card.patch_vox,
        "stride_vox": one.lattice.stride_vox,
    }
    (directory / LATTICE).write_text(json.dumps(lattice), encoding="utf-8")
    # The key that `index` would give it: what was imported counts as encoded.
    task = task_key(digest, card, card.stride_vox)
    grid = grid_key(card, card.stride_vox)
    return transaction.add("segment", directory, encoder=card.id, grid=grid, task=task, scan_artefact=place, **fields)
