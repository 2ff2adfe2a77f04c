"""Many DICOM files → series, from their headers alone, with a keyed surrogate for every identifier.

Nothing of a header goes further than geometry, scaling, and the facts on this list; they say how an image was made,
not of whom: modality (from the SOP class), body part (only the standard's own terms), slice thickness, kVp, echo and
repetition time, field strength, and the scanner's model. Names, ids, UIDs, dates and free texts stay in the files; they
are not in refusals either, and neither are the names of files, which are UIDs as often as not.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isimed_index.errors import ScanRefused
from isimed_index.progress import Progress, Silent
from isimed_index.scans.dicom import frames
from isimed_index.scans.dicom.files import open_dicom
from isimed_index.scans.dicom.frames import PixelType, modality_of, pixel_type_of, slices_of
from isimed_index.scans.dicom.slices import Slice
from isimed_index.scans.surrogate import Surrogates

_NUMBERS = {
    "SliceThickness": "slice_thickness_mm",
    "KVP": "kvp",
    "EchoTime": "echo_time_ms",
    "RepetitionTime": "repetition_time_ms",
    "MagneticFieldStrength": "field_strength_t",
}
FACTS = ("body_part", "scanner_model", *_NUMBERS.values())  # beside the modality, a column of its own
# Body Part Examined is free text in practice: only terms of the standard (PS3.16, Annex L) are kept.
_BODY_PART = re.compile(
    r"""
    ABDOMEN|ABDOMENPELVIS|ANKLE|AORTA|ARM|BACK|BLADDER|BRAIN|BREAST|CALF|CAROTID|CERVIX|CHEST|CHESTABDOMEN|
    CHESTABDPELVIS|CLAVICLE|COCCYX|COLON|CSPINE|CTSPINE|ELBOW|EXTREMITY|EYE|FEMUR|FINGER|FOOT|GALLBLADDER|
    HAND|HEAD|HEADNECK|HEART|HIP|HUMERUS|IAC|JAW|KIDNEY|KNEE|LEG|LIVER|LSPINE|LSSPINE|LUNG|MEDIASTINUM|NECK|
    NECKCHEST|NECKCHESTABDPELV|NECKCHESTABDOMEN|ORBIT|PANCREAS|PAROTID|PELVIS|PITUITARY|PROSTATE|RECTUM|RIB|
    SHOULDER|SKULL|SPINE|SPLEEN|SSPINE|STERNUM|TESTIS|THIGH|THYMUS|THYROID|TMJ|TONGUE|TRACHEA|TSPINE|UTERUS|
    WHOLEBODY|WRIST
    """,
    re.VERBOSE,
)
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+/-]{0,39}", re.ASCII)
_DIRECTORY = "1.2.840.10008.1.3.10"  # DICOMDIR, an index of files
_IDENTIFIERS = (
    *("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"),
    *("PatientID", "IssuerOfPatientID", "PatientName", "BurnedInAnnotation"),
)
_TAGS = [*frames.TAGS, *_IDENTIFIERS, *_NUMBERS, "BodyPartExamined", "ManufacturerModelName"]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """The images of one series, from their headers; `name`, `subject` and `session` are surrogates.

    `slices` name their file by its number in `files`; they are in no order yet.
    """

    name: str
    subject: str | None
    session: str | None
    files: list[Path]
    slices: list[Slice]
    pixels: PixelType
    facts: dict[str, str | float | int]


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
    pixels: PixelType
    slices: list[Slice]
    facts: dict[str, str | float | int]


def group(
    files: Sequence[Path], surrogates: Surrogates, progress: Progress | None = None
) -> tuple[list[Series], list[Leftover]]:
    """Sort files that are DICOM by content into series; reads headers only.

    What is no slice of a volume (localizers, secondary captures, reports, …) is left over with its reason, counted by
    series, and so is a whole series whose files do not fit together. An index file (DICOMDIR) is passed over.
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
                uid = _series_uid(dataset)
                names[uid] = surrogates.of("series", uid)
                counts[uid] += 1
                header = _header(path, dataset, surrogates)
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
            found.append(_series(names[uid], members[uid]))
        except ScanRefused as error:
            message = f"{_files(len(members[uid]), counts[uid])}: {error.message}"
            left.append(Leftover(names[uid], ScanRefused(message, next_step=error.next_step)))
    return found, left


def _files(count: int, of: int) -> str:
    return f"{count} of its {of} files" if count < of else f"its {count} file{'s' if count > 1 else ''}"


def _series_uid(dataset: Any) -> str:
    uid = _text(dataset, "SeriesInstanceUID")
    if not uid:
        raise ScanRefused("it has no SeriesInstanceUID", next_step="export it again")
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
        burned_in=_text(dataset, "BurnedInAnnotation").upper() == "YES",
        pixels=pixels,
        slices=slices_of(dataset),
        facts={"modality": modality, **_facts(dataset)},
    )


def _text(dataset: Any, key: str) -> str:
    value = dataset.get(key, None)
    return "" if value is None else str(value).strip()


def _facts(dataset: Any) -> dict[str, str | float | int]:
    """Those of the allowed facts that the header states plainly."""
    facts: dict[str, str | float | int] = {}
    part, model = _text(dataset, "BodyPartExamined").upper(), _text(dataset, "ManufacturerModelName")
    if _BODY_PART.fullmatch(part):
        facts["body_part"] = part
    # The model's name is free text: one that repeats a word of the patient's name or id is not a model's name.
    identity = re.split(r"[^A-Za-z0-9]+", f"{_text(dataset, 'PatientName')} {_text(dataset, 'PatientID')}".lower())
    if _MODEL.fullmatch(model) and not any(len(word) > 1 and word in model.lower() for word in identity):
        facts["scanner_model"] = model
    for tag, name in _NUMBERS.items():
        try:
            number = float(_text(dataset, tag))
        except ValueError:
            continue
        if math.isfinite(number):
            facts[name] = number
    return facts


def _series(name: str, headers: Sequence[_Header]) -> Series:
    """One series out of its files; `ScanRefused` when they do not fit together."""
    if any(header.burned_in for header in headers):
        raise ScanRefused(
            "marked as having text burned into the image (BurnedInAnnotation), which may name the patient",
            next_step="clean the pixels, and export it again",
        )
    distinct = _distinct(headers)
    first = distinct[0]
    for header in distinct:
        if (header.subject, header.session) != (first.subject, first.session):
            raise ScanRefused("the files are of two patients or two studies", next_step="export the series again")
        if header.facts["modality"] != first.facts["modality"]:
            raise ScanRefused("the files are of two modalities", next_step="export the series again")
        if header.frame_of_reference != first.frame_of_reference:
            raise ScanRefused("the files lie in two frames of reference", next_step="split the series")
        if header.pixels != first.pixels:
            raise ScanRefused("the files store their values in different ways", next_step="split the series")
    slices = [replace(item, file=number) for number, header in enumerate(distinct) for item in header.slices]
    same = {
        key: value for key, value in first.facts.items() if all(header.facts.get(key) == value for header in distinct)
    }
    return Series(name, first.subject, first.session, [item.path for item in distinct], slices, first.pixels, same)


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
