"""TotalSegmentator: `s0000/ct.nii.gz` (or `mri.nii.gz`), `s0000/segmentations/<class>.nii.gz` and `meta.csv`.

The masks of a scan become one label map with the numbers of the official class lists (`CLASS_LISTS`). Where masks
overlap the higher number wins, as in the data set's own conversion; how many voxels that concerns is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from isimed_index.scans import vocabulary
from isimed_index.scans.allowed import years
from isimed_index.scans.layouts.documents import read_facts
from isimed_index.scans.layouts.found import Found, Image, LabelFiles, some
from isimed_index.scans.layouts.totalsegmentator_classes import CLASS_LISTS
from isimed_index.scans.tables import Value, cell, column_name, plain_number

_CASE = re.compile(r"s\d{4}", re.ASCII)
_IMAGES = {"ct": "CT", "mri": "MR"}  # file → modality
_MASKS = "segmentations"
_SUFFIX = ".nii.gz"
_TABLE = "meta.csv"
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# Columns that are kept as they are; `institute` is not, nor is any other.
_KEPT = ("study_type", "pathology", "pathology_location")


def is_root(folder: Path) -> bool:
    """Whether a folder is a case, or holds one."""
    return any(True for _ in _cases(folder))


def read(root: Path, volume: int | None = None) -> Found:
    """All cases, with the facts of `meta.csv` in the data set's folder."""
    found = Found()
    table = _metadata(root, found)
    cases = list(_cases(root))
    classes = _class_list({path for _, folder, _ in cases for path in _masks(folder)})
    unknown: set[str] = set()
    for kind, case, path in cases:
        facts = dict(table.get(case.name, {}))
        split = facts.pop("split", None)
        masks = _masks(case)
        unknown |= masks.keys() - classes.keys()
        known = sorted((classes[name], mask) for name, mask in masks.items() if name in classes)
        values = tuple(number for number, _ in known)
        labels = LabelFiles(
            files=tuple(mask for _, mask in known),
            names={number: name for name, number in classes.items() if number in values},
            values=values,
        )
        found.images.append(
            Image(
                path=path,
                name=f"{case.name}_{kind}",
                subject=case.name
                if kind == "ct"
                else f"{kind}_{case.name}",  # s0001 of the two data sets are two people
                modality=_IMAGES[kind],
                split=None if split is None else str(split),
                labels=labels if known else None,
                facts=facts,
            )
        )
    for name in sorted(unknown):
        found.refuse(
            f"{name}{_SUFFIX}",
            "it is no class of TotalSegmentator v1, v2 or MRI",
            "leave it out, or rename the class to one of the list",
        )
    without = [case.name for _, case, _ in cases if not _masks(case)]
    if without:
        found.notes.append(f"{len(without)} cases have no masks and get no labels: {some(without)}")
    return found


def _cases(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Kind of image (ct, mri), folder of the case, file."""
    at = root.resolve()
    folders = [at] if _CASE.fullmatch(at.name) else sorted(path for path in at.iterdir() if _CASE.fullmatch(path.name))
    for folder in folders:
        for kind in _IMAGES:
            if (path := folder / f"{kind}{_SUFFIX}").is_file():
                yield kind, folder, path


def _masks(case: Path) -> dict[str, Path]:
    """Masks of a case by class."""
    return {
        path.name.removesuffix(_SUFFIX): path
        for path in sorted((case / _MASKS).glob(f"*{_SUFFIX}"))
        if not path.name.startswith(".")
    }


def _class_list(names: set[str]) -> Mapping[str, int]:
    """Numbers by class of the first list that has all these names; else of the one that has most of them."""

    def hits(classes: Sequence[str]) -> int:
        return len(names.intersection(classes))

    classes = max(CLASS_LISTS.values(), key=hits)
    return {name: number for number, name in enumerate(classes, start=1)}


def _metadata(root: Path, found: Found) -> Mapping[str, dict[str, Value]]:
    at = root.resolve()
    path = (at.parent if _CASE.fullmatch(at.name) else at) / _TABLE
    if not path.is_file():
        return {}
    if (table := read_facts(path, found, "splits, ages and sexes are not known")) is None:
        return {}
    columns = {column_name(column): column for column in table.columns}
    rows: dict[str, dict[str, Value]] = {}
    for row in table.rows:
        values = {name: cell(row[column]) for name, column in columns.items()}
        kvp = plain_number(values.get("kvp") or "")
        facts: dict[str, Value] = {
            "age": years(values.get("age") or ""),
            "sex": vocabulary.sex(values.get("gender") or ""),
            "split": _SPLITS.get(values.get("split") or ""),
            "kvp": None if kvp is None else float(kvp),
            "manufacturer": vocabulary.manufacturer(values.get("manufacturer") or ""),
            "scanner_model": vocabulary.model(values.get("scanner_model") or ""),
            **{name: values.get(name) for name in _KEPT},
        }
        rows[values.get("image_id") or ""] = {key: value for key, value in facts.items() if value is not None}
    return rows
