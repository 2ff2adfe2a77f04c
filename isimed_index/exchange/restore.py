"""Read an exported Parquet folder back: scans, encoders and segments with the values that were exported.

    export.json checked, file by file ─▶ compared with the store ─▶ batches of scans with all that belongs to them,
                                                                     one commit each

Row ids are given anew. Frame and index are derived: `isimed index` makes them again, and encodes nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isimed_index.errors import EncoderMismatch, StoreDamaged, UsageError
from isimed_index.exchange.columns import no_shares, vectors_of
from isimed_index.exchange.export import LATTICES
from isimed_index.exchange.folder import read_seal
from isimed_index.exchange.incoming import (
    IMPORTED,
    Batch,
    Imported,
    commit,
    refuse_other_card,
    refuse_other_content,
    rows_of,
)
from isimed_index.ingest.add import BATCH
from isimed_index.lattice import ScanGeometry
from isimed_index.progress import Progress, Silent
from isimed_index.space import orientation
from isimed_index.store.files import CARD, MODEL, WEIGHTS
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.segment import LATTICE, write_segment
from isimed_index.store.snapshot import Snapshot, StoredTable
from isimed_index.store.transaction import Transaction

if TYPE_CHECKING:
    import pyarrow as pa

_AGAIN = "export it again"
_OF_SEGMENT = {"row_group", "grid", "task", "outputs", "lattice"}
_MADE = ("patch", "encoder", "cx_mm", "cy_mm", "cz_mm")  # columns that the store gives anew


@dataclass(frozen=True, slots=True)
class Folder:
    """An exported folder whose files are as they were written."""

    path: Path
    files: Sequence[str]  # relative paths of all files
    tables: Mapping[StoredTable, pa.Table]
    facts: Mapping[str, Mapping[str, Any]]  # by scan id: digest, orientation, format
    cards: Mapping[str, Mapping[str, Any]]  # by card id
    geometry: Mapping[str, Mapping[str, Any]]  # by scan id: shape, affine, source_affine, voxels
    segments: Mapping[str, Mapping[str, Mapping[str, Any]]]  # by card id and scan id

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Check every file and read all but patches and voxels."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        seal = read_seal(path)
        if seal.get("layout") != "parquet":
            raise UsageError(
                f"{path.name} is an export that cannot be read back", next_step="isimed export --parquet DIR"
            )
        try:
            tables: dict[StoredTable, pa.Table] = {
                name: pq.read_table(path / f"{name}.parquet", partitioning=None) for name in IMPORTED
            }
            lattices = json.loads((path / LATTICES).read_text(encoding="utf-8"))
            cards = [json.loads((path / name).read_text(encoding="utf-8")) for name in _named(seal["files"], CARD)]
            found = cls(
                path,
                list(seal["files"]),
                tables,
                {
                    row["scan"]: row
                    for row in tables["scans"].select(["scan", "digest", "orientation", "format"]).to_pylist()
                },
                {card["id"]: card for card in cards},
                lattices["scans"],
                lattices["segments"],
            )
            scans = set(tables["scans"]["scan"].to_pylist())
            said = [(scan, part) for parts in found.segments.values() for scan, part in parts.items()]
            complete = (
                scans == found.geometry.keys()
                and found.segments.keys() <= found.cards.keys()
                and all(scan in scans and part.keys() >= _OF_SEGMENT for scan, part in said)
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
            raise StoreDamaged(
                f"a file of the export cannot be read ({type(error).__name__})", next_step=_AGAIN
            ) from None
        if not complete:
            raise StoreDamaged("the files of the export do not belong together", next_step=_AGAIN)
        return found

    def copy(self, prefix: str, target: Path, only: Sequence[str] | None = None) -> None:
        """Copy the files below a folder of it (or `only` some) into `target`; none that was not checked."""
        below = [name for name in self.files if name.startswith(f"{prefix}/")]
        below = [name for name in below if only is None or name.removeprefix(f"{prefix}/") in only]
        if not below:
            raise StoreDamaged(f"the export lacks {prefix}", next_step=_AGAIN)
        for name in below:
            place = target / name.removeprefix(f"{prefix}/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, place)


def _named(files: Sequence[str], name: str) -> list[str]:
    return [file for file in files if file.startswith("encoders/") and file.endswith(f"/{name}")]


def import_parquet(repository: Repository, path: Path, progress: Progress | None = None) -> Imported:
    """Import what `export_parquet` wrote; what the store holds already is left alone.

    Errors: `StoreDamaged` when a file of the folder is not as it was written, `UsageError` when a scan's id stands for
    other content in the store, `EncoderMismatch` when an encoder's id does. Nothing is committed then.
    """
    progress = progress or Silent()
    folder = Folder.open(path)
    head = repository.pin()
    refuse_other_content(head, folder.tables["scans"])
    for card in folder.cards.values():
        refuse_other_card(head, card)
    _refuse_other_lattices(head, folder)
    scans = folder.tables["scans"]["scan"].to_pylist()
    there = set(head.scan_ids())
    patches = 0
    progress.start("import", len(scans), "scans")
    with repository.transaction("import") as transaction:
        encoders = [_encoder(transaction, folder, card) for card in folder.cards]
        for start in range(0, len(scans), BATCH) or (0,):  # without a scan there may still be encoders
            some = scans[start : start + BATCH]
            now, count = commit(transaction, _batch(transaction, folder, repository.pin(), some, encoders))
            patches += count
            progress.advance(len(some), f"{patches:,} patches")
    progress.finish()
    known = {artefact.fields["encoder"] for artefact in head.artefacts("encoder")}
    return Imported(
        now.generation,
        [scan for scan in scans if scan not in there],
        [scan for scan in scans if scan in there],
        [card for card in folder.cards if card not in known],
        patches,
    )


def _refuse_other_lattices(head: Snapshot, folder: Folder) -> None:
    """A scan has one segment of an encoder: another one of it is not put beside it, nor in its place."""
    for segment in head.segments():
        given = folder.segments.get(segment.encoder, {}).get(head.scan_of[segment.scan_artefact])
        if given is not None and given["task"] != segment.task:
            raise EncoderMismatch(
                f"scan {head.scan_of[segment.scan_artefact]} is encoded on another lattice in the store",
                next_step="import into a new store",
            )


def _encoder(transaction: Transaction, folder: Folder, card_id: str) -> Artefact:
    directory = transaction.stage("encoder")
    folder.copy(f"encoders/{card_id}", directory, only=(CARD, WEIGHTS, MODEL))
    return transaction.add("encoder", directory, encoder=card_id)


def _batch(
    transaction: Transaction, folder: Folder, head: Snapshot, scans: Sequence[str], encoders: Sequence[Artefact]
) -> Batch:
    """Stage what the head lacks of some scans."""
    there = set(head.scan_ids())
    voxels = {scan: _voxels(transaction, folder, scan) for scan in scans if scan not in there}
    places = {scan: voxels[scan].path if scan in voxels else head.scan_row(scan)["artefact"] for scan in scans}
    encoded = {(segment.encoder, segment.scan_artefact) for segment in head.segments()}
    segments = [
        (scan, artefact)
        for encoder, parts in folder.segments.items()
        for scan, artefact in _segments(
            transaction,
            folder,
            encoder,
            {scan: places[scan] for scan in scans if scan in parts and (encoder, places[scan]) not in encoded},
        )
    ]
    return Batch(rows_of(folder.tables, scans, places), voxels, segments, encoders)


def _voxels(transaction: Transaction, folder: Folder, scan: str) -> Artefact:
    """Stage a scan's voxels as they were exported, or its geometry alone; `StoreDamaged` when they are others."""
    from isimed_index.scans.chunks import open_chunks, write_absent
    from isimed_index.scans.scan import Scan

    directory = transaction.stage("scan")
    given = folder.geometry[scan]
    row = folder.facts[scan]
    if "voxels" in given:
        folder.copy(given["voxels"], directory)
        stored = open_chunks(directory, scan)
        if not stored.absent:
            read = Scan(scan, stored.voxels(), stored.affine, stored.slope, stored.intercept)
            if read.digest != row["digest"]:
                raise StoreDamaged(f"the exported voxels of scan {scan} are not those that it had", next_step=_AGAIN)
        return transaction.add("scan", directory)
    at = _geometry(given)
    attributes = {
        "source_orientation": row["orientation"] or orientation(at.source_affine),
        "source_affine": json.dumps(at.source_affine.tolist()),
        **({"source_format": row["format"]} if row["format"] else {}),
    }
    write_absent(at.shape, at.affine, attributes, directory)
    return transaction.add("scan", directory)


def _geometry(given: Mapping[str, Any]) -> ScanGeometry:
    try:
        x, y, z = (int(n) for n in given["shape"])
        affines = [np.array(given[name], np.float64).reshape(4, 4) for name in ("affine", "source_affine")]
    except (KeyError, TypeError, ValueError):
        raise StoreDamaged(f"{LATTICES} of the export cannot be read", next_step=_AGAIN) from None
    return ScanGeometry((x, y, z), *affines)


def _segments(
    transaction: Transaction, folder: Folder, encoder: str, places: Mapping[str, str]
) -> Iterator[tuple[str, Artefact]]:
    """Stage the segments of some scans by one encoder, in the order in which they were written."""
    import pyarrow.parquet as pq

    parts = folder.segments[encoder]
    with _readable(encoder):
        file = pq.ParquetFile(folder.path / f"patches-{encoder}.parquet")
    with file:
        for scan in sorted(places, key=lambda scan: int(parts[scan]["row_group"])):
            with _readable(encoder):
                rows = file.read_row_group(parts[scan]["row_group"])
            yield scan, _segment(transaction, rows, scan, places[scan], encoder, parts[scan])


@contextmanager
def _readable(encoder: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, LookupError, pa.ArrowException):
        raise StoreDamaged(f"the patches of encoder {encoder} in the export cannot be read", next_step=_AGAIN) from None


def _segment(
    transaction: Transaction, rows: pa.Table, scan: str, place: str, encoder: str, said: Mapping[str, Any]
) -> Artefact:
    if set(rows["scan"].to_pylist()) != {scan} or not said["outputs"].keys() <= set(rows.column_names):
        raise StoreDamaged("the patches of the export are not those that it names", next_step=_AGAIN)
    if wrong := no_shares(rows["foreground"].to_numpy()):
        raise UsageError(
            f"foreground of scan {scan} in the export: expected shares from 0 to 1, found {wrong} others, or missing "
            "ones",
            next_step="leave that scan out of the export by --where, and encode it or import its embeddings again",
        )
    outputs = {name: vectors_of(rows[name], name).astype(kind, copy=False) for name, kind in said["outputs"].items()}
    made = {*outputs, *_MADE} & set(rows.column_names)
    directory = transaction.stage("segment")
    fields = write_segment(directory, rows.drop_columns(sorted(made)), outputs)
    (directory / LATTICE).write_text(json.dumps(said["lattice"]), encoding="utf-8")
    return transaction.add(
        "segment", directory, encoder=encoder, grid=said["grid"], task=said["task"], scan_artefact=place, **fields
    )
