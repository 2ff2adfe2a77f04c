"""Many DICOM files → series, from their headers alone, with a keyed surrogate for every identifier.

Nothing of a header goes further than geometry, scaling, the modality (from the SOP class) and the facts on the
allow-list (`scans.allowed`). Names, ids, UIDs and free texts stay in the files; they are not in refusals either, and
neither are the names of files, which are UIDs as often as not. The date of the study goes on as a `StudyDay`, which
becomes a keyed number of days. Overlays (groups 60xx, and bits of the pixels that hold no value) are never read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isimed_index.errors import ScanRefused
from isimed_index.progress import Progress, Silent
from isimed_index.scans.allowed import Taken, day_of
from isimed_index.scans.dicom import facts, frames
from isimed_index.scans.dicom.files import Elements, open_dicom
from isimed_index.scans.dicom.frames import PixelType, modality_of, pixel_type_of, slices_of
from isimed_index.scans.dicom.slices import Slice
from isimed_index.scans.surrogate import StudyDay, Surrogates

BURNED_IN = "BurnedInAnnotation"
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR, an index of files
_IDENTIFIERS = (
    *("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"),
    *("PatientID", "IssuerOfPatientID"),
)
_TAGS = tuple(dict.fromkeys([*frames.TAGS, *_IDENTIFIERS, *facts.TAGS, "StudyDate", BURNED_IN]))


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """The images of one series, from their headers; `name`, `subject` and `session` are surrogates.

    `slices` name their file by its number in `files`; they are in no order yet. `dropped` are the columns of facts that
    the headers state and that are not kept: out of range, not in the vocabulary, or not the same in all files.
    """

    name: str
    subject: str | None
    session: str | None
    files: list[Path]
    slices: list[Slice]
    pixels: PixelType
    facts: dict[str, str | float | int]
    dropped: tuple[str, ...] = ()
    day: StudyDay | None = None


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files that are no scan, under a name that holds no identifier, and why."""

    name: str
    reason: ScanRefused


@dataclass(frozen=True, slots=True, eq=False)
class _Header:
    """What is kept of one file until its series is complete."""

    path: Path
    subject: str | None
    session: str | None
    instance: str
    frame_of_reference: str
    burned_in: bool
    modality: str
    day: StudyDay | None
    pixels: PixelType
    slices: list[Slice]
    taken: Taken


def group(
    files: Sequence[Path],
    surrogates: Surrogates,
    progress: Progress | None = None,
    *,
    allow_burned_in: bool = False,
) -> tuple[list[Series], list[Leftover]]:
    """Sort files that are DICOM by content into series; reads headers only.

    What is no slice of a volume (localizers, secondary captures, reports, …) is left over with its reason, counted by
    series, and so is a whole series whose files do not fit together, or that is marked as having text burned into its
    images, unless `allow_burned_in`. An index file (DICOMDIR) is passed over.
    """
    members: dict[str, list[_Header]] = {}
    names: dict[str, str] = {}  # by UID: two of a hundred million UIDs may share a surrogate
    counts: Counter[str] = Counter()
    reasons: Counter[tuple[str, str, str]] = Counter()
    left: list[Leftover] = []
    for number, path in enumerate(files, start=1):
        (progress or Silent()).advance(1)
        uid = ""
        try:
            with open_dicom(path, _TAGS) as dataset:
                if dataset.file_meta.get("MediaStorageSOPClassUID", None) == _DIRECTORY:
                    continue
                elements = Elements(dataset, _TAGS)
                uid = _series_uid(elements)
                if uid not in names:
                    names[uid] = surrogates.of("series", uid)
                counts[uid] += 1
                header = _header(path, elements, surrogates)
                members.setdefault(uid, []).append(header)
        except ScanRefused as error:
            if uid:
                reasons[uid, error.message, error.next_step] += 1
            else:
                left.append(Leftover(f"DICOM file {number} of {len(files)}", error))
    for (uid, message, next_step), count in reasons.items():
        left.append(Leftover(names[uid], ScanRefused(f"{_files(count, counts[uid])}: {message}", next_step=next_step)))
    found: list[Series] = []
    for uid in sorted(members, key=names.__getitem__):
        try:
            found.append(_series(names[uid], members[uid], allow_burned_in))
        except ScanRefused as error:
            message = f"{_files(len(members[uid]), counts[uid])}: {error.message}"
            left.append(Leftover(names[uid], ScanRefused(message, next_step=error.next_step)))
    return found, left


def _files(count: int, of: int) -> str:
    return f"{count} of its {of} files" if count < of else f"its {count} file{'s' if count > 1 else ''}"


def _series_uid(dataset: Any) -> str:
    uid = _text(dataset, "SeriesInstanceUID")
    if not uid:
        raise ScanRefused("it is no DICOM file, or has no SeriesInstanceUID", next_step="export it again")
    return uid


def _header(path: Path, dataset: Any, surrogates: Surrogates) -> _Header:
    modality = modality_of(dataset)
    pixels = pixel_type_of(dataset, modality)
    patient, study = _text(dataset, "PatientID"), _text(dataset, "StudyInstanceUID")
    issuer = _text(dataset, "IssuerOfPatientID")
    return _Header(
        path=path,
        subject=surrogates.of("subject", f"{issuer}\0{patient}") if patient else None,
        session=surrogates.of("study", study) if study else None,
        instance=_text(dataset, "SOPInstanceUID"),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        burned_in=_text(dataset, BURNED_IN).upper() == "YES",
        modality=modality,
        day=StudyDay.of_date(day_of(_text(dataset, "StudyDate")), surrogates),
        pixels=pixels,
        slices=slices_of(dataset),
        taken=facts.of_file(dataset),
    )


def _text(dataset: Any, key: str) -> str:
    value = dataset.get(key, None)
    return "" if value is None else str(value).strip()


def _series(name: str, headers: Sequence[_Header], allow_burned_in: bool) -> Series:
    """One series out of its files; `ScanRefused` when they do not fit together."""
    burned_in = any(header.burned_in for header in headers)
    if burned_in and not allow_burned_in:
        raise ScanRefused(
            f"marked as having text burned into the image ({BURNED_IN}), which may name the patient",
            next_step="clean the pixels and export it again, or look at it and add it with --allow-burned-in",
        )
    distinct = _distinct(headers)
    first = distinct[0]
    for header in distinct:
        if (header.subject, header.session) != (first.subject, first.session):
            raise ScanRefused("the files are of two patients or two studies", next_step="export the series again")
        if header.modality != first.modality:
            raise ScanRefused("the files are of two modalities", next_step="export the series again")
        if header.frame_of_reference != first.frame_of_reference:
            raise ScanRefused("the files lie in two frames of reference", next_step="split the series")
        if header.pixels != first.pixels:
            raise ScanRefused("the files store their values in different ways", next_step="split the series")
    slices = [replace(item, file=number) for number, header in enumerate(distinct) for item in header.slices]
    taken = facts.of_series([header.taken for header in distinct])
    one_day = all(header.day == first.day for header in distinct)
    marked = {"burned_in_annotation": True} if burned_in else {}
    return Series(
        name=name,
        subject=first.subject,
        session=first.session,
        files=[item.path for item in distinct],
        slices=slices,
        pixels=first.pixels,
        facts={"modality": first.modality, **taken.values, **marked},
        dropped=tuple(column for column in taken.dropped if column not in marked) + (() if one_day else ("study_day",)),
        day=first.day if one_day else None,
    )


def _distinct(headers: Sequence[_Header]) -> list[_Header]:
    """The files, less exact copies of another one of them (the same instance, byte for byte)."""
    by_instance: dict[str, list[_Header]] = {}
    for header in headers:
        by_instance.setdefault(header.instance, []).append(header)
    kept: list[_Header] = []
    for instance, some in by_instance.items():
        if len(some) == 1 or not instance:
            kept.extend(some)
            continue
        seen: set[str] = set()
        for header in some:
            digest = hashlib.sha256(header.path.read_bytes()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                kept.append(header)
    return kept
