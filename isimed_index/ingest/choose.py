"""Which files `add` reads: images and DICOM series among paths, and whose they are by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isimed_index.errors import ScanRefused
from isimed_index.ingest.options import AddOptions
from isimed_index.ingest.report import AddReport, Refusal
from isimed_index.progress import Progress
from isimed_index.scans.dicom import files as dicom_files
from isimed_index.scans.dicom.series import Series, group
from isimed_index.scans.discover import SUFFIXES, find_files, subject_and_session, unique_ids, without_labels
from isimed_index.scans.surrogate import key_file, read_surrogates


@dataclass(frozen=True, slots=True)
class Chosen:
    """One file that was asked for: the id it would have in an empty store, and whose it is by its names.

    For a DICOM series, all are surrogates, and `path` is no path but the series' surrogate as well.
    """

    path: Path
    name: str
    subject: str | None
    session: str | None
    series: Series | None = None


def choose(
    paths: Sequence[Path], options: AddOptions, report: AddReport, store: Path, progress: Progress
) -> list[Chosen]:
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
        Chosen(file, name, *subject_and_session(file, folders[file], options.subject_from))
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
) -> Iterator[Chosen]:
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
        yield Chosen(Path(series.name), series.name, subject, session, series)
