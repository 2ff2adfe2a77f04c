"""Which files `add` reads: images and DICOM series among paths, and whose they are by their names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from isimed_index.errors import ScanRefused
from isimed_index.ingest.options import AddOptions
from isimed_index.ingest.report import AddReport, Refusal, shown_name
from isimed_index.progress import Progress
from isimed_index.scans.dicom import files as dicom_files
from isimed_index.scans.dicom.series import Series, group
from isimed_index.scans.discover import (
    SUFFIXES,
    find_files,
    real,
    stem,
    subject_and_session,
    unique_ids,
    without_labels,
)
from isimed_index.scans.layouts.found import Image, some, with_one_type
from isimed_index.scans.layouts.recognise import Layout, roots
from isimed_index.scans.metadata import Who
from isimed_index.scans.surrogate import Surrogates, key_file, read_surrogates


@dataclass(frozen=True, slots=True)
class Hidden:
    """Whose a file was by its names, before surrogates took their place (never stored, nor shown), and their maker."""

    subject: str = field(repr=False)
    surrogates: Surrogates

    def subject_id(self, subject: str) -> str:
        """The surrogate of a subject's name."""
        return self.surrogates.of("subject", subject)

    def session_id(self, session: str, subject: str | None = None) -> str:
        """The surrogate of a session's name; that of another subject differs, for sessions may be called by dates."""
        return self.surrogates.of("session", f"{subject or self.subject}\0{session}")


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
    image: Image | None = None  # what the data set that it is of says of it
    who: Who | None = field(default=None, repr=False)  # what metadata tables may call it, hidden or not
    source: str | None = None  # its path, where it is to be stored
    hidden: Hidden | None = None  # with `surrogate_ids`, which `name`, `subject` and `session` then are

    @property
    def shown(self) -> str:
        """What refusals call it: its base name, or the scan's id where a data set calls all its files the same."""
        return self.path.name if self.image is None or stem(self.path) == self.image.name else self.name

    def called(self, scan: str) -> Who:
        """What metadata tables may call it, once its scan's id is known."""
        who = self.who or Who(self.name)
        return who if scan == who.scan or self.hidden else replace(who, scan=scan, files=(who.scan, *who.files))


def choose(
    paths: Sequence[Path], options: AddOptions, report: AddReport, store: Path, progress: Progress
) -> list[Chosen]:
    """The image files and DICOM series among `paths`, each once; a folder without any is refused.

    Folders that are data sets of a known layout are read as that; images of no data set go by their names.
    """
    sets = _data_sets(paths, options)
    images = _images(sets, [real(path) for path in paths], options, report)
    found: dict[Path, tuple[Path, Path | None]] = {}  # file → as it was found, and in which of the folders
    for path in paths:
        if any(root == path for root, _ in sets):
            continue
        try:
            for file in find_files([path], [root for root, _ in sets]):
                found.setdefault(real(file), (file, path if path.is_dir() else None))
        except ScanRefused as error:
            if not any(root.is_relative_to(path) for root, _ in sets):
                report.refused.append(Refusal.of(path.resolve().name, error))
    for item in images:
        found.pop(real(item.path), None)
    folders = dict(found.values())
    dicom = [file for file in folders if _is_dicom(file)]
    series = list(_series(dicom, folders, options, report, store, progress))
    for file in dicom:
        del folders[file]
    files = without_labels(folders, options.labels) if options.labels else list(folders)
    plain = [
        _plain(file, name, folders[file], options)
        for file, name in zip(files, unique_ids(files, taken={item.name for item in images}), strict=True)
    ]
    return images + plain + series


def _plain(file: Path, name: str, folder: Path | None, options: AddOptions) -> Chosen:
    subject, session = subject_and_session(file, folder, options.subject_from)
    return Chosen(file, name, subject, session, who=Who(name, _names_of(file, folder), subject, session))


def _names_of(file: Path, folder: Path | None) -> tuple[str, ...]:
    """What a table may call a file: its stem, its name, and every end of its path below the folder."""
    parts = file.relative_to(folder).parts if folder is not None else (file.name,)
    ends = ["/".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
    return (stem(file), *ends)


def _data_sets(paths: Sequence[Path], options: AddOptions) -> list[tuple[Path, Layout]]:
    """The data sets among the folders given, as they were found; one that is in two of them is there twice."""
    return [found for path in paths if path.is_dir() for found in roots(path, options.layout)]


def _images(
    sets: Sequence[tuple[Path, Layout]], given: Sequence[Path], options: AddOptions, report: AddReport
) -> list[Chosen]:
    """All images of data sets. What a set left out or cannot make sense of goes to the report."""
    found: list[tuple[Path, Image]] = []
    for root, layout in {root.resolve(): layout for root, layout in sets}.items():
        folder = shown_name(root.name)
        try:
            inner = layout.read(root, options.volume)
        except OSError as error:
            refused = ScanRefused(f"the data set cannot be read ({error.strerror})", next_step="check its permissions")
            report.refused.append(Refusal.of(folder, refused))
            continue
        report.refused.extend(Refusal.of(name, error) for name, error in inner.refused)
        images = inner.images
        if options.labels:
            kept = set(without_labels([image.path for image in images], options.labels))
            images = [replace(image, labels=None) for image in images if image.path in kept]
        subjects = len({image.subject for image in images})
        report.notes.append(
            f"{folder} is laid out as {layout.title}: {len(images)} images of {subjects} subjects; "
            "--layout files reads it as plain files"
        )
        report.notes.extend(f"{folder}: {shown_name(note)}" for note in inner.notes)
        if options.spacing_mm is not None and any(image.labels for image in images):
            report.notes.append(f"{folder}: label maps are not resampled: with --spacing its images get none")
        found.extend((root, image) for image in images)
    report.notes.extend(_shared_subjects(found))
    used: set[str] = set()
    chosen = []
    for (root, _), image in zip(found, with_one_type([image for _, image in found]), strict=True):
        name = next(name for name in _numbered(image.name) if name not in used)
        used.add(name)
        above = next(folder for folder in (*given, root) if root.is_relative_to(folder))
        subject, session = image.subject, image.session
        if options.subject_from:
            named = subject_and_session(image.path, above, options.subject_from)
            subject, session = (named[0], named[1]) if named[0] else (subject, session)
        who = Who(name, (image.name, *_names_of(image.path, above)), subject, session)
        chosen.append(Chosen(image.path, name, subject, session, image=image, who=who))
    return chosen


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _shared_subjects(found: Sequence[tuple[Path, Image]]) -> Iterator[str]:
    """A note where two data sets call a subject the same: `sub-01` of two studies is two people more often than one."""
    roots_of: dict[str, set[Path]] = {}
    for root, image in found:
        roots_of.setdefault(image.subject, set()).add(root)
    shared = sorted(subject for subject, its in roots_of.items() if len(its) > 1)
    if shared:
        yield (
            f"{len(shared)} subjects are in more than one data set and are taken for the same people: {some(shared)}; "
            "--subject-from can tell them apart by the folder"
        )


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
    found, left = group(files, surrogates, progress, allow_burned_in=options.allow_burned_in)
    progress.finish()
    report.refused.extend(Refusal.of(item.name, item.reason) for item in left)
    for series in found:
        for column in series.dropped:
            report.dropped[column] = report.dropped.get(column, 0) + 1
        subject, session = series.subject, series.session
        if options.subject_from:
            first = series.files[0]
            named = subject_and_session(first, folders[first], options.subject_from)
            subject, session = named if named[0] else (subject, session)
        who = Who(series.name, (), subject, session)
        yield Chosen(Path(series.name), series.name, subject, session, series, who=who)
