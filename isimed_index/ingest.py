"""`add`: image files → scans in the store; bad files are refused by name and the rest lands.

find files ─▶ read (threads) ─▶ known content? ─▶ stage OME-Zarr ─▶ one commit per batch, with rows of
                                                                    scans, subjects and labels
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import TableName, arrow_schema, conform
from isimed_index.errors import IsimedError, ScanRefused, UsageError
from isimed_index.progress import Progress, Silent
from isimed_index.scans.dicom import files as dicom_files
from isimed_index.scans.dicom.series import FACTS, Series, group
from isimed_index.scans.discover import (
    SUFFIXES,
    find_files,
    label_path,
    stem,
    subject_and_session,
    unique_ids,
    without_labels,
)
from isimed_index.scans.metadata import Value, plain_number, read_metadata
from isimed_index.scans.prepare import resample
from isimed_index.scans.read import read_label_names, read_labels, read_scan, read_series
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.scans.surrogate import key_file, read_surrogates
from isimed_index.space import affine_in_orientation, apply_affine
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 16  # scans in one commit
_SUBJECT_COLUMNS = ("sex", "age")
_SETTABLE = ("subject", "session", "modality", "split")  # our own columns of `scans` that a metadata table may fill
_SIZES = ("nx", "ny", "nz", "dx_mm", "dy_mm", "dz_mm")
_BY_FILE = ("scan", *_SIZES, "orientation", "format", "digest", "artefact")  # those that the file alone fills


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
        return cls(name, error.kind, error.message.removeprefix(f"{name}: "), error.next_step)


@dataclass(frozen=True, slots=True)
class AddReport:
    """What became of every file: ids of new scans, ids of scans that were there already, and refusals.

    `unnamed` are the values in label maps of new scans for which no name was given.
    """

    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    unnamed: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How files are read: where label maps lie, what labels are called, a metadata table, and so on."""

    labels: str | None = None
    label_names: Path | None = None
    metadata: Path | None = None
    subject_from: str | None = None
    spacing_mm: float | None = None
    workers: int = 1
    surrogate_key: Path | None = None  # the file; None: where `key_file` says

    def __post_init__(self) -> None:
        if self.labels and self.spacing_mm is not None:
            raise UsageError("label maps are not resampled", next_step="leave out --spacing or --labels")
        if self.workers < 1:
            raise UsageError(f"expected at least one worker, found {self.workers}")


@dataclass(frozen=True, slots=True)
class _File:
    """One file that was asked for: the id it would have in an empty store, and whose it is by its names.

    For a DICOM series, all are surrogates, and `path` is no path but the series' surrogate as well.
    """

    path: Path
    name: str
    subject: str | None
    session: str | None
    series: Series | None = None


@dataclass(frozen=True, slots=True)
class _Read:
    """One file in memory: the scan, its labels, and its content's digest."""

    file: _File
    scan: Scan
    labels: LabelMap | None
    digest: str


@dataclass(frozen=True, slots=True)
class _Staged:
    """One file whose voxels are on disk: its rows, but for the id that the commit gives it."""

    file: _File
    digest: str
    artefact: Artefact
    row: dict[str, Any]
    labels: list[dict[str, Any]]


def add(
    repository: Repository, paths: Sequence[Path], options: AddOptions, progress: Progress | None = None
) -> AddReport:
    """Read files and folders into the store; idempotent by content; one commit per batch of 16."""
    progress = progress or Silent()
    names = read_label_names(options.label_names) if options.label_names else {}
    metadata = read_metadata(options.metadata) if options.metadata else {}
    report = AddReport()
    chosen = _chosen(paths, options, report, repository.path, progress)
    progress.start("add", len(chosen), "scans")
    with (
        repository.transaction("add") as transaction,
        ThreadPoolExecutor(options.workers, thread_name_prefix="add") as pool,
    ):
        for start in range(0, len(chosen), BATCH):
            head = repository.pin()
            known = set(_digests(head))
            labelled = _labelled(head)
            unlabelled = {digest for digest, scan in _digests(head).items() if scan not in labelled}
            staged: list[_Staged] = []
            repeated: list[tuple[_File, str]] = []  # with their digests
            for file, outcome in _each(pool, chosen[start : start + BATCH], options, names):
                progress.advance(1)
                if isinstance(outcome, ScanRefused):
                    report.refused.append(Refusal.of(file.path.name, outcome))
                elif outcome.digest in known:
                    repeated.append((file, outcome.digest))
                    if outcome.labels is not None and outcome.digest in unlabelled:
                        report.refused.append(Refusal.of(file.path.name, _late_labels()))
                else:
                    known.add(outcome.digest)
                    staged.append(_stage(transaction, outcome))
            now = transaction.commit(partial(_proposal, staged, metadata))
            ours = {item.artefact.path for item in staged} & now.scan_of.keys()
            report.unnamed[:] = sorted({*report.unnamed, *_unnamed(staged)})
            scans = _digests(now)
            report.added.extend(scans[item.digest] for item in staged if item.artefact.path in ours)
            old = [(item.file, item.digest) for item in staged if item.artefact.path not in ours] + repeated
            report.unchanged.extend(scans[digest] for _, digest in old)
            report.refused.extend(_late_metadata(old, metadata, now) if metadata else ())
    progress.finish()
    return report


def _unnamed(staged: Sequence[_Staged]) -> set[int]:
    return {row["label"] for item in staged for row in item.labels if row["name"] is None}


def _labelled(snapshot: Snapshot) -> set[str]:
    return set(snapshot.table("labels").column("scan").to_pylist())


def _late_labels() -> ScanRefused:
    return ScanRefused(
        "the scan is stored already, without labels; a stored scan is not given labels later",
        next_step="add it with its labels to a new store",
    )


def _late_metadata(
    files: Sequence[tuple[_File, str]], metadata: Mapping[str, Mapping[str, Value]], snapshot: Snapshot
) -> Iterator[Refusal]:
    """A refusal for each file with a stored digest whose metadata say something else than the stored row does."""
    stored = {row["digest"]: row for row in snapshot.table("scans").to_pylist()}
    for file, digest in files:
        row = stored[digest]
        name, scan = stem(file.path), row["scan"]
        keys = (scan, name) if name in scan else (name, scan)  # a copy under another name has its own metadata
        given = _given(_metadata_of(metadata, *keys, file.subject, row["subject"]))
        late = [key for key, value in given.items() if value is not None and not _same(value, row.get(key))]
        if late:
            error = ScanRefused(
                f"the scan is stored already, with other metadata ({', '.join(late)}); a stored scan keeps its own",
                next_step="add it with its metadata to a new store",
            )
            yield Refusal.of(file.path.name, error)


def _same(given: Value, stored: Value) -> bool:
    """Whether two cells say the same; the type that a column got may differ from one table to the next."""
    if given == stored or stored is None:
        return given == stored
    texts = str(given), str(stored)
    number = plain_number(texts[0])
    return texts[0] == texts[1] or (number is not None and number == plain_number(texts[1]))


def _chosen(
    paths: Sequence[Path], options: AddOptions, report: AddReport, store: Path, progress: Progress
) -> list[_File]:
    """The image files and DICOM series among `paths`, each once; a folder without any is refused."""
    found: dict[Path, tuple[Path, Path | None]] = {}  # file → as it was found, and in which of the folders
    for path in paths:
        try:
            for file in find_files([path]):
                found.setdefault(file.resolve(), (file, path if path.is_dir() else None))
        except ScanRefused as error:
            report.refused.append(Refusal.of(path.resolve().name, error))
    folders = dict(found.values())
    dicom = [file for file in folders if _is_dicom(file)]
    series = list(_series(dicom, folders, options, report, store, progress))
    for file in dicom:
        del folders[file]
    files = without_labels(folders, options.labels) if options.labels else list(folders)
    return [
        _File(file, name, *subject_and_session(file, folders[file], options.subject_from))
        for file, name in zip(files, unique_ids(files, taken=()), strict=True)
    ] + series


def _is_dicom(file: Path) -> bool:
    """By content, but for a file whose suffix says that it is another kind of image, or that it ought to be DICOM."""
    if file.name.lower().endswith(SUFFIXES):
        return False
    return file.name.lower().endswith(dicom_files.SUFFIXES) or dicom_files.is_dicom(file)


def _series(
    files: Sequence[Path],
    folders: Mapping[Path, Path | None],
    options: AddOptions,
    report: AddReport,
    store: Path,
    progress: Progress,
) -> Iterator[_File]:
    """The DICOM series among files, other files refused. The subject is a surrogate unless a regex finds one."""
    if not files:
        return
    surrogates = read_surrogates(options.surrogate_key or key_file(), store)
    progress.start("headers", len(files), "files")
    found, left = group(files, surrogates, progress)
    progress.finish()
    report.refused.extend(Refusal.of(item.name, item.reason) for item in left)
    for series in found:
        subject, session = series.subject, series.session
        if options.subject_from:
            first = series.files[0]
            named = subject_and_session(first, folders[first], options.subject_from)
            subject, session = named if named[0] else (subject, session)
        yield _File(Path(series.name), series.name, subject, session, series)


def _each(
    pool: ThreadPoolExecutor, chosen: Sequence[_File], options: AddOptions, names: Mapping[int, str]
) -> Iterator[tuple[_File, _Read | ScanRefused]]:
    """Read files in threads and in order, a few at a time: memory holds one volume per worker and no more."""
    for begin in range(0, len(chosen), options.workers):
        some = chosen[begin : begin + options.workers]
        yield from zip(some, pool.map(lambda file: _read(file, options, names), some), strict=True)


def _read(file: _File, options: AddOptions, names: Mapping[int, str]) -> _Read | ScanRefused:
    try:
        scan = read_series(file.series, file.name) if file.series else read_scan(file.path, file.name)
        labels = None
        if options.labels and file.series:
            raise ScanRefused("label maps of DICOM series are not read", next_step="add it without --labels")
        if options.labels:
            beside = label_path(file.path, options.labels)
            if not beside.exists():
                raise ScanRefused(
                    f"its label map {beside.name} does not exist",
                    next_step="add it without --labels, or mend the pattern",
                )
            labels = read_labels(beside, scan, names)
        if options.spacing_mm is not None:
            values, affine = resample(scan.values(), scan.affine, options.spacing_mm)
            # What the user knows as voxels are those of the file, before it was resampled.
            own = affine_in_orientation(scan.affine, scan.shape, str(scan.attributes["source_orientation"]))
            attributes = {**scan.attributes, "source_affine": json.dumps(own.tolist())}
            scan = Scan(scan.id, values, affine, attributes=attributes)
        return _Read(file, scan, labels, scan.digest)
    except ScanRefused as error:
        return error


def _stage(transaction: Transaction, read: _Read) -> _Staged:
    """Write a scan's voxels; what is kept of it in memory is a few rows."""
    from isimed_index.scans.chunks import write_chunks

    directory = transaction.stage("scan")
    write_chunks(read.scan, read.labels, directory)
    artefact = transaction.add("scan", directory)
    scan = read.scan
    row = {
        "subject": read.file.subject,
        "session": read.file.session,
        "modality": scan.attributes.get("modality"),
        "split": None,
        **dict(zip(_SIZES, (*scan.shape, *map(float, scan.spacing_mm)), strict=True)),
        "orientation": scan.attributes.get("source_orientation"),
        "format": scan.attributes.get("source_format"),
        "digest": read.digest,
        "artefact": artefact.path,
        **{fact: scan.attributes[fact] for fact in FACTS if fact in scan.attributes},
    }
    labels = [] if read.labels is None else _label_rows(read.labels, scan)
    return _Staged(read.file, read.digest, artefact, row, labels)


def _digests(snapshot: Snapshot) -> dict[str, str]:
    rows = snapshot.table("scans")
    return dict(zip(rows.column("digest").to_pylist(), rows.column("scan").to_pylist(), strict=True))


def _proposal(staged: Sequence[_Staged], metadata: Mapping[str, Mapping[str, Value]], head: Snapshot) -> Proposal:
    """What a batch adds to the head: ids are given here, and content that another process added is left out."""
    known = _digests(head)
    fresh = [item for item in staged if item.digest not in known]
    ids = _free_ids(fresh, set(head.scan_ids()))
    rows = [_scan_row(item, scan, metadata) for item, scan in zip(fresh, ids, strict=True)]
    subjects = set(head.table("subjects").column("subject").to_pylist())
    labels = [{"scan": scan, **row} for item, scan in zip(fresh, ids, strict=True) for row in item.labels]
    return Proposal(
        add=[item.artefact for item in fresh],
        tables={
            "scans": _table("scans", rows),
            "subjects": _table("subjects", _subject_rows(rows, subjects)),
            "labels": _table("labels", labels),
        },
    )


def _free_ids(items: Sequence[_Staged], taken: set[str]) -> list[str]:
    """Each item's name, or, where another scan has it already, its folder's name before it and then a number."""
    ids = []
    for item in items:
        scan = item.file.name
        if scan in taken and item.file.series is not None:  # the same series with other content
            scan = next(name for n in itertools.count(2) if (name := f"{item.file.name}-{n}") not in taken)
        elif scan in taken:
            scan = unique_ids([item.file.path], taken)[0]
        taken.add(scan)
        ids.append(scan)
    return ids


def _scan_row(item: _Staged, scan: str, metadata: Mapping[str, Mapping[str, Value]]) -> dict[str, Any]:
    """A row of `scans`: the file's own facts, and the metadata found by scan id, file stem or subject.

    A scan whose names say no subject is its own: its id is unique, a stem such as `T1` is not.
    """
    given = _given(_metadata_of(metadata, scan, stem(item.file.path), item.file.subject))
    own = {"scan": scan, **item.row, "subject": item.file.subject or scan}
    return own | {key: value for key, value in given.items() if key not in own or value is not None}


def _metadata_of(metadata: Mapping[str, Mapping[str, Value]], *keys: str | None) -> Mapping[str, Value]:
    """The metadata under the first of the keys that has any."""
    return next((metadata[key] for key in keys if key is not None and key in metadata), {})


def _given(extra: Mapping[str, Value]) -> dict[str, Value]:
    """What a row of metadata may say of a scan: its facts come from the file, its own other columns are text."""
    free = {key: value for key, value in extra.items() if key not in _BY_FILE}
    return free | {key: str(free[key]) for key in _SETTABLE if free.get(key) is not None}


def _subject_rows(rows: Sequence[Mapping[str, Any]], known: set[str]) -> list[dict[str, Any]]:
    new: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["subject"] not in known:
            new.setdefault(row["subject"], {"subject": row["subject"], **{k: row.get(k) for k in _SUBJECT_COLUMNS}})
    return list(new.values())


def _label_rows(labels: LabelMap, scan: Scan) -> list[dict[str, Any]]:
    """One row per label that occurs: its voxels, volume in mm³ and centroid in RAS+ mm."""
    voxel_mm3 = abs(float(np.linalg.det(scan.affine[:3, :3])))
    rows = []
    for label, (count, centre) in label_centroids(labels.voxels).items():
        x, y, z = map(float, apply_affine(scan.affine, centre))
        row = {"label": label, "name": labels.names.get(label), "voxels": count, "volume_mm3": count * voxel_mm3}
        rows.append(row | {"x_mm": x, "y_mm": y, "z_mm": z})
    return rows


def label_centroids(labels: NDArray[Any]) -> dict[int, tuple[int, NDArray[np.float64]]]:
    """Every label but 0 of a map (x, y, z) → how many voxels it has and its centroid (3,) in voxel indices."""
    index = np.argwhere(labels)
    values, inverse = np.unique(labels[tuple(index.T)], return_inverse=True)
    counts = np.bincount(inverse, minlength=len(values))
    sums = np.stack([np.bincount(inverse, weights=index[:, axis], minlength=len(values)) for axis in range(3)], axis=1)
    return {int(v): (int(n), s / n) for v, n, s in zip(values, counts, sums, strict=True)}


def _table(name: TableName, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    if not rows:
        return arrow_schema(name).empty_table()
    columns = dict.fromkeys(key for row in rows for key in row)
    return conform(name, pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns}))
