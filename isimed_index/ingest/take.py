"""One file → a scan whose voxels lie in a folder of the store, and the rows that it will have there.

All of it runs in a worker, which holds one volume at a time; what goes back to the one who commits is a few rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.ingest.choose import Chosen
from isimed_index.ingest.options import AddOptions
from isimed_index.ingest.report import Facts
from isimed_index.scans.allowed import COLUMNS
from isimed_index.scans.discover import is_text, label_path, stem
from isimed_index.scans.label_files import read_label_files
from isimed_index.scans.prepare import resample
from isimed_index.scans.read import read_labels, read_scan, read_series
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.space import affine_in_orientation, apply_affine
from isimed_index.store.manifest import Artefact

_DENSE = 4096  # labels between the least and the greatest that are counted in a table of all of them
_CHOICES = ("volume", "stated_orientation")  # columns that only scans have of which the user chose or said it
SIZES = ("nx", "ny", "nz", "dx_mm", "dy_mm", "dz_mm")


@dataclass(frozen=True, slots=True)
class Read:
    """One file in memory: the scan, its labels, and its content's digest."""

    file: Chosen
    scan: Scan
    labels: LabelMap | None
    digest: str


@dataclass(frozen=True, slots=True)
class Taken:
    """One file that was read: its rows, and the folder that it was written to where its content was wanted."""

    file: Chosen
    digest: str
    folder: Path | None
    row: dict[str, Any]
    labels: list[dict[str, Any]] | None  # None: it came without a label map
    facts: Facts
    megabytes: float  # of voxels, as they are in memory
    seconds: float
    thumbnail: str | None  # its name in the folder of thumbnails

    def unwritten(self) -> Taken:
        """The same, without the folder, which is another file's now."""
        return replace(self, folder=None)


@dataclass(frozen=True, slots=True)
class Staged:
    """One file whose voxels are on disk: its rows, but for the id that the commit gives it."""

    file: Chosen
    digest: str
    artefact: Artefact
    row: dict[str, Any]
    labels: list[dict[str, Any]]

    @classmethod
    def of(cls, taken: Taken, artefact: Artefact) -> Staged:
        """What was taken, once its folder is durable and described."""
        return cls(taken.file, taken.digest, artefact, {**taken.row, "artefact": artefact.path}, taken.labels or [])


@dataclass(frozen=True, slots=True)
class Task:
    """One file to be taken: its place among all, and an empty folder of the store."""

    number: int
    file: Chosen
    folder: Path


@dataclass(frozen=True, slots=True)
class Job:
    """What holds for all files of an add."""

    options: AddOptions
    names: Mapping[int, str]  # of labels


def take(task: Task, job: Job, wanted: Callable[[str], bool]) -> Taken | ScanRefused:
    """Read one file and write it to the task's folder if its content is `wanted`, told by its digest."""
    from isimed_index.scans.chunks import write_chunks

    began = time.perf_counter()
    try:
        read = _read(task.file, job.options, job.names)
    except MemoryError:
        return ScanRefused(f"{task.file.shown}: there is not enough memory to read it", next_step="use fewer workers")
    if isinstance(read, ScanRefused):
        return read
    write = wanted(read.digest)
    if write:
        write_chunks(read.scan, read.labels, task.folder)
    thumbnail = None
    if job.options.thumbnails is not None:
        from isimed_index.ingest.thumbnail import thumbnail_png

        thumbnail = f"{task.number:07d}.png"
        (job.options.thumbnails / thumbnail).write_bytes(thumbnail_png(read.scan))
    return Taken(
        file=read.file,
        digest=read.digest,
        folder=task.folder if write else None,
        row=_row(read),
        labels=None if read.labels is None else _label_rows(read.labels, read.scan),
        facts=Facts.of(read.scan),
        megabytes=read.scan.voxels.nbytes / 1e6,
        seconds=time.perf_counter() - began,
        thumbnail=thumbnail,
    )


def _read(file: Chosen, options: AddOptions, names: Mapping[int, str]) -> Read | ScanRefused:
    try:
        if not all(is_text(name) for name in (file.name, file.subject, file.session) if name):
            raise ScanRefused(
                "its name, or that of its folder, holds characters that cannot be shown: line breaks, control "
                "characters, or bytes that are no text",
                next_step="rename it",
            )
        if file.series:
            scan = read_series(file.series, file.name, options.volume)
        else:
            of_set = file.image is not None
            scan = read_scan(file.path, file.name, options.volume, options.analyze_axes, if_several=of_set)
        if "volume" in scan.attributes:  # two volumes of one file are two scans
            file = replace(file, name=f"{file.name}_vol-{scan.attributes['volume']}")
            scan = replace(scan, id=file.name)
        labels = None
        if options.labels and file.series:
            raise ScanRefused("label maps of DICOM series are not read", next_step="add it without --labels")
        if options.labels:
            beside = label_path(file.path, options.labels)
            if not beside.exists():
                tried = options.labels.replace("{stem}", stem(file.path))
                raise ScanRefused(
                    f"its label map {tried} does not exist",
                    next_step="add it without --labels, or mend the pattern",
                )
            labels = read_labels(beside, scan, names, options.analyze_axes)
        elif file.image is not None and file.image.labels is not None and options.spacing_mm is None:
            labels = read_label_files(file.image.labels, scan, names)
        if options.spacing_mm is not None:
            values, affine = resample(scan.values(), scan.affine, options.spacing_mm)
            # What the user knows as voxels are those of the file, before it was resampled.
            own = affine_in_orientation(scan.affine, scan.shape, str(scan.attributes["source_orientation"]))
            attributes = {**scan.attributes, "source_affine": json.dumps(own.tolist())}
            scan = Scan(scan.id, values, affine, attributes=attributes)
        return Read(file, scan, labels, scan.digest)
    except ScanRefused as error:
        return error


def _row(read: Read) -> dict[str, Any]:
    """The row of `scans`, but for its id and its artefact."""
    scan = read.scan
    return {
        "subject": read.file.subject,
        "session": read.file.session,
        "modality": scan.attributes.get("modality"),
        "split": None,
        **dict(zip(SIZES, (*scan.shape, *map(float, scan.spacing_mm)), strict=True)),
        "orientation": scan.attributes.get("source_orientation"),
        "format": scan.attributes.get("source_format"),
        "digest": read.digest,
        **({"source": read.file.source} if read.file.source else {}),
        **({"label_overlap_voxels": overlap} if read.labels and (overlap := read.labels.overlap_voxels) else {}),
        **{fact: scan.attributes[fact] for fact in (*COLUMNS, *_CHOICES) if fact in scan.attributes},
    }


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
    """Every label but 0 of a map (x, y, z) → how many voxels it has and its centroid (3,) in voxel indices.

    Plane by plane, because the indices of all voxels at once take many times the map's own memory.
    """
    least, most = int(labels.min()), int(labels.max())
    dense = most - least < _DENSE
    values = np.arange(least, most + 1) if dense else np.unique(labels)  # (n,)
    n = len(values)
    counts, sums = np.zeros(n, np.int64), np.zeros((n, 3))
    for x, plane in enumerate(labels):
        flat = plane.ravel()
        at = np.flatnonzero(flat)
        if not len(at):
            continue
        found = flat[at]
        code = found.astype(np.int64) - least if dense else np.searchsorted(values, found)
        of_plane = np.bincount(code, minlength=n)
        counts += of_plane
        sums[:, 0] += x * of_plane
        for axis, index in zip((1, 2), np.divmod(at, plane.shape[1]), strict=True):
            sums[:, axis] += np.bincount(code, weights=index, minlength=n)
    return {int(values[i]): (int(counts[i]), sums[i] / counts[i]) for i in np.flatnonzero(counts)}
