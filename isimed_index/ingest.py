"""`add`: image files → scans in the store; bad files are refused by name and the rest lands.

find files ─▶ read (threads) ─▶ known content? ─▶ stage OME-Zarr ─▶ one commit per batch, with rows of
                                                                    scans, subjects and labels
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import TableName, arrow_schema, conform
from isimed_index.errors import IsimedError, ScanRefused, UsageError
from isimed_index.progress import Progress, Silent
from isimed_index.scans.discover import find_files, label_path, stem, subject_and_session, unique_ids, without_labels
from isimed_index.scans.prepare import resample
from isimed_index.scans.read import read_label_names, read_labels, read_scan
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.space import apply_affine
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 16  # scans in one commit
_ID_COLUMNS = ("scan", "participant_id", "subject", "subject_id")
_SUBJECT_COLUMNS = ("sex", "age")
Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """One input that was left out: its base name, the stable kind of error, why, and what to do."""

    name: str
    kind: str
    reason: str
    next_step: str = ""

    @classmethod
    def of(cls, name: str, error: IsimedError) -> Refusal:
        """The refusal that an error stands for."""
        return cls(name, error.kind, error.message, error.next_step)


@dataclass(frozen=True, slots=True)
class AddReport:
    """What became of every file: ids of new scans, ids of scans that were there already, and refusals."""

    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How files are read: where label maps lie, what labels are called, a metadata table, and so on."""

    labels: str | None = None
    label_names: Path | None = None
    metadata: Path | None = None
    subject_from: str | None = None
    spacing_mm: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.labels and self.spacing_mm is not None:
            raise UsageError("label maps are not resampled", next_step="leave out --spacing or --labels")
        if self.workers < 1:
            raise UsageError(f"expected at least one worker, found {self.workers}")


@dataclass(frozen=True, slots=True)
class _Item:
    """One file that was read: the scan, its labels, and its content's digest."""

    path: Path
    name: str  # the id it would have in an empty store
    scan: Scan
    labels: LabelMap | None
    digest: str


def add(
    repository: Repository, paths: Sequence[Path], options: AddOptions, progress: Progress | None = None
) -> AddReport:
    """Read files and folders into the store; idempotent by content; one commit per batch of 16."""
    progress = progress or Silent()
    names = read_label_names(options.label_names) if options.label_names else {}
    metadata = read_metadata(options.metadata) if options.metadata else {}
    report = AddReport()
    files = _images(paths, options, report)
    ids = unique_ids(files, taken=())
    progress.start("add", len(files), "scans")
    with (
        repository.transaction("add") as transaction,
        ThreadPoolExecutor(options.workers, thread_name_prefix="add") as pool,
    ):
        for start in range(0, len(files), BATCH):
            chosen = list(zip(files[start : start + BATCH], ids[start : start + BATCH], strict=True))
            known = _digests(repository.snapshot())
            staged = []
            # Read in threads, a few at a time, so that memory holds one volume per worker and no more.
            for item, artefact in _staged(pool, transaction, chosen, known, options, names, report, progress):
                known[item.digest] = item.name
                staged.append((item, artefact))
            if staged:
                _commit(transaction, staged, options, metadata, report)
    progress.finish()
    return report


def _images(paths: Sequence[Path], options: AddOptions, report: AddReport) -> list[Path]:
    """The image files among `paths`; an empty folder is refused, unless nothing else was asked for."""
    found: list[Path] = []
    for path in paths:
        try:
            found += find_files([path])
        except ScanRefused as error:
            report.refused.append(Refusal.of(path.resolve().name, error))
    files = list({path.resolve(): path for path in found}.values())
    return without_labels(files, options.labels) if options.labels else files


def _staged(
    pool: ThreadPoolExecutor,
    transaction: Transaction,
    chosen: Sequence[tuple[Path, str]],
    known: Mapping[str, str],
    options: AddOptions,
    names: Mapping[int, str],
    report: AddReport,
    progress: Progress,
) -> Iterator[tuple[_Item, Artefact]]:
    """Read and stage files, in order; refusals and known contents go to the report."""
    from isimed_index.scans.chunks import write_chunks

    for begin in range(0, len(chosen), options.workers):
        some = chosen[begin : begin + options.workers]
        for (path, _), outcome in zip(
            some, pool.map(lambda chosen: _read(chosen[0], chosen[1], options, names), some), strict=True
        ):
            progress.advance(1)
            if isinstance(outcome, ScanRefused):
                report.refused.append(Refusal.of(path.name, outcome))
            elif outcome.digest in known:
                report.unchanged.append(known[outcome.digest])
            else:
                directory = transaction.stage("scan")
                write_chunks(outcome.scan, outcome.labels, directory)
                yield outcome, transaction.add("scan", directory)


def _read(path: Path, name: str, options: AddOptions, names: Mapping[int, str]) -> _Item | ScanRefused:
    try:
        scan = read_scan(path, name)
        labels = None
        if options.labels:
            beside = label_path(path, options.labels)
            if not beside.exists():
                raise ScanRefused(
                    f"its label map {beside.name} does not exist",
                    next_step="add it without --labels, or mend the pattern",
                )
            labels = read_labels(beside, scan, names)
        if options.spacing_mm is not None:
            values, affine = resample(scan.values(), scan.affine, options.spacing_mm)
            scan = Scan(scan.id, values, affine, attributes=scan.attributes)
        return _Item(path, name, scan, labels, scan.digest)
    except ScanRefused as error:
        return error


def _digests(snapshot: Snapshot) -> dict[str, str]:
    rows = snapshot.table("scans")
    return dict(zip(rows.column("digest").to_pylist(), rows.column("scan").to_pylist(), strict=True))


def _commit(
    transaction: Transaction,
    staged: Sequence[tuple[_Item, Artefact]],
    options: AddOptions,
    metadata: Mapping[str, Mapping[str, Value]],
    report: AddReport,
) -> None:
    """Publish a batch; ids are given against the head, and content that another process added meanwhile is left out."""
    outcome: dict[str, list[str]] = {}

    def propose(head: Snapshot) -> Proposal:
        known = _digests(head)
        fresh = [(item, artefact) for item, artefact in staged if item.digest not in known]
        ids = _free_ids([item for item, _ in fresh], set(head.scan_ids()))
        outcome["added"] = ids
        outcome["unchanged"] = [known[item.digest] for item, _ in staged if item.digest in known]
        rows = [
            _scan_row(item, scan, artefact, options, metadata)
            for (item, artefact), scan in zip(fresh, ids, strict=True)
        ]
        subjects = set(head.table("subjects").column("subject").to_pylist())
        labels = [row for (item, _), scan in zip(fresh, ids, strict=True) for row in label_rows(scan, item)]
        return Proposal(
            add=[artefact for _, artefact in fresh],
            tables={
                "scans": _table("scans", rows),
                "subjects": _table("subjects", _subject_rows(rows, subjects)),
                "labels": _table("labels", labels),
            },
        )

    transaction.commit(propose)
    report.added.extend(outcome["added"])
    report.unchanged.extend(outcome["unchanged"])


def _free_ids(items: Sequence[_Item], taken: set[str]) -> list[str]:
    """Each item's name, or, where another scan has it already, its folder's name before it and then a number."""
    ids = []
    for item in items:
        scan = item.name if item.name not in taken else unique_ids([item.path], taken)[0]
        taken.add(scan)
        ids.append(scan)
    return ids


def _scan_row(
    item: _Item, scan: str, artefact: Artefact, options: AddOptions, metadata: Mapping[str, Mapping[str, Value]]
) -> dict[str, Any]:
    subject, session = subject_and_session(stem(item.path), options.subject_from)
    extra = next((metadata[key] for key in (scan, stem(item.path), subject) if key in metadata), {})
    spacing = item.scan.spacing_mm
    own = {
        "scan": scan,
        "subject": subject,
        "session": session,
        "modality": None,
        "split": None,
        **dict(zip(("nx", "ny", "nz"), item.scan.shape, strict=True)),
        **dict(zip(("dx_mm", "dy_mm", "dz_mm"), map(float, spacing), strict=True)),
        "orientation": item.scan.attributes.get("source_orientation"),
        "format": item.scan.attributes.get("source_format"),
        "digest": item.digest,
        "artefact": artefact.path,
    }
    settable = {"modality", "split", "session"}
    return own | {key: value for key, value in extra.items() if key not in own or key in settable}


def _subject_rows(rows: Sequence[Mapping[str, Any]], known: set[str]) -> list[dict[str, Any]]:
    new: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["subject"] not in known:
            new.setdefault(row["subject"], {"subject": row["subject"], **{k: row.get(k) for k in _SUBJECT_COLUMNS}})
    return list(new.values())


def label_rows(scan: str, item: _Item) -> list[dict[str, Any]]:
    """One row per label that occurs: its voxels, volume in mm³ and centroid in RAS+ mm."""
    if item.labels is None:
        return []
    centroids = label_centroids(item.labels.voxels)
    voxel_mm3 = float(np.prod(item.scan.spacing_mm))
    rows = []
    for label, (count, centre) in centroids.items():
        x, y, z = apply_affine(item.scan.affine, centre)
        name = item.labels.names.get(label)
        row = {"scan": scan, "label": label, "name": name, "voxels": count, "volume_mm3": count * voxel_mm3}
        rows.append(row | {"x_mm": float(x), "y_mm": float(y), "z_mm": float(z)})
    return rows


def label_centroids(labels: NDArray[Any]) -> dict[int, tuple[int, NDArray[np.float64]]]:
    """Every label but 0 of a map (x, y, z) → how many voxels it has and its centroid (3,) in voxel indices."""
    index = np.argwhere(labels > 0)
    values, inverse = np.unique(labels[tuple(index.T)], return_inverse=True)
    counts = np.bincount(inverse, minlength=len(values))
    sums = np.stack([np.bincount(inverse, weights=index[:, axis], minlength=len(values)) for axis in range(3)], axis=1)
    return {int(v): (int(n), s / n) for v, n, s in zip(values, counts, sums, strict=True)}


def _table(name: TableName, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    if not rows:
        return arrow_schema(name).empty_table()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    schema = arrow_schema(name)
    arrays = {
        column: pa.array(
            [row.get(column) for row in rows], schema.field(column).type if column in schema.names else None
        )
        for column in columns
    }
    return conform(name, pa.table(arrays))


def read_metadata(path: Path) -> dict[str, dict[str, Value]]:
    """Rows of a CSV or TSV table by their id column (scan, participant_id, subject or subject_id), values typed.

    A column becomes integer or float when all its filled cells read as one; empty cells and `n/a` are missing.
    `UsageError` without an id column, or when two rows of one id differ.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"the metadata table {path.name} cannot be read") from error
    columns = list(rows[0]) if rows else []
    key = next((column for column in _ID_COLUMNS if column in columns), None)
    if key is None:
        raise UsageError(
            f"the metadata table {path.name} has none of the columns {', '.join(_ID_COLUMNS)}",
            next_step="name the column with the ids participant_id",
        )
    typed = {column: _typed([row[column] for row in rows]) for column in columns if column != key and column}
    result: dict[str, dict[str, Value]] = {}
    for number, row in enumerate(rows):
        values = {column.strip().lower().replace(" ", "_"): cells[number] for column, cells in typed.items()}
        if result.setdefault(row[key], values) != values:
            raise UsageError(f"the metadata table {path.name} has two different rows for one id (row {number + 2})")
    return result


def _typed(cells: Sequence[str | None]) -> list[Value]:
    texts = [
        None if cell is None or cell.strip().lower() in ("", "n/a", "na", "nan") else cell.strip() for cell in cells
    ]
    for kind in (int, float):
        try:
            return [None if text is None else kind(text) for text in texts]
        except ValueError:
            continue
    return list(texts)
