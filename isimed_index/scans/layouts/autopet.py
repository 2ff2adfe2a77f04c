"""autoPET, FDG-PET-CT-Lesions as NIfTI: `PETCT_<hash>/<date>-<study's words>/{CT,CTres,PET,SUV,SEG}.nii.gz`.

The study's folder is called after its date and the words of a hospital: nothing of that name is kept. A study is the
first, second, … of its patient by date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

from isimed_index.scans.allowed import years
from isimed_index.scans.layouts.documents import read_facts
from isimed_index.scans.layouts.found import Found, Image, LabelFiles
from isimed_index.scans.tables import Value, cell, column_name
from isimed_index.scans.vocabulary import sex

_PATIENT = re.compile(r"PETCT_[0-9a-f]{10}", re.ASCII)
_STUDY = re.compile(r"(?P<month>\d{2})-(?P<day>\d{2})-(?P<year>\d{4})-.*", re.ASCII)
_IMAGES = {"CT": "CT", "CTres": "CT", "PET": "PT", "SUV": "PT"}  # file → modality
_ON_THE_GRID_OF_PET = ("CTres", "PET", "SUV")  # which is that of SEG
_LABELS = "SEG"
_SUFFIX = ".nii.gz"
_TABLE = "fdg_metadata.csv"
_NAMES = {1: "lesion"}
_DIAGNOSES = ("MELANOMA", "LYMPHOMA", "LUNG_CANCER", "NEGATIVE")


def is_root(folder: Path) -> bool:
    """Whether a folder is a patient of the data set with a study in it, or holds one."""
    return any(True for _ in _studies(folder))


def read(root: Path, volume: int | None = None) -> Found:
    """All images of all studies; the table of diagnoses is read where it lies in the root or beside it."""
    found = Found()
    table = _metadata(root, found)
    for patient, number, study in _studies(root):
        name = f"{patient}_{number}"
        files = {path.name.removesuffix(_SUFFIX): path for path in sorted(study.iterdir()) if _is_volume(path)}
        labels = files.pop(_LABELS, None)
        if not files:
            found.refuse(name, "the study holds none of CT, CTres, PET and SUV", "download it again")
        for key, path in files.items():
            if key not in _IMAGES:
                found.refuse(path.name, "it is none of the files of a study", "add it with --layout files")
                continue
            on_grid = key in _ON_THE_GRID_OF_PET and labels is not None
            found.images.append(
                Image(
                    path=path,
                    name=f"{name}_{key}",
                    subject=patient,
                    session=str(number),
                    modality=_IMAGES[key],
                    labels=LabelFiles((labels,), _NAMES) if on_grid and labels is not None else None,
                    facts={"sequence": key, **table.get((patient, study.name), {})},
                )
            )
    return found


def _studies(root: Path) -> Iterator[tuple[str, int, Path]]:
    """Patient, number of the study and its folder; studies of a patient in the order of their dates."""
    at = root.resolve()
    patients = [at] if _PATIENT.fullmatch(at.name) else sorted(path for path in at.iterdir() if path.is_dir())
    for patient in patients:
        if _PATIENT.fullmatch(patient.name):
            studies = [path for path in patient.iterdir() if path.is_dir() and not path.name.startswith(".")]
            for number, study in enumerate(sorted(studies, key=_when), start=1):
                if any(_is_volume(path) for path in study.iterdir()):
                    yield patient.name, number, study


def _when(study: Path) -> tuple[date, str]:
    match = _STUDY.fullmatch(study.name)
    try:
        day = date.max if match is None else date(*(int(match[part]) for part in ("year", "month", "day")))
    except ValueError:
        day = date.max
    return day, study.name


def _is_volume(path: Path) -> bool:
    return path.name.endswith(_SUFFIX) and not path.name.startswith(".")


def _metadata(root: Path, found: Found) -> Mapping[tuple[str, str], dict[str, Value]]:
    """Diagnosis, age and sex by patient and study; no other column is looked at: they hold UIDs and dates."""
    path = next((where / _TABLE for where in (root, root.resolve().parent) if (where / _TABLE).is_file()), None)
    if path is None:
        return {}
    if (table := read_facts(path, found, "diagnoses, ages and sexes are not known")) is None:
        return {}
    columns = {column_name(column): column for column in table.columns}
    rows: dict[tuple[str, str], dict[str, Value]] = {}
    for row in table.rows:
        values = {name: cell(row[column]) for name, column in columns.items()}
        where = (values.get("file_location") or "").replace("\\", "/").split("/")
        patient = next((part for part in where if _PATIENT.fullmatch(part)), None)
        if patient is None:
            continue
        study = where[where.index(patient) + 1] if where[-1] != patient else ""
        diagnosis = values.get("diagnosis")
        facts: dict[str, Value] = {
            "diagnosis": diagnosis if diagnosis in _DIAGNOSES else None,
            "age": years(values.get("age") or ""),
            "sex": sex(values.get("sex") or ""),
        }
        rows.setdefault((patient, study), {key: value for key, value in facts.items() if value is not None})
    return rows
