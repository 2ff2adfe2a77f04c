"""One file → a scan whose voxels are staged in the store, and the rows that it will have there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.options import AddOptions
from isimed_index.scans.dicom.series import FACTS
from isimed_index.scans.discover import label_path
from isimed_index.scans.prepare import resample
from isimed_index.scans.read import read_labels, read_scan, read_series
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.space import affine_in_orientation, apply_affine
from isimed_index.store.manifest import Artefact
from isimed_index.store.transaction import Transaction

SIZES = ("nx", "ny", "nz", "dx_mm", "dy_mm", "dz_mm")


@dataclass(frozen=True, slots=True)
class Read:
    """One file in memory: the scan, its labels, and its content's digest."""

    file: Chosen
    scan: Scan
    labels: LabelMap | None
    digest: str


@dataclass(frozen=True, slots=True)
class Staged:
    """One file whose voxels are on disk: its rows, but for the id that the commit gives it."""

    file: Chosen
    digest: str
    artefact: Artefact
    row: dict[str, Any]
    labels: list[dict[str, Any]]


def each(
    pool: ThreadPoolExecutor, chosen: Sequence[Chosen], options: AddOptions, names: Mapping[int, str]
) -> Iterator[tuple[Chosen, Read | ScanRefused]]:
    """Read files in threads and in order, a few at a time: memory holds one volume per worker and no more."""
    for begin in range(0, len(chosen), options.workers):
        some = chosen[begin : begin + options.workers]
        yield from zip(some, pool.map(lambda file: _read(file, options, names), some), strict=True)


def _read(file: Chosen, options: AddOptions, names: Mapping[int, str]) -> Read | ScanRefused:
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
        return Read(file, scan, labels, scan.digest)
    except ScanRefused as error:
        return error


def stage(transaction: Transaction, read: Read) -> Staged:
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
        **dict(zip(SIZES, (*scan.shape, *map(float, scan.spacing_mm)), strict=True)),
        "orientation": scan.attributes.get("source_orientation"),
        "format": scan.attributes.get("source_format"),
        "digest": read.digest,
        "artefact": artefact.path,
        **{fact: scan.attributes[fact] for fact in FACTS if fact in scan.attributes},
    }
    labels = [] if read.labels is None else _label_rows(read.labels, scan)
    return Staged(read.file, read.digest, artefact, row, labels)


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
