"""BIDS: `dataset_description.json`, `sub-01[/ses-1]/anat/sub-01[_ses-1]_T1w.nii.gz`, tables, side-cars, derivatives.

Images are those of the data types `anat`, `pet` and `ct`; those of `func`, `dwi`, `perf` and `fmap`, series for the
most part, are left out unless one volume of each was asked for. Folders of `derivatives` are searched for label maps
only; to add their images, give the folder of the pipeline itself, which is a data set as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from isimed_index.scans import allowed
from isimed_index.scans.layouts.bids_labels import LABEL_SUFFIXES, LabelFinder
from isimed_index.scans.layouts.bids_names import BidsName, SideCars, parse
from isimed_index.scans.layouts.bids_tables import Tables
from isimed_index.scans.layouts.documents import read_object
from isimed_index.scans.layouts.found import Found, Image, some
from isimed_index.scans.tables import Value

DESCRIPTION = "dataset_description.json"
_IMAGES = (".nii.gz", ".nii")
_DATA_TYPES = {"anat": "MR", "pet": "PT", "ct": "CT"}  # folder → modality
_SERIES_TYPES = {"func": "MR", "dwi": "MR", "perf": "MR", "fmap": "MR"}
_NO_IMAGES = ("probseg", "defacemask")  # by suffix: maps of probabilities, and what faces were cut off with
_MODALITIES = {"pet": "PT", "ct": "CT", "CT": "CT"}  # by suffix, before the folder's


def is_root(folder: Path) -> bool:
    """Whether a folder has a description of a data set and at least one subject."""
    return read_object(folder / DESCRIPTION) is not None and any(True for _ in _subjects(folder))


def read(root: Path, volume: int | None = None) -> Found:
    """All images of all subjects, with their side-cars, rows of tables, and label maps."""
    found = Found()
    root = root.resolve()
    side_cars, tables, labels = SideCars(root), Tables(root, found), LabelFinder(root)
    left_out: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    images: list[tuple[Path, BidsName, str]] = []
    for path, kind in _volumes(root):
        name = parse(path.name)
        if name is not None and name.suffix in (*LABEL_SUFFIXES, *_NO_IMAGES):
            continue  # the first are what LabelFinder looks for
        if kind in _SERIES_TYPES and volume is None:
            left_out[kind] += 1
        elif kind not in _DATA_TYPES and kind not in _SERIES_TYPES:
            found.refuse(path.name, "it lies in no folder of a data type (anat, pet, …)", "add it with --layout files")
        elif path.is_symlink() and not path.exists():
            found.refuse(path.name, "it is a link to a file that is not there", "fetch it: datalad get, git annex get")
        elif (why := _wrong(root, path, name)) is not None or name is None:
            found.refuse(path.name, f"its name breaks BIDS: {why}", "rename it, or add it with --layout files")
        else:
            images.append((path, name, (_DATA_TYPES | _SERIES_TYPES)[kind]))
    labels.match([(path, name) for path, name, _ in images])
    for path, name, modality in images:
        subject = f"sub-{name.entities['sub']}"
        session = f"ses-{name.entities['ses']}" if "ses" in name.entities else None
        taken = allowed.from_side_car(side_cars.json(path))
        dropped.update(taken.dropped)
        facts: dict[str, Value] = {"sequence": name.suffix, **taken.values}
        found.images.append(
            Image(
                path=path,
                name=path.name.removesuffix(name.extension),
                subject=subject,
                session=session,
                modality=_MODALITIES.get(name.suffix, modality),
                labels=labels.of(path),
                facts=facts | tables.of_scan(path, subject, session),
                person=tables.of_subject(subject),
            )
        )
    _say(found, left_out, dropped)
    found.notes.extend(labels.notes())
    found.notes.extend(tables.notes())
    return found


def _subjects(root: Path) -> Iterator[Path]:
    yield from (path for path in sorted(root.iterdir()) if path.name.startswith("sub-") and path.is_dir())


def _volumes(root: Path) -> Iterator[tuple[Path, str]]:
    """Image files below the folders of subjects, with the folder that they lie in: `anat`, `func`, …"""
    for subject in _subjects(root):
        for path in sorted(subject.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.name.endswith(_IMAGES) and not hidden and not path.is_dir():
                yield path, path.parent.name


def _wrong(root: Path, path: Path, name: BidsName | None) -> str | None:
    """What is wrong with a name, held against the folders that the file lies in."""
    if name is None:
        return "it is not made of entities and a suffix"
    folders = path.relative_to(root).parts[:-2]  # less data type and file: sub-…, or sub-… and ses-…
    expected = [f"{key}-{name.entities[key]}" for key in ("sub", "ses") if key in name.entities]
    if list(folders) != expected:
        return f"expected it in the folder {'/'.join(expected) or 'of its subject'}, found it in {'/'.join(folders)}"
    return None


def _say(found: Found, left_out: Mapping[str, int], dropped: Mapping[str, int]) -> None:
    if left_out:
        kinds = ", ".join(f"{count} in {kind}" for kind, count in sorted(left_out.items()))
        found.notes.append(
            f"images that are no single volumes of anatomy were left out ({kinds}); --layout files reads them"
        )
    if dropped:
        columns = some([f"{column} ({count})" for column, count in sorted(dropped.items())], most=8)
        found.notes.append(f"values of side-cars that are out of range or no known word were left out: {columns}")
