"""BraTS 2021 to 2023: a folder a case, a file a sequence, and `seg` beside them.

BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz           a case is a subject
BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz    subject BraTS-GLI-00000, session 000
BraTS-MEN-… BraTS-MET-… BraTS-PED-… BraTS-SSA-…                         likewise
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from isimed_index.scans.layouts.found import Found, Image, LabelFiles

_CASE = re.compile(r"BraTS2021_\d{5}|BraTS-(?P<cohort>[A-Z]{3,4})-\d{4,5}-(?P<session>\d{3})", re.ASCII)
_SEQUENCES = {
    "t1": "T1",
    "t1ce": "T1 contrast",
    "t2": "T2",
    "flair": "FLAIR",
    "t1n": "T1",
    "t1c": "T1 contrast",
    "t2w": "T2",
    "t2f": "FLAIR",
}
_LABELS = "seg"
_SUFFIXES = (".nii.gz", ".nii")
_GLIOMA = {1: "necrotic tumor core", 2: "peritumoral edema", 3: "enhancing tumor"}
_NON_ENHANCING = {1: "non-enhancing tumor core", 2: "surrounding FLAIR hyperintensity", 3: "enhancing tumor"}
# By cohort, "" is 2021. The releases of the paediatric cohort number their labels differently and do not say which they
# are, so theirs go by number.
_NAMES: Mapping[str, Mapping[int, str]] = {
    "": {1: "necrotic tumor core", 2: "peritumoral edema", 4: "enhancing tumor"},
    "GLI": _GLIOMA,
    "SSA": _GLIOMA,
    "MEN": _NON_ENHANCING,
    "MET": _NON_ENHANCING,
}
_SPLITS = {"trainingdata": "train", "validationdata": "validation"}  # in a folder's name, less - and _


def is_root(folder: Path) -> bool:
    """Whether a folder is a case, or holds one."""
    return _CASE.fullmatch(folder.resolve().name) is not None or any(map(_is_case, folder.iterdir()))


def read(root: Path, volume: int | None = None) -> Found:
    """All images of all cases; a file that is none of the known ones is refused by name."""
    found = Found()
    for case in _cases(root):
        match = _CASE.fullmatch(case.name)
        assert match is not None
        session = match["session"]
        files = {path.name: path for path in sorted(case.iterdir()) if _is_volume(path)}
        separator = "_" if session is None else "-"
        labels = _file_of(files, f"{case.name}{separator}{_LABELS}")
        if labels is not None:
            del files[labels.name]
        names = _NAMES.get(match["cohort"] or "", {})
        for path in files.values():
            key = _stem(path).removeprefix(f"{case.name}{separator}")
            if key == _stem(path) or key not in _SEQUENCES:
                found.refuse(path.name, "it is none of the files of a BraTS case", "add it with --layout files")
                continue
            found.images.append(
                Image(
                    path=path,
                    name=_stem(path),
                    subject=case.name if session is None else case.name.removesuffix(f"-{session}"),
                    session=session,
                    modality="MR",
                    split=_split(case),
                    labels=None if labels is None else LabelFiles((labels,), names),
                    facts={"sequence": _SEQUENCES[key]},
                )
            )
        if not files:
            found.refuse(case.name, "the case holds no image", "download it again")
    return found


def _cases(root: Path) -> Iterator[Path]:
    if _CASE.fullmatch(root.resolve().name):
        yield root.resolve()
    else:
        yield from (inner for inner in sorted(root.iterdir()) if _is_case(inner))


def _is_case(folder: Path) -> bool:
    return _CASE.fullmatch(folder.name) is not None and folder.is_dir()


def _is_volume(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith(".")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _file_of(files: Mapping[str, Path], stem: str) -> Path | None:
    return next((files[stem + suffix] for suffix in _SUFFIXES if stem + suffix in files), None)


def _split(case: Path) -> str | None:
    """By the nearest folder above that says: `…BraTS2023-GLI-Challenge-TrainingData`, `BraTS2021_Training_Data`."""
    for parent in case.resolve().parents:
        folded = parent.name.lower().replace("_", "").replace("-", "")
        for word, split in _SPLITS.items():
            if word in folded:
                return split
    return None
